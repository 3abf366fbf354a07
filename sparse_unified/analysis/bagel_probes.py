# SPDX-License-Identifier: Apache-2.0
"""The three tasks of a BAGEL pipeline as probes: what runs, what is measured, on which samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from sparse_unified.analysis.evaluate import Evaluator
from sparse_unified.analysis.metrics import (
    DenseDistance,
    Settings,
    TextAgreement,
    VelocityError,
    guidance_of,
    look_at,
    question_context,
)
from sparse_unified.analysis.probe import Probe
from sparse_unified.analysis.samples import Sample, Task
from sparse_unified.bagel import BagelPipeline, generate_tokens
from sparse_unified.bagel.images import open_image
from sparse_unified.bagel.pipeline import choose_sizes
from sparse_unified.bagel.sampler import initial_noise


def bagel_probe(
    pipeline: BagelPipeline,
    task: Task,
    samples: Sequence[Sample],
    settings: Settings | None = None,
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> Probe:
    """Returns the probe of one task.

    Generation and editing are measured by the distance of whole generations to those of the dense
    model, and where every sample has its held-out image by the velocity error too; understanding
    by the agreement of text. The forward whose cost is measured is one velocity, without guidance,
    at the size of the first sample; of understanding, the reading of the first question with its
    pictures.

    Args:
        evaluators: more of them, by name.
    """
    settings = settings or Settings()
    measures: dict[str, Evaluator]
    if task is Task.UNDERSTANDING:
        measures = {"text": TextAgreement(samples, settings)}
    else:
        measures = {"distance": DenseDistance(samples, settings)}
        if all(sample.image is not None for sample in samples):
            measures["velocity"] = VelocityError(samples, settings.times)
    return Probe(
        task=task.value,
        evaluators={**measures, **(evaluators or {})},
        run=lambda begin: run_samples(
            pipeline, task, samples, settings, on_sample=lambda i: begin(samples[i].fingerprint())
        ),
        workload=lambda: _workload(pipeline, task, samples[0], settings),
        description={
            "samples": [sample.fingerprint() for sample in samples],
            "settings": asdict(settings),
        },
    )


def run_samples(
    pipeline: BagelPipeline,
    task: Task,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    on_sample: Callable[[int], object] | None = None,
) -> None:
    """Lets the model do what the samples ask for, one after the other.

    Args:
        on_sample: called with the number of each before it begins.
    """
    for index, sample in enumerate(samples):
        if on_sample is not None:
            on_sample(index)
        if task is Task.UNDERSTANDING:
            context = question_context(pipeline, sample)
            with torch.no_grad():
                generate_tokens(pipeline.model, [context], max_length=settings.max_length)
        else:
            sources: Any = [open_image(path, where="samples") for path in sample.sources]
            pipeline.generate(
                sample.prompt,
                images=sources or None,
                seed=sample.seed,
                size=settings.size,
                num_timesteps=settings.num_timesteps,
                progress=False,
            )


def _workload(
    pipeline: BagelPipeline, task: Task, sample: Sample, settings: Settings
) -> Callable[[], object]:
    model = pipeline.model
    if task is Task.UNDERSTANDING:
        looks = look_at(pipeline, sample, vae=False)
        return lambda: question_context(pipeline, sample, looks)
    pictures = [open_image(path, where="samples") for path in sample.sources]
    edited = pipeline.image_processor.for_vae.size(*pictures[-1].size)[::-1] if pictures else None
    (size,) = choose_sizes(settings.size, [edited], model.config)
    grid = model.config.token_grid(*size)
    noise = initial_noise(grid[0] * grid[1], model.config.token_channels, sample.seed)
    context = guidance_of(pipeline, sample).full
    time = torch.tensor([0.5])
    return lambda: model.velocity([noise], [grid], time, [[context]])
