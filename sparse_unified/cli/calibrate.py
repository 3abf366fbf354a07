# SPDX-License-Identifier: Apache-2.0
"""calibrate: what the neurons of a model do on a task."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage, add_common, check_output, write_result
from sparse_unified.cli.models import add_model, load_pipeline

if TYPE_CHECKING:
    from sparse_unified.analysis import FfnStatistics
    from sparse_unified.analysis.samples import Sample, Task

_DESCRIPTION = """\
Runs MODEL on samples of a task and writes what its FFN neurons did: mean |h|, firing, and the
active neurons of each sample, per component, layer and range of the denoising time. With --scores
it also writes the importance of the neurons, as convert and prune take it."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "calibrate", help="gather statistics of the neurons on a task", description=_DESCRIPTION
    )
    add_model(parser)
    parser.add_argument("--task", required=True, choices=("generation", "understanding", "editing"))
    parser.add_argument(
        "--out", required=True, metavar="FILE.safetensors", help="where the statistics go"
    )
    parser.add_argument(
        "--component", choices=("und", "gen"), help="whose FFNs are looked at (default both)"
    )
    parser.add_argument(
        "--merge",
        action="append",
        default=[],
        metavar="FILE",
        help="statistics of the same model, of other samples or tasks, to be added (repeatable)",
    )
    _add_samples(parser.add_argument_group("samples"))
    _add_config(parser.add_argument_group("what is counted"))
    _add_scores(parser.add_argument_group("scores"))
    add_common(parser)
    parser.set_defaults(run=_run_calibrate)


def _add_samples(group: Any) -> None:
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, or .jsonl with prompt and source (default: built-in prompts)",
    )
    group.add_argument(
        "--images",
        metavar="DIR",
        help="pictures, one per prompt in the order of their names, that editing and understanding "
        "start from; of .jsonl, where its files are",
    )
    group.add_argument("--samples", type=values.positive, metavar="N", help="the first N prompts")
    group.add_argument(
        "--seed",
        type=values.seed,
        default=0,
        help="of the noise, counted up from sample to sample, and of random scores (default 0)",
    )
    group.add_argument(
        "--size", type=values.size, metavar="HxW", help="of generated images in pixels"
    )
    group.add_argument(
        "--steps", type=values.positive, default=25, help="timesteps of a generation (default 25)"
    )
    group.add_argument(
        "--max-tokens", type=values.positive, default=64, help="of an answer (default 64)"
    )


def _add_config(group: Any) -> None:
    group.add_argument(
        "--threshold", type=float, default=0.1, help="a neuron fires above this |h| (default 0.1)"
    )
    group.add_argument(
        "--active-fraction",
        type=float,
        default=0.25,
        help="share of the neurons that are the active ones of a sample (default 0.25)",
    )
    group.add_argument(
        "--time-ranges",
        type=values.positive,
        default=4,
        help="into how many the times of denoising are cut (default 4)",
    )
    group.add_argument(
        "--inputs",
        type=values.positive,
        default=0,
        metavar="N",
        help="keep what each FFN was given on N tokens drawn at random, for convert --partition "
        "coactivation and --router-init activation; 512 are plenty (default: none)",
    )


def _add_scores(group: Any) -> None:
    group.add_argument("--scores", metavar="FILE.safetensors", help="write scores there")
    group.add_argument(
        "--criterion",
        choices=("activation", "wanda", "magnitude", "random", "reference"),
        help="what they are: mean |h| (activation); that times the norm of the down_proj column "
        "(wanda, the default); of the weights alone (magnitude); drawn (random); the official "
        "score with its fault (reference)",
    )


def _run_calibrate(options: argparse.Namespace) -> int:
    with TemporaryDirectory() as drawn:
        return _calibrate(options, Path(drawn))


def _calibrate(options: argparse.Namespace, drawn: Path) -> int:
    from sparse_unified.analysis import FfnStatistics, StatisticsConfig, save_scores, score
    from sparse_unified.analysis.calibrate import calibrate
    from sparse_unified.analysis.metrics import Settings
    from sparse_unified.analysis.samples import Task

    if options.criterion and not options.scores:
        raise Usage("calibrate: --criterion must come with --scores, got none")
    for option in ("out", "scores", "json"):
        check_output(getattr(options, option), f"--{option}")
    config = StatisticsConfig(
        threshold=options.threshold,
        active_fraction=options.active_fraction,
        num_time_ranges=options.time_ranges,
        num_inputs=options.inputs,
    )
    settings = Settings(
        size=options.size, num_timesteps=options.steps, max_length=options.max_tokens
    )
    task = Task(options.task)
    samples = _read_samples(options, task, drawn)
    earlier = [FfnStatistics.load(path) for path in options.merge]
    components = None if options.component is None else [options.component]
    pipeline = load_pipeline(options)
    for statistics in earlier:
        statistics.check(pipeline)
    with _samples_bar(quiet=options.quiet) as progress:
        found = calibrate(
            pipeline,
            task,
            samples,
            settings=settings,
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
    facts = _facts(options, found)
    write_result(options.json, _text(facts), json.dumps(facts, indent=2))
    return 0


def _read_samples(options: argparse.Namespace, task: Task, drawn: Path) -> list[Sample]:
    from sparse_unified.analysis.samples import built_in_samples, read_samples

    if options.prompts is None:
        if options.images is not None:
            raise Usage("calibrate: --images must come with --prompts, got none")
        return built_in_samples(task, options.samples, options.seed, folder=drawn)
    return read_samples(options.prompts, options.images, task, options.samples, options.seed)


def _facts(options: argparse.Namespace, statistics: FfnStatistics) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task in statistics.tasks:
        components = {}
        for component, keyed in statistics.ffns[task].items():
            tokens = sum(int(sums.tokens.sum()) for sums in keyed.values())
            fired = sum(
                float(sums.num_fired.sum()) / sums.intermediate_size for sums in keyed.values()
            )
            overlap = statistics.sample_overlap(task, component)
            overlap = overlap[~overlap.isnan()]
            components[component] = {
                "ffns": len(keyed),
                "tokens": tokens // len(keyed),
                "firing_rate": fired / tokens if tokens else None,
                "sample_overlap": float(overlap.mean()) if len(overlap) else None,
            }
        tasks[task] = {"samples": len(statistics.samples[task]), "components": components}
    return {
        "model": options.model,
        "model_hashes": dict(statistics.model_hashes),
        "statistics": options.out,
        "scores": options.scores,
        "tasks": tasks,
    }


def _text(facts: dict[str, Any]) -> str:
    lines = []
    for task, own in facts["tasks"].items():
        lines.append(f"{task}: {own['samples']} samples")
        for component, found in own["components"].items():
            line = f"  {component}  {found['ffns']} FFNs, {found['tokens']} tokens each"
            if found["firing_rate"] is not None:
                line += f", {found['firing_rate']:.1%} fire"
            if found["sample_overlap"] is not None:
                line += f", overlap of samples {found['sample_overlap']:.2f}"
            lines.append(line)
    return "\n".join([*lines, *(path for path in (facts["statistics"], facts["scores"]) if path)])


@contextmanager
def _samples_bar(*, quiet: bool) -> Iterator[Callable[[int, int], object] | None]:
    """Yields a callback (done, total) that moves a bar on a terminal's stderr."""
    if quiet or importlib.util.find_spec("tqdm") is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="calibrate", unit="sample", file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.refresh()

        yield advance
