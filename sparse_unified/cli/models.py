# SPDX-License-Identifier: Apache-2.0
"""What the commands that run a model share: which one, where, and pictures from files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sparse_unified.cli.placement import placement_options

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from sparse_unified.bagel import BagelPipeline


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its dtype and its device."""
    parser.add_argument("model", metavar="MODEL", help="a model directory or a hub id owner/name")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and computation (default: as in the files)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def check_device(name: str, option: str) -> torch.device:
    """Returns a device; ValueError says why it cannot be used."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{option}: name must be a device of this torch, got {name!r}: {reason}"
        ) from error
    if device.type == "meta":
        raise ValueError(f"{option}: name must be a device that holds data, got 'meta'")
    return device


def load_pipeline(options: argparse.Namespace) -> BagelPipeline:
    """Loads the model that `add_model` asked for, placed as `add_placement` says, if it was added.

    Raises:
        Usage: options do not go together. ValueError: something is wrong with the model.
    """
    import torch

    from sparse_unified.bagel import BagelPipeline

    placement = placement_options(options)
    device = check_device(options.device, "--device")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return BagelPipeline.from_pretrained(options.model, device=device, dtype=dtype, **placement)


def open_images(paths: list[str]) -> list[Image]:
    """Reads pictures whole; ValueError names the one that cannot be."""
    if not paths:
        return []
    from sparse_unified.bagel.pictures import open_picture

    return [open_picture(path, where="--image") for path in paths]
