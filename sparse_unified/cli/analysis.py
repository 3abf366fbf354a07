# SPDX-License-Identifier: Apache-2.0
"""calibrate, analyze and expert-usage: what a model does on samples of a task."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_unified._common import Report, context, optional
from sparse_unified.analysis import (
    FfnStatistics,
    expert_usage,
    save_scores,
    score,
)
from sparse_unified.analysis.bagel_task import Settings, bagel_probe
from sparse_unified.analysis.calibration import calibrate
from sparse_unified.analysis.criteria import CRITERIA
from sparse_unified.analysis.evaluators import load_evaluator
from sparse_unified.analysis.geneval import GenEvalImages, read_metadata
from sparse_unified.analysis.plots import write_plots, write_usage_plot
from sparse_unified.analysis.samples import Sample, Task, built_in_samples, read_samples
from sparse_unified.analysis.statistics import StatisticsConfig, hash_model
from sparse_unified.analysis.sweep import SweepConfig, run_sweep
from sparse_unified.bagel import BagelPipeline
from sparse_unified.cli.console import Command, CommandParser, Output, Usage, show_progress
from sparse_unified.cli.generate import add_model, load_pipeline
from sparse_unified.cli.options import add_flags, add_options, arguments, names, natural, positive
from sparse_unified.surgery.decoder import find_sparse_blocks

TASKS = ("generation", "understanding", "editing")


def _in_a_folder(
    run: Callable[[argparse.Namespace, Path], Report],
) -> Callable[[argparse.Namespace], Report]:
    """Gives a command a folder for as long as it runs, where pictures of built-in samples go."""

    def within(options: argparse.Namespace) -> Report:
        with TemporaryDirectory() as drawn:
            return run(options, Path(drawn))

    return within


def _add_settings(group: Any, *more: str) -> None:
    """Adds how many samples there are, and how the model runs on them."""
    group.add_argument("--samples", type=positive, metavar="N", help="the first N prompts")
    add_options(
        group, Settings, "size", "steps=num_timesteps", "max_tokens=max_length", *more,
        num_timesteps="timesteps of a generation", max_length="most tokens of an answer",
    )  # fmt: skip


def _add_samples(parser: CommandParser) -> None:
    """Adds the task of a command with one, its samples, and how the model runs on them."""
    parser.add_argument("--task", required=True, choices=TASKS, help="what the model does")
    parser.add_argument(
        "--component", choices=("und", "gen"), help="whose FFNs are looked at (default both)"
    )
    group = parser.add_argument_group("samples")
    add_flags(
        group,
        """
        --prompts FILE  a prompt a line, or .jsonl with prompt and source (default: built-in
                        prompts)
        --images DIR    images, one per prompt in the order of their names, that editing and
                        understanding start from; of .jsonl, where its files are
        """,
    )
    _add_settings(group)
    add_options(group, SweepConfig, "seed", seed="of noise and of random choices")
    add_options(group, StatisticsConfig, "time_ranges=num_time_ranges")


def _read_samples(
    options: argparse.Namespace, task: Task, drawn: Path, prompts: str | None, images: str | None
) -> list[Sample]:
    if prompts is not None:
        return read_samples(prompts, images, task, options.samples, options.seed)
    if images is not None:
        raise Usage(f"--images must come with --prompts for {task.value}, got none")
    return built_in_samples(task, options.samples, options.seed, folder=drawn)


# calibrate


def _add_calibrate(parser: CommandParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE.safetensors", help="where the statistics go"
    )
    add_flags(
        parser,
        "--merge FILE...  statistics of the same model, of other samples or tasks, to be "
        "added (repeatable)",
    )
    _add_samples(parser)
    counted = parser.add_argument_group("what is counted")
    add_options(counted, StatisticsConfig, "threshold", "active_fraction")
    counted.add_argument(
        "--inputs",
        dest="num_inputs",
        type=natural,
        default=0,
        metavar="N",
        help="keep what each FFN was given on N tokens drawn at random, for convert --partition "
        "coactivation and --router-init activation; 512 are plenty (default: none)",
    )
    group = parser.add_argument_group("scores")
    add_flags(group, "--scores FILE.safetensors  write scores there")
    group.add_argument(
        "--criterion",
        choices=tuple(CRITERIA),
        help="what they are: mean |h| (activation); that times the norm of the down_proj column "
        "(wanda, the default); of the weights alone (magnitude); drawn (random); the official "
        "score with its fault (reference)",
    )


@_in_a_folder
def _calibrate(options: argparse.Namespace, drawn: Path) -> Output:
    if options.criterion and not options.scores:
        raise Usage("calibrate: --criterion must come with --scores, got none")
    config = StatisticsConfig(**arguments(StatisticsConfig, options))
    task = Task(options.task)
    samples = _read_samples(options, task, drawn, options.prompts, options.images)
    earlier = [FfnStatistics.load(path) for path in options.merge]
    components = None if options.component is None else [options.component]
    pipeline = load_pipeline(options)
    for statistics in earlier:
        statistics.check(pipeline)
    with show_progress(options, "calibrate", "sample") as progress:
        found = calibrate(
            pipeline,
            task,
            samples,
            settings=Settings(**arguments(Settings, options)),
            config=config,
            components=components,
            progress=progress,
        )
    found = found.merge(*earlier)
    found.save(options.out)
    if options.scores:
        criterion = options.criterion or "wanda"
        scores = score(criterion, pipeline, found, components=components, seed=options.seed)
        save_scores(options.scores, scores)
    return _calibrated(options, found)


def _calibrated(options: argparse.Namespace, statistics: FfnStatistics) -> Output:
    import torch

    tasks: dict[str, Any] = {}
    lines = []
    for task in statistics.tasks:
        components = {}
        num_samples = len(statistics.samples[task])
        lines.append(f"{task}: {num_samples} samples")
        for component, keyed in statistics.ffns[task].items():
            tokens = sum(int(sums.tokens.sum()) for sums in keyed.values())
            fired = sum(float(sums.num_fired.mean(1).sum()) for sums in keyed.values())
            overlap = torch.stack([sums.sample_overlap() for sums in keyed.values()])
            overlap = overlap[~overlap.isnan()]
            found = components[component] = {
                "ffns": len(keyed),
                "tokens": tokens // len(keyed),
                "firing_rate": fired / tokens if tokens else None,
                "sample_overlap": float(overlap.mean()) if len(overlap) else None,
            }
            line = f"  {component}  {found['ffns']} FFNs, {found['tokens']} tokens each"
            if found["firing_rate"] is not None:
                line += f", {found['firing_rate']:.1%} fire"
            if found["sample_overlap"] is not None:
                line += f", overlap of samples {found['sample_overlap']:.2f}"
            lines.append(line)
        tasks[task] = {"samples": num_samples, "components": components}
    document = {
        "model": options.model,
        "model_hashes": dict(statistics.model_hashes),
        "statistics": options.out,
        "scores": options.scores,
        "tasks": tasks,
    }
    lines += [path for path in (options.out, options.scores) if path]
    return Output(text="\n".join(lines), document=document)


CALIBRATE = Command(
    description="""\
