# SPDX-License-Identifier: Apache-2.0
"""One pass over samples of a task, which gathers the statistics of all FFNs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparse_unified._common import Progress
from sparse_unified.analysis.bagel_probes import run_samples
from sparse_unified.analysis.collect import collect
from sparse_unified.analysis.metrics import Settings
from sparse_unified.analysis.samples import Sample, Task
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.sums import StatisticsConfig
from sparse_unified.bagel import BagelPipeline
from sparse_unified.surgery.decoder import Adapter


def calibrate(
    model: Any,
    task: Task | str,
    samples: Sequence[Any],
    *,
    run: Callable[[Any], object] | None = None,
    settings: Settings | None = None,
    config: StatisticsConfig | None = None,
    components: Sequence[str] | None = None,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> FfnStatistics:
    """Runs a model on samples and returns what its FFNs did.

    The same model, samples and settings give the same statistics: noise comes from the seed of each
    sample, and text is the likeliest.

    Args:
        model: a BAGEL pipeline; with `run`, any model that an adapter fits.
        task: generation, understanding or editing; with `run`, any name.
        samples: `Sample`s; with `run`, whatever it takes, one after the other. Those have their
            number as name, so that statistics of two such runs do not merge.
        run: what to do with a sample, for models that are no BAGEL pipeline.
        settings: of the built-in runs: size, steps, length of answers.
        config: what is counted.
        components: None is all of them.
        adapter: None finds one.
        progress: called with the number of finished samples and of all.

    Raises:
        ValueError: there are no samples, the task or model is none that can be run, no adapter
            fits, or a FFN gave a value that is not finite.
    """
    if not samples:
        raise ValueError("calibrate: samples must be at least one, got none")
    if run is None and not isinstance(model, BagelPipeline):
        raise ValueError(
            "calibrate: model must be a BagelPipeline, or come with run, "
            f"got a {type(model).__name__} alone"
        )
    name = task.value if isinstance(task, Task) else task
    if run is None and name not in {known.value for known in Task}:
        legal = ", ".join(known.value for known in Task)
        raise ValueError(f"calibrate: task must be one of {legal}, got {task!r}")
    tell: Progress = progress or (lambda *_: None)
    with collect(model, name, config=config, components=components, adapter=adapter) as collector:

        def begin(index: int) -> None:
            tell(index, len(samples))
            sample = samples[index]
            collector.begin(sample.fingerprint() if isinstance(sample, Sample) else str(index))

        if run is None:
            run_samples(model, Task(name), samples, settings or Settings(), on_sample=begin)
        else:
            for index, sample in enumerate(samples):
                begin(index)
                run(sample)
    tell(len(samples), len(samples))
    return collector.statistics()
