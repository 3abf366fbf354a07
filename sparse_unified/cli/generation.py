# SPDX-License-Identifier: Apache-2.0
"""generate and chat: run a model."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import (
    Usage,
    add_common,
    check_output,
    replace_file,
    write_result,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparse_unified.bagel import BagelPipeline


def add_commands(commands: Any) -> None:
    """Adds the two commands to the parser."""
    _add_generate(commands)
    chat = commands.add_parser(
        "chat",
        help="answer a prompt, with or without pictures, in text",
        description="Prints the answer to a prompt; pictures come before it.",
    )
    _add_model(chat)
    chat.add_argument("--prompt", type=values.prompt, required=True, help="the question")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture (repeatable)"
    )
    chat.add_argument(
        "--max-tokens",
        type=values.positive,
        default=500,
        help="most tokens of the answer (default 500)",
    )
    chat.add_argument(
        "--temperature",
        type=float,
        help="draw tokens at this temperature; without it, the likeliest",
    )
    chat.add_argument("--seed", type=int, help="of the drawing (default random)")
    chat.add_argument("--think", action="store_true", help="let the model reason first")
    add_common(chat)
    chat.set_defaults(run=_run_chat)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate or edit images",
        description="Generates one image per prompt, all in one batch. With --image, edits it.",
    )
    _add_model(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        type=values.prompt,
        default=[],
        help="what to show (repeatable)",
    )
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="more prompts, one a line; blank lines are skipped"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture to edit: with one prompt repeatable, with several one for all or one each",
    )
    parser.add_argument(
        "--edit", action="store_true", help="insist on editing: without --image it is an error"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=values.image_path,
        metavar="FILE",
        help="the picture to write (.png, .jpg, .webp); with several prompts x.png becomes "
        "x-0.png, x-1.png, ...",
    )
    parser.add_argument(
        "--seed", type=int, help="of the noise, counted up from image to image (default random)"
    )
    parser.add_argument(
        "--size",
        type=values.size,
        metavar="HxW",
        help="height and width in pixels, multiples of 16",
    )
    parser.add_argument("--height", type=values.side, help="instead of --size, with --width")
    parser.add_argument("--width", type=values.side, help="instead of --size, with --height")
    parser.add_argument(
        "--steps",
        type=values.positive,
        default=50,
        help="timesteps (default 50, which is 49 forwards)",
    )
    parser.add_argument(
        "--timestep-shift", type=float, default=3.0, help="more noise for longer (default 3)"
    )
    parser.add_argument(
        "--cfg-text-scale", type=float, default=4.0, help="weight of the prompt (default 4)"
    )
    parser.add_argument(
        "--cfg-img-scale", type=float, help="weight of the picture (default 2 when editing, else 1)"
    )
    parser.add_argument(
        "--cfg-interval",
        type=values.interval,
        metavar="LO,HI",
        help="times at which guidance is on (default 0,1 when editing, else 0.4,1)",
    )
    parser.add_argument(
        "--cfg-renorm-type",
        choices=("global", "channel", "text_channel"),
        help="what guidance is renormalised over (default text_channel when editing, else global)",
    )
    parser.add_argument(
        "--cfg-renorm-min", type=float, default=0.0, help="least factor of it (default 0)"
    )
    parser.add_argument("--think", action="store_true", help="let the model plan in text first")
    add_common(parser)
    parser.set_defaults(run=_run_generate)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory or a hub id owner/name")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and computation (default: as in the files)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def _run_generate(options: argparse.Namespace) -> int:
    prompts = options.prompt + _read_prompts(options.prompts_file)
    if not prompts:
        raise Usage("generate: --prompt or --prompts-file must give a prompt, got none")
    if options.edit and not options.image:
        raise Usage("generate: --edit must come with --image, got none")
    check_output(str(options.out), "--out")
    check_output(options.json, "--json")
    size = _choose_size(options)
    images = _assign_images(_open_images(options.image), len(prompts))
    pipeline = _load(options)
    result = pipeline.generate(
        prompts,
        images=images,
        seed=options.seed,
        size=size,
        num_timesteps=options.steps,
        timestep_shift=options.timestep_shift,
        cfg_text_scale=options.cfg_text_scale,
        cfg_img_scale=options.cfg_img_scale,
        cfg_interval=options.cfg_interval,
        cfg_renorm_type=options.cfg_renorm_type,
        cfg_renorm_min=options.cfg_renorm_min,
        think=options.think,
        progress=not options.quiet and sys.stderr.isatty(),
    )
    out: Path = options.out
    paths = (
        [out]
        if len(prompts) == 1
        else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(len(prompts))]
    )
    for path, image in zip(paths, result.images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format=values.IMAGE_FORMATS[path.suffix.lower()])
        replace_file(path, buffer.getvalue())

    pictures = [
        {"file": str(path), "prompt": prompt, "seed": seed, "height": height, "width": width}
        for path, prompt, seed, (height, width) in zip(
            paths, prompts, result.seeds, result.sizes, strict=True
        )
    ]
    for entry, thought in zip(pictures, result.thoughts or [], strict=False):
        entry["thought"] = thought
    facts = result.report.as_dict()
    lines = [f"{p['file']}  {p['height']}x{p['width']}  seed {p['seed']}" for p in pictures]
    lines.append(
        f"{facts['steps']} steps of {facts['seconds_per_step']:.3f} s, "
        f"{facts['total_seconds']:.1f} s in all, {facts['image_tokens']} image tokens, "
        f"backend {facts['backend']}, peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    document = {"model": options.model, "images": pictures, **facts}
    write_result(options.json, "\n".join(lines), json.dumps(document, indent=2, ensure_ascii=False))
    return 0


def _run_chat(options: argparse.Namespace) -> int:
    check_output(options.json, "--json")
    images = _open_images(options.image)
    pipeline = _load(options)
    result = pipeline.chat(
        options.prompt,
        images=images or None,
        max_length=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        think=options.think,
    )
    document = {
        "model": options.model,
        "prompt": options.prompt,
        "text": result.text,
        "token_ids": result.token_ids,
        **result.report.as_dict(),
    }
    write_result(options.json, result.text, json.dumps(document, indent=2, ensure_ascii=False))
    return 0


def _load(options: argparse.Namespace) -> BagelPipeline:
    import torch

    from sparse_unified.bagel import BagelPipeline

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--device: name must be a device of this torch, got {options.device!r}: {reason}"
        ) from error
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return BagelPipeline.from_pretrained(options.model, device=device, dtype=dtype)


def _open_images(paths: list[str]) -> list[Image]:
    if not paths:
        return []
    from sparse_unified.bagel.optional import optional

    images = []
    for path in paths:
        try:
            with Path(path).open("rb") as stream:
                image = optional("PIL.Image").open(stream)
                image.load()
        except (OSError, ValueError, SyntaxError) as error:
            reason = getattr(error, "strerror", None) or "a file of another or a damaged format"
            raise ValueError(f"--image: {path} must be a readable picture, got {reason}") from error
        images.append(image)
    return images


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
        size: tuple[int, int] | None = options.size
        return size
    if options.size is not None or None in sides:
        raise Usage("generate: size must be --size HxW, or --height and --width together")
    return sides