Runs MODEL on samples of a task and writes what its FFN neurons did: mean |h|, firing, and the
active neurons of each sample, per component, layer and range of the denoising time. With --scores
it also writes the importance of the neurons, as convert and prune take it.""",
    add=_add_calibrate,
    run=_calibrate,
    outputs=("out", "scores"),
)


# expert-usage


def _add_expert_usage(parser: CommandParser) -> None:
    add_model(parser)
    _add_samples(parser)
    add_flags(parser, "--plot FILE.png  draw load and change there")


@_in_a_folder
def _expert_usage(options: argparse.Namespace, drawn: Path) -> Report:
    if options.plot is not None:
        if not options.plot.lower().endswith(".png"):
            raise Usage(f"expert-usage: --plot must end in .png, got {options.plot!r}")
        optional("matplotlib", "plot", purpose="--plot")
    task = Task(options.task)
    samples = _read_samples(options, task, drawn, options.prompts, options.images)
    components = None if options.component is None else [options.component]
    pipeline = load_pipeline(options)
    with context(f"expert-usage: {options.model}"):
        find_sparse_blocks(pipeline, components)
    with show_progress(options, "expert-usage", "sample") as progress:
        usage = expert_usage(
            pipeline,
            task,
            samples,
            settings=Settings(**arguments(Settings, options)),
            num_time_ranges=options.num_time_ranges,
            components=components,
            progress=progress,
        )
    if options.plot is not None:
        write_usage_plot(usage, options.plot)
    return Output(text=usage.to_text(), document=usage.to_dict())


EXPERT_USAGE = Command(
    description="""\
