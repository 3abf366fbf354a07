# SPDX-License-Identifier: Apache-2.0
"""generate: images from prompts, and from images and prompts."""

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
    write_result,
)
from sparse_unified.cli.models import add_model, load_pipeline, open_images
from sparse_unified.cli.placement import add_placement

if TYPE_CHECKING:
    from PIL.Image import Image

    from sparse_unified.bagel import StepCache


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="generate or edit images",
        description="Generates one image per prompt. With --image, edits it.",
    )
    add_model(parser)
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
        "--seed",
        type=values.seed,
        help="of the noise, counted up from image to image (default random)",
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
    parser.add_argument(
        "--cache-interval",
        type=values.positive,
        default=1,
        metavar="N",
        help="compute every Nth step, after the first ones, and extrapolate the others (default 1)",
    )
    parser.add_argument(
        "--cache-order",
        type=int,
        choices=range(4),
        default=2,
        help="degree of the extrapolation: 0 repeats the last velocity (default 2)",
    )
    parser.add_argument("--think", action="store_true", help="let the model plan in text first")
    parser.add_argument(
        "--max-think-tokens",
        type=values.positive,
        default=1000,
        help="most tokens of the plan (default 1000)",
    )
    parser.add_argument(
        "--think-temperature",
        type=float,
        help="draw the plan at this temperature; without it, the likeliest tokens",
    )
    parser.add_argument(
        "--batch-size",
        type=values.positive,
        help="most images computed together, which bounds memory (default all)",
    )
    add_placement(parser, tasks=True)
    add_common(parser)
    parser.set_defaults(run=_run_generate)


def _run_generate(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint.atomic import replace_file

    prompts = options.prompt + _read_prompts(options.prompts_file)
    if not prompts:
        raise Usage("generate: --prompt or --prompts-file must give a prompt, got none")
    if options.edit and not options.image:
        raise Usage("generate: --edit must come with --image, got none")
    check_output(str(options.out), "--out")
    check_output(options.json, "--json")
    size = _choose_size(options)
    images = _assign_images(open_images(options.image), len(prompts))
    cache = _choose_cache(options)
    pipeline = load_pipeline(options)
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
        cache=cache,
        think=options.think,
        max_think_length=options.max_think_tokens,
        think_temperature=options.think_temperature,
        batch_size=options.batch_size,
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
        f"{_steps(facts)}, "
        f"{facts['total_seconds']:.1f} s in all, {facts['image_tokens']} image tokens, "
        f"backend {facts['backend']}, peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    document = {"model": options.model, "images": pictures, **facts}
    write_result(options.json, "\n".join(lines), json.dumps(document, indent=2, ensure_ascii=False))
    return 0


def _choose_cache(options: argparse.Namespace) -> StepCache | None:
    from sparse_unified.bagel import StepCache

    if options.cache_interval == 1:
        return None
    return StepCache(interval=options.cache_interval, order=options.cache_order)


def _steps(facts: dict[str, Any]) -> str:
    if facts["computed_steps"] == facts["steps"]:
        return f"{facts['steps']} steps of {facts['seconds_per_step']:.3f} s"
    seconds = sum(facts["step_seconds"])
    return f"{facts['steps']} steps, {facts['computed_steps']} computed, in {seconds:.3f} s"


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
