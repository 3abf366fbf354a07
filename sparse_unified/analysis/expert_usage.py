# SPDX-License-Identifier: Apache-2.0
"""Counts which experts tokens choose while a model runs, by hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import Progress, context
from sparse_unified.analysis.bagel_probes import run_samples
from sparse_unified.analysis.collect import observe_time
from sparse_unified.analysis.metrics import Settings
from sparse_unified.analysis.samples import Sample, Task
from sparse_unified.analysis.sums import StatisticsConfig
from sparse_unified.analysis.usage import ExpertUsage, LayerUsage
from sparse_unified.bagel import BagelPipeline
from sparse_unified.surgery.decoder import SparseBlock, find_sparse_blocks

_WHERE = "expert_usage"


class ExpertWatch:
    """What `watch_experts` yields: `usage` gives the counts so far."""

    def __init__(self, blocks: Sequence[SparseBlock], config: StatisticsConfig) -> None:
        self._config, self._range, self._blocks = config, 0, blocks
        self._tokens = [torch.zeros(config.num_ranges, dtype=torch.int64) for _ in blocks]
        self._load = [
            torch.zeros(
                config.num_ranges,
                block.module.num_experts,
                dtype=torch.int64,
                device=block.module.gate.weight.device,
            )
            for block in blocks
        ]

    def set_time(self, time: float | None) -> None:
        """Says at which time of denoising the model runs; None for tokens that have none.

        Of BAGEL models it is read from their time embedder, and need not be said.
        """
        self._range = self._config.range_of(time)

    def count(self, place: int, topk_idx: Tensor) -> None:
        """Adds the choices [T, K] of tokens in the block of that place."""
        load = self._load[place]
        counts = torch.bincount(topk_idx.flatten().long(), minlength=load.shape[1])
        load[self._range] += counts.to(load.device)
        self._tokens[place][self._range] += len(topk_idx)

    def usage(self, task: str = "run", samples: int = 1) -> ExpertUsage:
        """Returns what was counted, under a name and a number of samples.

        Raises:
            ValueError: no token ran through a sparse block.
        """
        if not any(int(tokens.sum()) for tokens in self._tokens):
            where = ", ".join(dict.fromkeys(block.component for block in self._blocks))
            raise ValueError(
                f"{_WHERE}: {task} must send tokens through a sparse FFN of {where}, got none"
            )
        return ExpertUsage(
            task=task,
            samples=samples,
            num_time_ranges=self._config.num_time_ranges,
            layers=tuple(
                LayerUsage(
                    component=block.component,
                    layer=block.layer,
                    top_k=block.module.top_k,
                    tokens=tokens.clone(),
                    load=load.to("cpu", copy=True),
                )
                for block, tokens, load in zip(self._blocks, self._tokens, self._load, strict=True)
            ),
        )


@contextmanager
def watch_experts(
    model: object, *, num_time_ranges: int = 4, components: Sequence[str] | None = None
) -> Iterator[ExpertWatch]:
    """Counts the choices of all sparse blocks while the block of code runs.

        with watch_experts(pipeline) as watch:
            pipeline.generate("a red bench", seed=0)
        print(watch.usage().to_text())

    Args:
        model: a model or pipeline with `SparseMoE` blocks.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        components: whose blocks; None is all.

    Raises:
        ValueError: there are no sparse blocks, their weights are not in memory, or an argument is
            out of range.
    """
    config = StatisticsConfig(num_time_ranges=num_time_ranges)
    with context(_WHERE):
        blocks = find_sparse_blocks(model, components)
    for block in blocks:
        if block.module.gate.weight.is_meta:
            raise ValueError(
                f"{_WHERE}: {block.component} layer {block.layer}: router must be in memory, "
                "got meta (offloaded weights)"
            )
    watch = ExpertWatch(blocks, config)
    with ExitStack() as hooks:
        for place, block in enumerate(blocks):
            _observe(hooks, watch, place, block)
        observe_time(hooks, watch.set_time, model)
        yield watch


def expert_usage(
    model: Any,
    task: Task | str,
    samples: Sequence[Any],
    *,
    run: Callable[[Any], object] | None = None,
    settings: Settings | None = None,
    num_time_ranges: int = 4,
    components: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ExpertUsage:
    """Runs a model on samples and returns which experts its tokens chose.

    Args:
        model: a BAGEL pipeline with sparse blocks; with `run`, any model that has some.
        task: generation, understanding or editing; with `run`, any name.
        samples: `Sample`s; with `run`, whatever it takes, one after the other.
        run: what to do with a sample, for models that are no BAGEL pipeline.
        settings: of the built-in runs: size, steps, length of answers.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        components: whose blocks; None is all.
        progress: called with the number of finished samples and of all.

    Raises:
        ValueError: there are no samples, no sparse blocks, or none that sees a token; the task or
            model is none that can be run.
    """
    if not samples:
        raise ValueError(f"{_WHERE}: samples must be at least one, got none")
    if run is None and not isinstance(model, BagelPipeline):
        raise ValueError(
            f"{_WHERE}: model must be a BagelPipeline, or come with run, "
            f"got a {type(model).__name__} alone"
        )
    name = task.value if isinstance(task, Task) else task
    if run is None and name not in {known.value for known in Task}:
        legal = ", ".join(known.value for known in Task)
        raise ValueError(f"{_WHERE}: task must be one of {legal}, got {task!r}")
    tell: Progress = progress or (lambda *_: None)
    with watch_experts(model, num_time_ranges=num_time_ranges, components=components) as watch:
        if run is None:
            listed: Sequence[Sample] = samples
            run_samples(
                model,
                Task(name),
                listed,
                settings or Settings(),
                on_sample=lambda index: tell(index, len(samples)),
            )
        else:
            for index, sample in enumerate(samples):
                tell(index, len(samples))
                run(sample)
    tell(len(samples), len(samples))
    return watch.usage(name, len(samples))


def _observe(hooks: ExitStack, watch: ExpertWatch, place: int, block: SparseBlock) -> None:
    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        with torch.no_grad():
            watch.count(place, block.module.route(*arguments, **named)[2])

    handle = block.module.register_forward_pre_hook(before, with_kwargs=True)
    hooks.callback(handle.remove)
