# SPDX-License-Identifier: Apache-2.0
"""calibrate, analyze, evaluate and expert-usage: what models do on samples of a task."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparse_unified import analysis
from sparse_unified._common import Report, context, optional
from sparse_unified.analysis import FfnStatistics, Task
from sparse_unified.analysis.bagel_task import (
    GUIDANCE,
    GenEval,
    GenEvalImages,
    read_metadata,
    settings_in_words,
)
from sparse_unified.analysis.evaluate import Evaluation, evaluate
from sparse_unified.analysis.evaluators import load_evaluator
from sparse_unified.analysis.plots import write_usage_plot
from sparse_unified.analysis.statistics import hash_model
from sparse_unified.cli.console import Output, Usage, show_progress
from sparse_unified.cli.generate import add_model, add_top_k, check_device, load_pipeline
from sparse_unified.cli.options import Flags, arguments, dtype_of, names
from sparse_unified.surgery.decoder import find_sparse_blocks

TASKS = tuple(task.value for task in Task)


def _add_settings(flags: Flags, more: str = "") -> None:
    """Adds how many samples there are, and how the model runs on them."""
    flags.table("--samples N  the first N prompts")
    own = ("size", "steps=num_timesteps", "max_tokens=max_length", *more.split())
    flags.of(analysis.Settings, " ".join([*own, *GUIDANCE]))
    flags.of(analysis.SweepConfig, "seed", seed="of noise and of random choices")


def add_shard(flags: Flags) -> None:
    """Adds which part of a run this process computes."""
    flags.table("""
        --shard I/N  compute every N-th part from the I-th on, counted from 0; processes share
                     --out, or what they wrote in it is copied together (default: that of torchrun)
        """)


def shard_of(options: argparse.Namespace) -> tuple[int, int]:
    """Returns the shard asked for, or that of torchrun, each of whose processes has its device."""
    if options.shard is not None:
        return options.shard
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and options.device == "cuda":
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return int(os.environ.get("RANK", "0")), count


def _add_samples(flags: Flags) -> None:
    """Adds the task of a command with one, its samples, and how the model runs on them."""
    flags.table(f"""
        --task {"|".join(TASKS)}!  what the model does
        --component und|gen  whose FFNs are looked at (default both)
        """)
    group = flags.group("samples")
    group.table("""
        --prompts FILE  a prompt a line, or .jsonl with prompt and source (default: built-in
                        prompts)
        --images DIR    images, one per prompt in the order of their names, that editing and
                        understanding start from; of .jsonl, where its files are
        """)
    _add_settings(group)
    group.of(analysis.StatisticsConfig, "time_ranges=num_time_ranges")


@contextmanager
def _samples(options: argparse.Namespace) -> Iterator[dict[str, list[analysis.Sample]]]:
    """Reads the samples of each task; images of built-in ones stay for as long as the block."""
    with TemporaryDirectory() as folder:
        found = {}
        for task in [options.task] if isinstance(options.task, str) else options.task:
            prompts = _of_task(options.prompts, task, "--prompts")
            images = _of_task(options.images, task, "--images")
            how: tuple[Any, ...] = (Task(task), options.samples, options.seed)
            if prompts is not None:
                found[task] = analysis.read_samples(prompts, images, *how)
            elif images is not None:
                raise Usage(f"--images must come with --prompts for {task}, got none")
            else:
                found[task] = analysis.built_in_samples(*how, folder=folder)
        yield found


def _of_task(given: str | Sequence[str] | None, task: str, option: str) -> str | None:
    """Returns the value of `TASK=VALUE` for a task, or else that of a plain VALUE."""
    if given is None or isinstance(given, str):
        return given
    own = [text.removeprefix(f"{task}=") for text in given if text.startswith(f"{task}=")]
    plain = [text for text in given if not text.startswith(tuple(f"{name}=" for name in TASKS))]
    if len(own) > 1 or len(plain) > 1:
        raise Usage(f"analyze: {option} must be given once for {task}, got {', '.join(given)}")
    return next(iter(own or plain), None)


def _observed(options: argparse.Namespace, pipeline: Any, samples: Any, progress: Any) -> Any:
    """Returns the arguments that `calibrate` and `expert_usage` share."""
    return {
        "model": pipeline,
        "task": options.task,
        "samples": samples[options.task],
        "settings": analysis.Settings(**arguments(analysis.Settings, options)),
        "components": options.component and [options.component],
        "progress": progress,
    }


# calibrate


def add_calibrate(flags: Flags) -> None:
    add_model(flags)
    flags.parser.set_defaults(outputs=("out", "scores"))
    flags.table("""
        --out FILE.safetensors!  where the statistics go
        --merge FILE...          statistics of the same model, of other samples or tasks, to be
                                 added (repeatable)
        """)
    _add_samples(flags)
    flags.group("what is counted").of(
        analysis.StatisticsConfig,
        "threshold active_fraction inputs=num_inputs",
        num_inputs="keep what each FFN was given on N tokens drawn at random, for convert "
        "--partition coactivation and --router-init activation; 512 are plenty (default: none)",
    )
    flags.group("scores").table(f"""
        --scores FILE.safetensors  write scores there
        --criterion {"|".join(analysis.CRITERIA)}  what they are: mean |h| (activation); that times
                     the norm of the down_proj column (wanda, the default); of the weights alone
                     (magnitude); drawn (random); the official score with its fault (reference)
        """)


def run_calibrate(options: argparse.Namespace) -> Report:
    """Runs MODEL on samples of a task and writes what its FFN neurons did.

    That is mean |h|, firing, and the active neurons of each sample, per component, layer and range
    of the denoising time. With --scores it also writes the importance of the neurons, as convert
    and prune take it.
    """
    if options.criterion and not options.scores:
        raise Usage("calibrate: --criterion must come with --scores, got none")
    config = analysis.StatisticsConfig(**arguments(analysis.StatisticsConfig, options))
    with _samples(options) as samples, show_progress(options, "calibrate", "sample") as progress:
        earlier = [FfnStatistics.load(path) for path in options.merge]
        pipeline = load_pipeline(options)
        for statistics in earlier:
            statistics.check(pipeline)
        given = _observed(options, pipeline, samples, progress)
        with analysis.measure_similarity(pipeline, given["components"]) as measured:
            found = analysis.calibrate(**given, config=config).merge(*earlier)
    found.save(options.out)
    if options.scores:
        criterion, components = options.criterion or "wanda", given["components"]
        scores = analysis.score(
            criterion, pipeline, found, components=components, seed=options.seed
        )
        similarity = measured.result()
        analysis.save_scores(
            options.scores,
            scores,
            criterion=criterion,
            statistics=found,
            model=pipeline,
            similarity=similarity,
        )
    lines = [f"sampled with {settings_in_words(given['settings'].stated())}"]
    tasks = {}
    for task, own in found.samples.items():
        totals = {name: _totals(found, task, name) for name in found.components(task)}
        tasks[task] = {"samples": len(own), "components": totals}
        lines.append(f"{task}: {len(own)} samples")
        for name, values in totals.items():
            numbers = [f"{key} {value:.4g}" for key, value in values.items() if value is not None]
            lines.append(f"  {name}  {', '.join(numbers)}".replace("_", " "))
    document = {
        "model": options.model,
        "model_hashes": dict(found.model_hashes),
        "statistics": options.out,
        "scores": options.scores,
        "tasks": tasks,
    }
    lines += [path for path in (options.out, options.scores) if path]
    return Output(text="\n".join(lines), document=document)


def _totals(statistics: FfnStatistics, task: str, component: str) -> dict[str, Any]:
    """Returns the number of FFNs, tokens of each, and means over them; None without any."""
    listed = list(statistics.of(task, component).values())
    tokens = sum(int(sums.tokens.sum()) for sums in listed)
    fired = sum(float(sums.num_fired.mean(1).sum()) for sums in listed)
    overlap = torch.stack([sums.sample_overlap() for sums in listed]).nanmean()
    return {
        "ffns": len(listed),
        "tokens": tokens // len(listed),
        "firing_rate": fired / tokens if tokens else None,
        "sample_overlap": None if overlap.isnan() else float(overlap),
    }


# expert-usage


def add_expert_usage(flags: Flags) -> None:
    add_model(flags)
    flags.parser.set_defaults(outputs=("plot",))
    _add_samples(flags)
    flags.table("--plot FILE.png  draw load and change there")


def run_expert_usage(options: argparse.Namespace) -> Report:
    """Runs the sparse MODEL on samples of a task and counts which experts its tokens choose.

    That is load and its entropy per component and layer, experts that no token uses, and how the
    load moves over the times of denoising. MODEL must have sparse FFNs.
    """
    if options.plot is not None:
        if not options.plot.lower().endswith(".png"):
            raise Usage(f"expert-usage: --plot must end in .png, got {options.plot!r}")
        optional("matplotlib", "plot", purpose="--plot")
    with _samples(options) as samples, show_progress(options, "expert-usage", "sample") as progress:
        pipeline = load_pipeline(options)
        given = _observed(options, pipeline, samples, progress)
        with context(f"expert-usage: {options.model}"):
            find_sparse_blocks(pipeline, given["components"])
        usage = analysis.expert_usage(**given, num_time_ranges=options.num_time_ranges)
    if options.plot is not None:
        write_usage_plot(usage, options.plot)
    return usage


# What evaluate and analyze measure on, and by


def _add_measured(flags: Flags) -> None:
    measured = flags.group("what it is measured on")
    measured.table("""
        --prompts [TASK=]FILE...  a prompt a line, or .jsonl with prompt, source, image and answer
                                  (repeatable; default: built-in prompts)
        --images [TASK=]DIR...    images, one per prompt in the order of their names: what
                                  generation should lead to, what editing and understanding start
                                  from; of .jsonl, where its files are
        """)
    _add_settings(measured, "batch_size")
    add_shard(measured)


def _add_metrics(flags: Flags, each: str) -> Flags:
    group = flags.group("what is measured")
    group.table(f"""
        --evaluator MODULE:FUNCTION...     more metrics: a function from the pipeline to numbers by
                                           name (repeatable); a file may be named instead of a
                                           module
        --geneval FILE.jsonl               GenEval metadata: write its images for every {each}, in
                                           the folders that the official scorer reads
        --geneval-scorer MODULE:FUNCTION   a function from such a folder to numbers by name
        --geneval-images N                 per prompt (default 4)
        """)
    return group


def _geneval(options: argparse.Namespace) -> GenEval | None:
    if not options.geneval:
        if options.geneval_scorer:
            raise Usage("--geneval-scorer must come with --geneval, got none")
        return None
    scorer = load_evaluator(options.geneval_scorer) if options.geneval_scorer else None
    return GenEval(
        metadata=read_metadata(options.geneval),
        num_images=options.geneval_images,
        seed=options.seed,
        scorer=scorer,
    )


# evaluate


def add_evaluate(flags: Flags) -> None:
    add_model(flags, "MODEL...")
    flags.table(
        f"""
        --out DIR!       folder of the results
        --reference DIR  the model that distances and agreement are taken from, a dense one
        --task TASKS     comma-separated: {", ".join(TASKS)}; without it, --geneval alone
        """,
        task={"type": names(*TASKS), "default": ()},
    )
    _add_measured(flags)
    add_top_k(flags)
    _add_metrics(flags, "model")


def run_evaluate(options: argparse.Namespace) -> Evaluation:
    """Runs each MODEL on the same prompts with the same noise and puts them side by side.

    Distances to the reference, velocity error, perplexity, right answers, GenEval, seconds and
    active parameters: OUT gets results.json, report.md, a collage of images and answers.jsonl. A
    run that was interrupted goes on when it is started again. Under torchrun, or with --shard, the
    samples are shared out over processes.
    """
    check_device(options.device, "--device")
    geneval = _geneval(options)
    with _samples(options) as samples, show_progress(options, "evaluate", "sample") as progress:
        return evaluate(
            options.model,
            options.out,
            samples,
            reference=options.reference,
            settings=analysis.Settings(**arguments(analysis.Settings, options)),
            evaluators={name: load_evaluator(name) for name in options.evaluator},
            geneval=geneval,
            shard=shard_of(options),
            device=options.device,
            dtype=dtype_of(options.dtype),
            progress=progress,
        )


# analyze


def add_swept(flags: Flags) -> None:
    """Adds along which axes, and how, a model is made smaller."""
    flags.of(
        analysis.SweepConfig,
        "axis=axes ratios criterion layers part budget block_size",
        axes="what is pruned, comma-separated: depth, width, heads",
        criterion={"choices": tuple(analysis.CRITERIA), "help": "what ranks the neurons"},
    )


def add_analyze(flags: Flags) -> None:
    add_model(flags)
    flags.table(
        f"""
        --out DIR!     folder of the results
        --task TASKS!  comma-separated: {", ".join(TASKS)}
        """,
        task={"type": names(*TASKS)},
    )
    swept = flags.group("what is swept")
    both = {"required": False, "default": ("und", "gen")}
    swept.of(analysis.SweepConfig, "component=components", components=both)
    add_swept(swept)
    ranges = "time_ranges=num_time_ranges"
    swept.of(analysis.StatisticsConfig, ranges, num_time_ranges={"default": 8})
    swept.table("""
        --stats [TASK=]FILE...  statistics of neurons from an earlier run, instead of new ones
                                (repeatable)
        """)
    _add_measured(flags)
    group = _add_metrics(flags, "point of generation")
    group.table("--no-plots  draw no plots")
    group.of(analysis.SweepConfig, "repeats")


def run_analyze(options: argparse.Namespace) -> Report:
    """Makes MODEL smaller in memory, point by point, and measures each point.

    Its components (und, gen) are pruned along its axes (depth, width, heads) at every ratio that is
    kept, on every task. OUT gets report.md, results.json and plots. A run that was interrupted goes
    on when it is started again.
    """
    geneval = _geneval(options)
    if not options.no_plots:
        optional("matplotlib", "plot", purpose="plots (or --no-plots)")
    counted = analysis.StatisticsConfig(**arguments(analysis.StatisticsConfig, options))
    config = analysis.SweepConfig(**arguments(analysis.SweepConfig, options, statistics=counted))
    files = {task: _of_task(options.stats, task, "--stats") for task in options.task}
    statistics = {task: FfnStatistics.load(file) for task, file in files.items() if file}
    settings = analysis.Settings(**arguments(analysis.Settings, options))
    evaluators: dict[str, Any] = {name: load_evaluator(name) for name in options.evaluator}
    drawn = dict(evaluators)  # of generation
    if geneval is not None:
        drawn["geneval"] = GenEvalImages(geneval, Path(options.out) / "geneval", settings)
    part = shard_of(options)
    with _samples(options) as samples, show_progress(options, "analyze", "point") as progress:
        pipeline = load_pipeline(options)
        probes = []
        for task, own in samples.items():
            more = drawn if task == "generation" else evaluators
            probes.append(
                analysis.bagel_probe(pipeline, Task(task), own, settings, evaluators=more)
            )
        description = {
            "model": hash_model(pipeline.model),
            "device": pipeline.model.device.type,
            "statistics": {task: found.samples for task, found in statistics.items()},
            "dtype": str(pipeline.model.dtype).removeprefix("torch."),
            **({"geneval": geneval.stated()} if geneval is not None else {}),
        }
        shared: Any = {"statistics": statistics, "description": description, "progress": progress}
        shared["shard"] = part
        result = analysis.run_sweep(pipeline, probes, config, options.out, **shared)
    if not options.no_plots:
        analysis.write_plots(result, Path(options.out) / "plots")
    return result
