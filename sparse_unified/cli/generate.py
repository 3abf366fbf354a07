# SPDX-License-Identifier: Apache-2.0
"""generate and chat, and how every command that runs a model loads it."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_unified.bagel import BagelPipeline, StepCache
from sparse_unified.bagel.images import open_image
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.cli.console import Command, CommandParser, Output, Usage
from sparse_unified.cli.options import (
    IMAGE_FORMATS,
    add_flags,
    add_options,
    arguments,
    device_map,
    dtype_of,
    image_path,
    max_memory,
    prompt,
    side,
    size,
    storage,
)

if TYPE_CHECKING:
    from PIL.Image import Image


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its dtype and its device."""
    add_flags(parser, "MODEL  a model directory or a hub id owner/name")
    add_options(
        parser,
        BagelPipeline.from_pretrained,
        *("dtype", "device"),
        dtype="of weights and computation (default: as in the files)",
        device="cpu, cuda, cuda:1, ...",
    )


def add_placement(parser: argparse.ArgumentParser, *, tasks: bool) -> None:
    """Adds what `from_pretrained` takes for small GPUs.

    Args:
        tasks: the command draws images, so that parts of the model may be left out.
    """
    load = BagelPipeline.from_pretrained
    group = parser.add_argument_group(
        "small GPUs", "what fits where: sparse-unified info MODEL --memory"
    )
    if tasks:
        add_options(group, load, "task")
    add_options(
        group,
        load,
        *("offload", "storage", "device_map", "max_memory", "offload_folder"),
        storage={
            "type": storage,
            "metavar": "KIND",
            "help": "FFN weights in 8 bits: int8, fp8, or by component und=int8,gen=fp8",
        },
        device_map={
            "type": device_map,
            "metavar": "MAP",
            "help": "auto, or MODULE=DEVICE,...: where decoder layers go, by accelerate",
        },
        max_memory={
            "type": max_memory,
            "metavar": "DEVICE=SIZE,...",
            "help": "with --device-map auto, such as 0=20GiB,cpu=60GiB",
        },
    )
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
    add_flags(speed, "--cuda-graphs  record the denoising step and replay it")


def check_device(name: str, option: str) -> torch.device:
    """Returns a device; ValueError says why it cannot be used."""
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
    placement: dict[str, Any] = {}
    if "offload" in options:
        _check_placement(options)
        placement = arguments(BagelPipeline.from_pretrained, options)
    placement |= {"device": check_device(options.device, "--device")}
    placement |= {"dtype": dtype_of(options.dtype)}
    return BagelPipeline.from_pretrained(options.model, **placement)


def _check_placement(options: argparse.Namespace) -> None:
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


def _open_images(paths: Sequence[str]) -> list[Image]:
    """Reads images whole; ValueError names the one that cannot be."""
    return [open_image(path, where="--image") for path in paths]


def _add_generate(parser: CommandParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--prompt", action="append", type=prompt, default=[], help="what to show (repeatable)"
    )
    add_flags(
        parser,
        """
        --prompts-file FILE  more prompts, one a line; blank lines are skipped
        --image FILE...      an image to edit: with one prompt repeatable, with several one for all
                             or one each
        --edit               insist on editing: without --image it is an error
        """,
    )
    parser.add_argument(
        "--out",
        required=True,
        type=image_path,
        metavar="FILE",
        help="the image to write (.png, .jpg, .webp); with several prompts x.png becomes "
        "x-0.png, x-1.png, ...",
    )
    parser.add_argument(
        "--size", type=size, metavar="HxW", help="height and width in pixels, multiples of 16"
    )
    parser.add_argument("--height", type=side, help="instead of --size, with --width")
    parser.add_argument("--width", type=side, help="instead of --size, with --height")
    add_options(
        parser,
        BagelPipeline.generate,
        *("seed", "steps=num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale"),
        *("cfg_interval", "cfg_renorm_type", "cfg_renorm_min", "think"),
        *("max_think_tokens=max_think_length", "think_temperature", "batch_size"),
        seed="of the noise, counted up from image to image (default random)",
        num_timesteps="timesteps, one more than forward passes",
        timestep_shift="above 1 has more noise for longer",
        cfg_text_scale="of classifier-free guidance: weight of the prompt",
        cfg_img_scale="weight of the image (default 2 when editing, else 1)",
        cfg_interval={
            "metavar": "LO,HI",
            "help": "times at which guidance is on (default 0,1 when editing, else 0.4,1)",
        },
        cfg_renorm_type="what guidance is renormalised over (default text_channel when editing, "
        "else global)",
        cfg_renorm_min="least factor of it",
        max_think_length="most tokens of the plan",
        think_temperature="draw the plan at this temperature; without it, the likeliest tokens",
        batch_size="most images computed together, which bounds memory (default all)",
    )
    add_options(
        parser,
        StepCache,
        *("cache_interval=interval", "cache_order=order"),
        interval={
            "default": 1,
            "help": "compute every Nth step, after the first ones, and extrapolate the others",
        },
        order={
            "choices": range(4),
            "help": "degree of the extrapolation: 0 repeats the last velocity",
        },
    )
    add_placement(parser, tasks=True)


