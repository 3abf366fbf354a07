# SPDX-License-Identifier: Apache-2.0
"""generate and chat, and how every command that runs a model loads it."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_unified.analysis.samples import read_lines
from sparse_unified.bagel import BagelPipeline, SamplingConfig, StepCache
from sparse_unified.bagel.images import open_image
from sparse_unified.bagel.loading import Placement
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.cli.console import Output, Usage
from sparse_unified.cli.options import (
    IMAGE_FORMATS,
    Flags,
    arguments,
    dtype_of,
    image_path,
    value,
)
from sparse_unified.surgery import load_lora_


def add_model(flags: Flags, usage: str = "MODEL", *, lora: bool = True) -> None:
    """Adds the model, or several, their dtype and device, and adapters of one."""
    flags.table(f"{usage}  a model directory or a hub id owner/name")
    flags.of(
        BagelPipeline.from_pretrained,
        "dtype device",
        dtype="of weights and computation (default: as in the files)",
        device="cpu, cuda, cuda:1, ...",
    )
    if lora and usage == "MODEL":
        flags.table("--lora DIR  LoRA adapters to merge into the weights, of adapt or peft")


def add_placement(flags: Flags, *, tasks: bool) -> None:
    """Adds what `from_pretrained` takes for small GPUs; `tasks` adds what is for images alone."""
    group = flags.group("small GPUs", "what fits where: sparse-unified info MODEL --memory")
    options = ("task " if tasks else "") + "offload offload_folder"
    group.of(BagelPipeline.from_pretrained, options)
    group.table("""
        --storage KIND    FFN weights as int8, fp8, fp8-compute (multiplied in fp8, on GPUs of 9.x
                          and 10.x) or nvfp4, or by component und=int8,gen=nvfp4
        --device-map MAP  auto, or MODULE=DEVICE,...: where decoder layers go, by accelerate
        --max-memory DEVICE=SIZE,...  with --device-map auto, such as 0=20GiB,cpu=60GiB
        """)
    if tasks:
        modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        flags.group("speed").table(
            """
            --compile MODE  compile the denoising step as one graph, in a mode of torch.compile
            --cuda-graphs   record the denoising step and replay it
            """,
            compile={"nargs": "?", "const": True, "default": False, "choices": (True, *modes)},
        )


_top_k = value(
    "K, or K,T:K,... with K experts from time T on, T below 1 and descending",
    lambda text: tuple(
        (float(time or 1), int(count))
        for time, _, count in (part.rpartition(":") for part in text.split(","))
    ),
    lambda found: SamplingConfig(top_k=found),
)


def add_top_k(flags: Flags) -> None:
    """Adds how many experts are active where images are sampled, by time if that is wished."""
    flags.table(
        "--top-k K[,T:K...]  experts of a token in sparse FFNs; 4,0.5:8 are 4, and 8 from time 0.5 "
        "on (time falls from 1 to 0) (default: those of the model)",
        top_k={"type": _top_k},
    )


def add_guidance(flags: Flags) -> None:
    """Adds the settings of guidance that are others when an image is edited."""
    flags.of(
        SamplingConfig,
        "cfg_img_scale cfg_interval cfg_renorm_type",
        unset=True,
        cfg_img_scale="weight of the image (default 2 when editing, else 1)",
        cfg_interval="times at which guidance is on (default 0,1 when editing, else 0.4,1)",
        cfg_renorm_type="what guidance is renormalised over (default text_channel when editing, "
        "else global)",
    )


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
        placement = arguments(BagelPipeline.from_pretrained, options)
        for name in ("max_memory", "offload_folder"):
            if options.device_map is None and getattr(options, name) is not None:
                raise Usage(f"--{name.replace('_', '-')} must come with --device-map, got none")
        try:
            Placement(**arguments(Placement, options))
        except ValueError as error:
            raise Usage(str(error)) from error
    device, dtype = check_device(options.device, "--device"), dtype_of(options.dtype)
    pipeline = BagelPipeline.from_pretrained(
        options.model, **placement | {"device": device, "dtype": dtype}
    )
    if getattr(options, "lora", None) is not None:
        load_lora_(pipeline, options.lora)
    return pipeline


def add_generate(flags: Flags) -> None:
    add_model(flags)
    flags.parser.set_defaults(outputs=("out",))
    flags.table(
        """
        --prompt PROMPT...   what to show (repeatable)
        --prompts-file FILE  more prompts, one a line; blank lines are skipped
        --image FILE...      an image to edit: with one prompt repeatable, with several one for all
                             or one each
        --out FILE!          the image to write (.png, .jpg, .webp); with several prompts x.png
                             becomes x-0.png, x-1.png, ...
        --size HxW           height and width in pixels, multiples of 16
        """,
        out={"type": image_path},
    )
    flags.of(
        BagelPipeline.generate,
        "seed think max_think_tokens=max_think_length think_temperature batch_size tiled",
        seed="of the noise, counted up from image to image (default random)",
    )
    flags.of(
        SamplingConfig,
        "steps=num_timesteps timestep_shift cfg_text_scale cfg_renorm_min",
        num_timesteps="timesteps, one more than forward passes",
        timestep_shift="above 1 has more noise for longer",
        cfg_text_scale="of classifier-free guidance: weight of the prompt",
    )
    add_guidance(flags)
    cache = "cache_interval=interval cache_order=order"
    flags.of(StepCache, cache, interval={"default": 1}, order={"choices": range(4)})
    add_top_k(flags)
    add_placement(flags, tasks=True)


def run_generate(options: argparse.Namespace) -> Output:
    """Generates one image per prompt. With --image, edits it."""
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        prompts += [line for _, line in read_lines(options.prompts_file, "--prompts-file")]
    images: list[Any] = [open_image(path, where="--image") for path in options.image]
    if not prompts:
        raise Usage("generate: --prompt or --prompts-file must give a prompt, got none")
    if len(prompts) > 1 and len(images) not in (0, 1, len(prompts)):
        rule = f"must be given once or once for each of {len(prompts)} prompts, got {len(images)}"
        raise Usage(f"generate: --image {rule}")
    if options.task == "image" and images:
        raise Usage("generate: --task must be edit or all with --image, got image")
    if options.task != "all" and options.think:
        raise Usage(f"generate: --task must be all with --think, got {options.task}")
    if len(prompts) == 1:
        images = [images] if images else []
    elif len(images) == 1:
        images *= len(prompts)
    given: dict[str, Any] = {
        "images": images or None,
        "progress": not options.quiet and sys.stderr.isatty(),
        **arguments(SamplingConfig, options),
    }
    if options.interval > 1:
        given["cache"] = StepCache(**arguments(StepCache, options))
    pipeline = load_pipeline(options)
    result = pipeline.generate(prompts, **arguments(pipeline.generate, options, **given))

    out: Path = options.out
    entries: list[dict[str, Any]] = []
    for i, (image, (height, width)) in enumerate(zip(result.images, result.sizes, strict=True)):
        path = out.with_name(f"{out.stem}-{i}{out.suffix}") if len(prompts) > 1 else out
        buffer = io.BytesIO()
        image.save(buffer, format=IMAGE_FORMATS[path.suffix.lower()])
        replace_file(path, buffer.getvalue())
        entry = {"file": str(path), "prompt": prompts[i], "seed": result.seeds[i]}
        thought = {} if result.thoughts is None else {"thought": result.thoughts[i]}
        entries.append({**entry, "height": height, "width": width, **thought})

    facts = result.report.to_dict()
    lines = [f"{e['file']}  {e['height']}x{e['width']}  seed {e['seed']}" for e in entries]
    lines.append(
        f"{facts['steps']} steps, {facts['computed_steps']} computed, "
        f"{facts['seconds_per_step']:.3f} s each, {facts['total_seconds']:.1f} s in all, "
        f"{facts['image_tokens']} image tokens, backend {facts['backend']}, "
        f"peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    document = {"model": options.model, "images": entries, **facts}
    return Output(text="\n".join(lines), document=document)


def add_chat(flags: Flags) -> None:
    add_model(flags)
    flags.table("""
        --prompt PROMPT!  the question
        --image FILE...   an image (repeatable)
        """)
    flags.of(BagelPipeline.chat, "max_tokens=max_length temperature seed think top_k")
    add_placement(flags, tasks=False)


def run_chat(options: argparse.Namespace) -> Output:
    """Prints the answer to a prompt; images come before it."""
    images = [open_image(path, where="--image") for path in options.image]
    pipeline = load_pipeline(options)
    result = pipeline.chat(**arguments(pipeline.chat, options, images=images or None))
    facts = {"text": result.text, "token_ids": result.token_ids, **result.report.to_dict()}
    document = {"model": options.model, "prompt": options.prompt, **facts}
    return Output(text=result.text, document=document)
