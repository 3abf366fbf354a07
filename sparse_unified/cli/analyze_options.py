# SPDX-License-Identifier: Apache-2.0
"""The options of analyze."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_unified.cli import values
from sparse_unified.cli.console import add_common
from sparse_unified.cli.models import add_model
from sparse_unified.cli.samples import add_settings

TASKS = ("generation", "understanding", "editing")
_DESCRIPTION = """\
Makes MODEL smaller in memory, point by point, and measures each: its components (und, gen) along
its axes (depth, width, heads) at every ratio that is kept, on every task. OUT gets report.md,
results.json and pictures. A run that was interrupted goes on when it is started again."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command and its options; the caller says what runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "analyze", help="measure what a model can do without", description=_DESCRIPTION
    )
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--task",
        required=True,
        type=values.names(*TASKS),
        metavar="TASKS",
        help=f"comma-separated: {', '.join(TASKS)}",
    )
    what = parser.add_argument_group("what is swept")
    what.add_argument(
        "--component", type=values.listed, default=("und", "gen"), help="default und,gen"
    )
    what.add_argument(
        "--axis",
        type=values.names("depth", "width", "heads"),
        default=("depth", "width"),
        help="comma-separated: depth, width, heads (default depth,width)",
    )
    what.add_argument(
        "--ratios",
        type=values.ratios,
        default=(0.25, 0.5, 0.75),
        help="shares that are kept, above 0 and at most 1 (default .25,.5,.75)",
    )
    what.add_argument(
        "--criterion",
        choices=("activation", "wanda", "magnitude", "random", "reference"),
        default="activation",
        help="what ranks the neurons (default activation: mean |h| on the samples)",
    )
    what.add_argument(
        "--stats",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="statistics of neurons from an earlier run, instead of new ones (repeatable)",
    )
    what.add_argument(
        "--time-ranges",
        type=values.positive,
        default=8,
        help="into how many the times of denoising are cut in statistics (default 8)",
    )
    what.add_argument(
        "--layers", default="all", help="that may lose something: all (default), middle, 1-26, ..."
    )
    what.add_argument(
        "--part",
        choices=("block", "attention", "ffn"),
        default="block",
        help="what a skipped layer loses (default block: all of it)",
    )
    what.add_argument(
        "--budget",
        choices=("uniform", "global"),
        default="uniform",
        help="each layer keeps the ratio (default), or all of them together",
    )
    what.add_argument(
        "--block-size",
        type=values.positive,
        default=1,
        help="neurons that stay or go together: 1 (default), or 16 to 128",
    )
    _add_samples(parser.add_argument_group("what it is measured on"))
    _add_measures(parser.add_argument_group("what is measured"))
    add_common(parser)
    return parser


def _add_samples(group: Any) -> None:
    group.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="a prompt a line, or .jsonl with prompt, source, image and answer (repeatable; "
        "default: built-in prompts)",
    )
    group.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[TASK=]DIR",
        help="pictures, one per prompt in the order of their names: what generation should lead "
        "to, what editing and understanding start from; of .jsonl, where its files are",
    )
    add_settings(group)
    group.add_argument(
        "--batch-size",
        type=values.positive,
        default=4,
        help="most images computed together (default 4)",
    )


def _add_measures(group: Any) -> None:
    group.add_argument(
        "--evaluator",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="more metrics: a function from the pipeline to numbers by name (repeatable); a file "
        "may be named instead of a module",
    )
    group.add_argument(
        "--geneval",
        metavar="FILE.jsonl",
        help="GenEval metadata: write its images for every point of generation, in the folders "
        "that the official scorer reads",
    )
    group.add_argument(
        "--geneval-images", type=values.positive, default=4, help="per prompt (default 4)"
    )
    group.add_argument(
        "--geneval-scorer",
        metavar="MODULE:FUNCTION",
        help="a function from such a folder to numbers by name",
    )
    group.add_argument(
        "--repeats", type=values.positive, default=5, help="timed forwards per point (default 5)"
    )
    group.add_argument("--no-plots", action="store_true", help="draw no pictures")
