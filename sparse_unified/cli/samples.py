# SPDX-License-Identifier: Apache-2.0
"""What the commands that run a model on samples share: which, how, and a bar that counts them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage

if TYPE_CHECKING:
    from sparse_unified.analysis.metrics import Settings
    from sparse_unified.analysis.samples import Sample, Task

TASKS = ("generation", "understanding", "editing")


def add_samples(group: Any) -> None:
    """Adds the options that say what the model is given, and how it runs."""
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
    add_settings(group)


def add_settings(group: Any) -> None:
    """Adds the options that say how many samples there are, and how the model runs on them."""
    group.add_argument("--samples", type=values.positive, metavar="N", help="the first N prompts")
    group.add_argument(
        "--seed",
        type=values.seed,
        default=0,
        help="of the noise, counted up from sample to sample, and of random choices (default 0)",
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


def add_time_ranges(group: Any) -> None:
    """Adds the option that cuts the times of denoising."""
    group.add_argument(
        "--time-ranges",
        type=values.positive,
        default=4,
        help="into how many the times of denoising are cut (default 4)",
    )


def read_settings(options: argparse.Namespace) -> Settings:
    """Returns how the model runs."""
    from sparse_unified.analysis.metrics import Settings

    return Settings(size=options.size, num_timesteps=options.steps, max_length=options.max_tokens)


def read_samples_of(
    options: argparse.Namespace, task: Task, drawn: Path, *, command: str
) -> list[Sample]:
    """Reads the samples of a task; Usage and ValueError say what is wrong with them.

    Args:
        drawn: where the pictures of built-in samples go.
    """
    from sparse_unified.analysis.samples import built_in_samples, read_samples

    if options.prompts is None:
        if options.images is not None:
            raise Usage(f"{command}: --images must come with --prompts, got none")
        return built_in_samples(task, options.samples, options.seed, folder=drawn)
    return read_samples(options.prompts, options.images, task, options.samples, options.seed)
