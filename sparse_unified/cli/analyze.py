# SPDX-License-Identifier: Apache-2.0
"""analyze: which layers, neurons and heads of a model a task needs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sparse_unified.cli.analyze_options import TASKS, add_parser
from sparse_unified.cli.console import Usage, check_output, show_progress, write_result
from sparse_unified.cli.models import load_pipeline

if TYPE_CHECKING:
    from sparse_unified.analysis.evaluate import Evaluator
    from sparse_unified.analysis.metrics import Settings
    from sparse_unified.analysis.samples import Sample, Task
    from sparse_unified.analysis.statistics import FfnStatistics
    from sparse_unified.bagel import BagelPipeline


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    add_parser(commands).set_defaults(run=_run_analyze)


def _run_analyze(options: argparse.Namespace) -> int:
    with TemporaryDirectory() as drawn:
        return _analyze(options, Path(drawn))


def _analyze(options: argparse.Namespace, drawn: Path) -> int:
    from sparse_unified.analysis.identity import fingerprint
    from sparse_unified.analysis.points import SweepConfig
    from sparse_unified.analysis.samples import Task
    from sparse_unified.analysis.sums import StatisticsConfig
    from sparse_unified.analysis.sweep import run_sweep

    if options.geneval_scorer and not options.geneval:
        raise Usage("analyze: --geneval-scorer must come with --geneval, got none")
    if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "analyze: matplotlib must be installed for pictures "
            "(pip install 'sparse_unified[plot]', or --no-plots), got none"
        )
    check_output(options.json, "--json")
    config = SweepConfig(
        components=options.component,
        axes=options.axis,
        ratios=options.ratios,
        criterion=options.criterion,
        layers=options.layers,
        part=options.part,
        budget=options.budget,
        block_size=options.block_size,
        seed=options.seed,
        repeats=options.repeats,
        statistics=StatisticsConfig(num_time_ranges=options.time_ranges),
    )
    statistics = _statistics(options)
    settings = _settings(options)
    tasks = [Task(name) for name in options.task]
    samples = {task: _samples(options, task, drawn) for task in tasks}
    more = _evaluators(options)
    pipeline = load_pipeline(options)
    probes = [_probe(options, pipeline, t, samples[t], settings, more) for t in tasks]
    description = {
        "model": fingerprint(pipeline.model),
        "device": pipeline.model.device.type,
        "statistics": {task: found.samples for task, found in statistics.items()},
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
    }
    with show_progress("analyze", "point", quiet=options.quiet) as progress:
        result = run_sweep(
            pipeline,
            probes,
            config,
            options.out,
            statistics=statistics,
            description=description,
            progress=progress,
        )
    if not options.no_plots:
        from sparse_unified.analysis.plots import write_plots

        write_plots(result, Path(options.out) / "plots")
    write_result(options.json, f"{result.to_text()}\n\n{options.out}/report.md", result.to_json())
    return 0


def _statistics(options: argparse.Namespace) -> dict[str, FfnStatistics]:
    from sparse_unified.analysis.statistics import FfnStatistics

    files = {task: _of_task(options.stats, task, "--stats") for task in options.task}
    return {task: FfnStatistics.load(file) for task, file in files.items() if file is not None}


def _settings(options: argparse.Namespace) -> Settings:
    from sparse_unified.analysis.metrics import Settings

    return Settings(
        size=options.size,
        num_timesteps=options.steps,
        max_length=options.max_tokens,
        batch_size=options.batch_size,
    )


def _samples(options: argparse.Namespace, task: Task, drawn: Path) -> list[Sample]:
    from sparse_unified.analysis.samples import built_in_samples, read_samples

    prompts = _of_task(options.prompts, task.value, "--prompts")
    images = _of_task(options.images, task.value, "--images")
    if prompts is None:
        if images is not None:
            raise Usage(f"analyze: --images must come with --prompts for {task.value}, got none")
        return built_in_samples(task, options.samples, options.seed, folder=drawn)
    return read_samples(prompts, images, task, options.samples, options.seed)


def _of_task(given: list[str], task: str, option: str) -> str | None:
    """Returns the value of `TASK=VALUE` for a task, or else that of a plain VALUE."""
    own = [v.partition("=")[2] for v in given if v.partition("=")[0] == task and "=" in v]
    plain = [v for v in given if v.partition("=")[0] not in TASKS or "=" not in v]
    if len(own) > 1 or len(plain) > 1:
        raise Usage(f"analyze: {option} must be given once for {task}, got {', '.join(given)}")
    return next(iter(own or plain), None)


def _evaluators(options: argparse.Namespace) -> dict[str, Evaluator]:
    from sparse_unified.analysis.evaluate import load_evaluator

    return {name: load_evaluator(name) for name in options.evaluator}


def _probe(
    options: argparse.Namespace,
    pipeline: BagelPipeline,
    task: Task,
    samples: list[Sample],
    settings: Settings,
    more: dict[str, Evaluator],
) -> Any:
    from sparse_unified.analysis.bagel_probes import bagel_probe
    from sparse_unified.analysis.evaluate import load_evaluator
    from sparse_unified.analysis.geneval import GenEvalImages, read_metadata

    own = dict(more)
    if options.geneval and task.value == "generation":
        scorer: Any = options.geneval_scorer and load_evaluator(options.geneval_scorer)
        own["geneval"] = GenEvalImages(
            read_metadata(options.geneval),
            Path(options.out) / "geneval",
            num_images=options.geneval_images,
            seed=options.seed,
            settings=settings,
            scorer=scorer or None,
        )
    return bagel_probe(pipeline, task, samples, settings, evaluators=own)
