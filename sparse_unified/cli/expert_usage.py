# SPDX-License-Identifier: Apache-2.0
"""expert-usage: which experts the tokens of a task choose."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_unified.cli.console import Usage, add_common, check_output, show_progress, write_result
from sparse_unified.cli.models import add_model, load_pipeline
from sparse_unified.cli.samples import (
    TASKS,
    add_samples,
    add_time_ranges,
    read_samples_of,
    read_settings,
)

_DESCRIPTION = """\
Runs the sparse MODEL on samples of a task and counts which experts its tokens choose: load and its
entropy per component and layer, experts that no token uses, and how the load moves over the times
of denoising. MODEL must have sparse FFNs."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "expert-usage", help="count which experts a task uses", description=_DESCRIPTION
    )
    add_model(parser)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument(
        "--component", choices=("und", "gen"), help="whose sparse FFNs are counted (default both)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw load and change there")
    group = parser.add_argument_group("samples")
    add_samples(group)
    add_time_ranges(group)
    add_common(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with TemporaryDirectory() as drawn:
        return _count(options, Path(drawn))


def _count(options: argparse.Namespace, drawn: Path) -> int:
    from sparse_unified.analysis import expert_usage, write_usage_plot
    from sparse_unified.analysis.samples import Task
    from sparse_unified.surgery.sparse_blocks import find_sparse_blocks

    for option in ("plot", "json"):
        check_output(getattr(options, option), f"--{option}")
    if options.plot is not None and not options.plot.lower().endswith(".png"):
        raise Usage(f"expert-usage: --plot must end in .png, got {options.plot!r}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "expert-usage: matplotlib must be installed for --plot "
            "(pip install 'sparse_unified[plot]'), got none"
        )
    task = Task(options.task)
    samples = read_samples_of(options, task, drawn, command="expert-usage")
    components = None if options.component is None else [options.component]
    pipeline = load_pipeline(options)
    find_sparse_blocks(pipeline, components, where=f"expert-usage: {options.model}")
    with show_progress("expert-usage", "sample", quiet=options.quiet) as progress:
        usage = expert_usage(
            pipeline,
            task,
            samples,
            settings=read_settings(options),
            num_time_ranges=options.time_ranges,
            components=components,
            progress=progress,
        )
    if options.plot is not None:
        write_usage_plot(usage, options.plot)
    write_result(options.json, usage.to_text(), usage.to_json())
    return 0
