# SPDX-License-Identifier: Apache-2.0
"""calibrate: what the neurons of a model do on a task."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage, add_common, check_output, show_progress, write_result
from sparse_unified.cli.models import add_model, load_pipeline
from sparse_unified.cli.samples import (
    TASKS,
    add_samples,
    add_time_ranges,
    read_samples_of,
    read_settings,
)

if TYPE_CHECKING:
    from sparse_unified.analysis import FfnStatistics

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
    parser.add_argument("--task", required=True, choices=TASKS)
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
    add_samples(parser.add_argument_group("samples"))
    _add_config(parser.add_argument_group("what is counted"))
    _add_scores(parser.add_argument_group("scores"))
    add_common(parser)
    parser.set_defaults(run=_run_calibrate)


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
    add_time_ranges(group)
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
    task = Task(options.task)
    samples = read_samples_of(options, task, drawn, command="calibrate")
    earlier = [FfnStatistics.load(path) for path in options.merge]
    components = None if options.component is None else [options.component]
    pipeline = load_pipeline(options)
    for statistics in earlier:
        statistics.check(pipeline)
    with show_progress("calibrate", "sample", quiet=options.quiet) as progress:
        found = calibrate(
            pipeline,
            task,
            samples,
            settings=read_settings(options),
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
