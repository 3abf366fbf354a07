# SPDX-License-Identifier: Apache-2.0
"""How a command loads and runs its model: what of it, where, in how many bits, compiled or not."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage


def add_placement(parser: argparse.ArgumentParser, *, tasks: bool) -> None:
    """Adds what `from_pretrained` takes for small GPUs.

    Args:
        tasks: the command draws images, so that parts of the model may be left out.
    """
    group = parser.add_argument_group(
        "small GPUs", "what fits where: sparse-unified info MODEL --memory"
    )
    if tasks:
        group.add_argument(
            "--task",
            choices=("all", "edit", "image"),
            default="all",
            help="load what images need and no more: image from texts, edit from pictures too",
        )
    group.add_argument(
        "--offload",
        choices=("none", "und"),
        default="none",
        help="und: understanding FFNs stay in host memory",
    )
    group.add_argument(
        "--storage",
        type=values.storage,
        metavar="KIND",
        help="FFN weights in 8 bits: int8, fp8, or by component und=int8,gen=fp8",
    )
    group.add_argument(
        "--device-map",
        type=values.device_map,
        metavar="MAP",
        help="auto, or MODULE=DEVICE,...: where decoder layers go, by accelerate",
    )
    group.add_argument(
        "--max-memory",
        type=values.max_memory,
        metavar="DEVICE=SIZE,...",
        help="with --device-map auto, such as 0=20GiB,cpu=60GiB",
    )
    group.add_argument("--offload-folder", metavar="DIR", help="for layers that a map puts on disk")
    if not tasks:
        return
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--compile",
        nargs="?",
        const=True,
        default=False,
        choices=(True, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        metavar="MODE",
        help="compile the denoising step as one graph, in a mode of torch.compile",
    )
    speed.add_argument(
        "--cuda-graphs", action="store_true", help="record the denoising step and replay it"
    )


def placement_options(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what `add_placement` parsed, as arguments of `from_pretrained`.

    Raises:
        Usage: the options do not go together.
    """
    if "offload" not in options:
        return {}
    task = getattr(options, "task", "all")
    if task == "image" and getattr(options, "image", None):
        raise Usage("generate: --task must be edit or all with --image, got image")
    if task != "all" and getattr(options, "think", False):
        raise Usage(f"generate: --task must be all with --think, got {task}")
    if options.device_map is None and (options.max_memory or options.offload_folder):
        given = "--max-memory" if options.max_memory else "--offload-folder"
        raise Usage(f"{given} must come with --device-map, got none")
    if options.device_map is not None and (options.storage or options.offload != "none"):
        given = "--storage" if options.storage else "--offload"
        raise Usage(f"--device-map must come without {given}, got both")
    return {
        "task": task,
        "offload": options.offload,
        "storage": options.storage,
        "device_map": options.device_map,
        "max_memory": options.max_memory,
        "offload_folder": options.offload_folder,
        "compile": getattr(options, "compile", False),
        "cuda_graphs": getattr(options, "cuda_graphs", False),
    }