Runs the sparse MODEL on samples of a task and counts which experts its tokens choose: load and its
entropy per component and layer, experts that no token uses, and how the load moves over the times
of denoising. MODEL must have sparse FFNs.""",
    add=_add_expert_usage,
    run=_expert_usage,
    outputs=("plot",),
)


# analyze


def _add_analyze(parser: CommandParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--task",
        required=True,
        type=names(*TASKS),
        metavar="TASKS",
        help=f"comma-separated: {', '.join(TASKS)}",
    )
    swept = parser.add_argument_group("what is swept")
    add_options(
        swept,
        SweepConfig,
        *("component=components", "axis=axes", "ratios", "criterion", "layers", "part", "budget"),
        "block_size",
        components={"required": False, "default": ("und", "gen")},
        axes="what is pruned, comma-separated: depth, width, heads",
        criterion={"choices": tuple(CRITERIA), "help": "what ranks the neurons"},
    )
    add_options(
        swept, StatisticsConfig, "time_ranges=num_time_ranges", num_time_ranges={"default": 8}
    )
    add_flags(
        swept,
        "--stats [TASK=]FILE...  statistics of neurons from an earlier run, instead of new "
        "ones (repeatable)",
    )
    measured = parser.add_argument_group("what it is measured on")
    add_flags(
        measured,
        """
        --prompts [TASK=]FILE...  a prompt a line, or .jsonl with prompt, source, image and answer
                                  (repeatable; default: built-in prompts)
        --images [TASK=]DIR...    images, one per prompt in the order of their names: what
                                  generation should lead to, what editing and understanding start
                                  from; of .jsonl, where its files are
        """,
    )
    _add_settings(measured, "batch_size")
    add_options(measured, SweepConfig, "seed", seed="of noise and of random choices")
    _add_measures(parser.add_argument_group("what is measured"))


def _add_measures(group: Any) -> None:
    add_flags(
        group,
        """
        --evaluator MODULE:FUNCTION...  more metrics: a function from the pipeline to numbers by
                                        name (repeatable); a file may be named instead of a module
        --geneval FILE.jsonl            GenEval metadata: write its images for every point of
                                        generation, in the folders that the official scorer reads
        """,
    )
    group.add_argument("--geneval-images", type=positive, default=4, help="per prompt (default 4)")
    add_flags(
        group,
        "--geneval-scorer MODULE:FUNCTION  a function from such a folder to numbers by name",
    )
    add_options(group, SweepConfig, "repeats")
    add_flags(group, "--no-plots  draw no plots")


@_in_a_folder
def _analyze(options: argparse.Namespace, drawn: Path) -> Output:
    if options.geneval_scorer and not options.geneval:
        raise Usage("analyze: --geneval-scorer must come with --geneval, got none")
    if not options.no_plots:
        optional("matplotlib", "plot", purpose="plots (or --no-plots)")
    counted = StatisticsConfig(**arguments(StatisticsConfig, options))
    config = SweepConfig(**arguments(SweepConfig, options, statistics=counted))
    files = {task: _of_task(options.stats, task, "--stats") for task in options.task}
    statistics = {task: FfnStatistics.load(file) for task, file in files.items() if file}
    settings = Settings(**arguments(Settings, options))
    samples = {}
    for task in options.task:
        prompts = _of_task(options.prompts, task, "--prompts")
        images = _of_task(options.images, task, "--images")
        samples[task] = _read_samples(options, Task(task), drawn, prompts, images)
    more = {name: load_evaluator(name) for name in options.evaluator}
    pipeline = load_pipeline(options)
    probes = [_probe(options, pipeline, t, samples[t], settings, more) for t in options.task]
    description = {
        "model": hash_model(pipeline.model),
        "device": pipeline.model.device.type,
        "statistics": {task: found.samples for task, found in statistics.items()},
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
    }
    with show_progress(options, "analyze", "point") as progress:
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
        write_plots(result, Path(options.out) / "plots")
    text = f"{result.to_text()}\n\n{options.out}/report.md"
    return Output(text=text, document=result.to_dict())


def _of_task(given: Sequence[str], task: str, option: str) -> str | None:
    """Returns the value of `TASK=VALUE` for a task, or else that of a plain VALUE."""
    own = [v.partition("=")[2] for v in given if v.partition("=")[0] == task and "=" in v]
    plain = [v for v in given if v.partition("=")[0] not in TASKS or "=" not in v]
    if len(own) > 1 or len(plain) > 1:
        raise Usage(f"analyze: {option} must be given once for {task}, got {', '.join(given)}")
    return next(iter(own or plain), None)


def _probe(
    options: argparse.Namespace,
    pipeline: BagelPipeline,
    task: str,
    samples: list[Sample],
    settings: Any,
    more: dict[str, Any],
) -> Any:
    own = dict(more)
    if options.geneval and task == "generation":
        scorer: Any = options.geneval_scorer and load_evaluator(options.geneval_scorer)
        own["geneval"] = GenEvalImages(
            read_metadata(options.geneval),
            Path(options.out) / "geneval",
            num_images=options.geneval_images,
            seed=options.seed,
            settings=settings,
            scorer=scorer or None,
        )
    return bagel_probe(pipeline, Task(task), samples, settings, evaluators=own)


ANALYZE = Command(
    description="""\
Makes MODEL smaller in memory, point by point, and measures each: its components (und, gen) along
its axes (depth, width, heads) at every ratio that is kept, on every task. OUT gets report.md,
results.json and plots. A run that was interrupted goes on when it is started again.""",
    add=_add_analyze,
    run=_analyze,
)