def _generate(options: argparse.Namespace) -> Output:
    prompts = options.prompt + _read_prompts(options.prompts_file)
    if not prompts:
        raise Usage("generate: --prompt or --prompts-file must give a prompt, got none")
    if options.edit and not options.image:
        raise Usage("generate: --edit must come with --image, got none")
    given: dict[str, Any] = {
        "size": _choose_size(options),
        "images": _assign_images(_open_images(options.image), len(prompts)),
        "progress": not options.quiet and sys.stderr.isatty(),
    }
    if options.interval > 1:
        given["cache"] = StepCache(**arguments(StepCache, options))
    pipeline = load_pipeline(options)
    result = pipeline.generate(prompts, **arguments(pipeline.generate, options, **given))

    out: Path = options.out
    many = len(prompts) > 1
    pictures: list[dict[str, Any]] = []
    for i, (image, (height, width)) in enumerate(zip(result.images, result.sizes, strict=True)):
        path = out.with_name(f"{out.stem}-{i}{out.suffix}") if many else out
        buffer = io.BytesIO()
        image.save(buffer, format=IMAGE_FORMATS[path.suffix.lower()])
        replace_file(path, buffer.getvalue())
        entry = {"file": str(path), "prompt": prompts[i], "seed": result.seeds[i]}
        pictures.append({**entry, "height": height, "width": width})
        if result.thoughts is not None:
            pictures[-1]["thought"] = result.thoughts[i]

    facts = result.report.to_dict()
    steps = f"{facts['steps']} steps of {facts['seconds_per_step']:.3f} s"
    if facts["computed_steps"] < facts["steps"]:
        seconds = sum(facts["step_seconds"])
        steps = f"{facts['steps']} steps, {facts['computed_steps']} computed, in {seconds:.3f} s"
    lines = [f"{p['file']}  {p['height']}x{p['width']}  seed {p['seed']}" for p in pictures]
    lines.append(
        f"{steps}, {facts['total_seconds']:.1f} s in all, {facts['image_tokens']} image tokens, "
        f"backend {facts['backend']}, peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    document = {"model": options.model, "images": pictures, **facts}
    return Output(text="\n".join(lines), document=document)


def _assign_images(images: list[Image], num_prompts: int) -> list[list[Image]] | None:
    if not images:
        return None
    if num_prompts == 1:
        return [images]
    if len(images) == 1:
        return [images] * num_prompts
    if len(images) != num_prompts:
        raise Usage(
            f"generate: --image must be given once or once for each of {num_prompts} prompts, "
            f"got {len(images)}"
        )
    return [[image] for image in images]


def _read_prompts(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--prompts-file: {path} must be readable text, got {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file: {path} must hold a prompt, got only blank lines")
    return prompts


def _choose_size(options: argparse.Namespace) -> tuple[int, int] | None:
    sides = (options.height, options.width)
    if sides == (None, None):
        chosen: tuple[int, int] | None = options.size
        return chosen
    if options.size is not None or None in sides:
        raise Usage("generate: size must be --size HxW, or --height and --width together")
    return sides


def _add_chat(parser: CommandParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", type=prompt, required=True, help="the question")
    add_flags(parser, "--image FILE...  an image (repeatable)")
    add_options(
        parser,
        BagelPipeline.chat,
        *("max_tokens=max_length", "temperature", "seed", "think"),
        max_length="most tokens of the answer",
        temperature="draw tokens at this temperature; without it, the likeliest",
        seed="of the drawing (default random)",
    )
    add_placement(parser, tasks=False)


def _chat(options: argparse.Namespace) -> Output:
    images = _open_images(options.image)
    pipeline = load_pipeline(options)
    given = arguments(pipeline.chat, options, images=images or None)
    result = pipeline.chat(**given)
    document = {
        "model": options.model,
        "prompt": options.prompt,
        "text": result.text,
        "token_ids": result.token_ids,
        **result.report.to_dict(),
    }
    return Output(text=result.text, document=document)


GENERATE = Command(
    description="Generates one image per prompt. With --image, edits it.",
    add=_add_generate,
    run=_generate,
    outputs=("out",),
)
CHAT = Command(
    description="Prints the answer to a prompt; images come before it.",
    add=_add_chat,
    run=_chat,
)
