# SPDX-License-Identifier: Apache-2.0
"""Prompts and pictures in, pictures or text out."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_unified._common import progress_bar
from sparse_unified.bagel import inputs
from sparse_unified.bagel.conditioning import Guidance, build_guidance, see_images
from sparse_unified.bagel.execution import Execution
from sparse_unified.bagel.loading import load_bagel
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.pictures import Pictures
from sparse_unified.bagel.placement import Device, Offload, Placement, Task, choice, storages
from sparse_unified.bagel.results import (
    GenerationResult,
    Report,
    TextResult,
    peak_memory,
    start_report,
)
from sparse_unified.bagel.sampler import (
    Renorm,
    SamplingConfig,
    computed_steps,
    initial_noise,
    sample_latents,
)
from sparse_unified.bagel.step_cache import StepCache
from sparse_unified.bagel.text import generate_tokens
from sparse_unified.bagel.thinking import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint.hub import find_model

if TYPE_CHECKING:
    from PIL.Image import Image


class BagelPipeline:
    """A model, its autoencoder and its tokenizer.

    Args:
        model: dense or sparse.
        vae: its autoencoder.
        tokenizer: its tokenizer, with the marker ids of `model.config`.
        execution: how the model is run in each step; may be set later. None is op by op.

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(
        self,
        model: Bagel,
        vae: AutoEncoder,
        tokenizer: Tokenizer,
        *,
        execution: Execution | None = None,
    ) -> None:
        if tokenizer.special_tokens != model.config.special_tokens:
            raise ValueError(
                "BagelPipeline: tokenizer must have the marker ids of the model, "
                f"{model.config.special_tokens}, got {tokenizer.special_tokens}"
            )
        self.execution = execution or Execution()
        self.execution.check(model)
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer
        self.pictures = Pictures(model.config, vae)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        task: Task | str = Task.ALL,
        offload: Offload | str = Offload.NONE,
        storage: str | Mapping[str, str] | None = None,
        device_map: str | Mapping[str, Device] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        compile: bool | str = False,
        cuda_graphs: bool = False,
    ) -> BagelPipeline:
        """Loads a dense, sparse or pruned checkpoint; host memory holds it and 64 MiB more.

        Args:
            name: a model directory, or a hub id such as "ByteDance-Seed/BAGEL-7B-MoT".
            device: where the weights go.
            dtype: what they become; None keeps what each file holds.
            task: "image" leaves out what images from texts never read: the head, the ViT, and the
                last layer's und FFN; "edit" leaves out the head and that FFN; "all", nothing.
                Images are the same bit for bit.
            offload: "und" keeps the und FFNs in host memory. Prompts bring them to the device one
                after the other; the two markers of an image, two rows a step, visit them instead.
            storage: "int8" or "fp8" for all FFNs, or a mapping of "und" and "gen" to either: how
                they are stored, packed one by one as they are loaded. Needs the `quant` extra.
            device_map: "auto", or module path -> device, "cpu" or "disk": where decoder layers go,
                by accelerate (the `offload` extra); all else is on `device`.
            max_memory: with "auto", bytes by device, as accelerate takes them.
            offload_folder: where weights on "disk" are written.
            compile, cuda_graphs: how the steps of denoising are run, see `Execution`.

        Raises:
            ValueError: there is no such model, its files are damaged or disagree, or the arguments
                do not go together.
            ImportError: an extra is not installed.
        """
        where = "from_pretrained"
        execution = Execution(compile=compile, cuda_graphs=cuda_graphs)
        placement = Placement(
            device=device,
            task=choice(Task, task, f"{where}: task"),
            offload=choice(Offload, offload, f"{where}: offload"),
            storage=storages(storage, where=where),
        )
        if device_map is not None and (placement.storage or placement.offload is not Offload.NONE):
            raise ValueError(
                f"{where}: device_map must come without offload and storage, got "
                f"offload={placement.offload.value!r}, storage={storage!r}"
            )
        if not execution.is_plain:
            execution.check_device(torch.device(device))
            if device_map is not None or placement.offload is not Offload.NONE:
                raise ValueError(
                    f"{where}: compile and cuda_graphs must come without device_map and offload, "
                    f"got device_map={device_map!r}, offload={placement.offload.value!r}"
                )
        directory = find_model(name)
        tokenizer = Tokenizer.from_directory(directory)
        model, vae = load_bagel(
            directory,
            device=device,
            dtype=dtype,
            special_tokens=tokenizer.special_tokens,
            placement=placement,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        return cls(model, vae, tokenizer, execution=execution)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        images: inputs.Images | Sequence[inputs.Images] = None,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        cfg_renorm_type: Renorm | str | None = None,
        cfg_renorm_min: float = 0.0,
        cache: StepCache | None = None,
        think: bool = False,
        max_think_length: int = 1000,
        think_temperature: float | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> GenerationResult:
        """Generates one image per prompt, many of them together.

        Args:
            prompts: one text or several.
            images: pictures to edit: for one text a picture or a list; for several texts a list of
                such, or None, one for each.
            seed: one per image; a single number is counted up from image to image; None is random.
                The same prompt and seed give the same image alone or among others.
            size: (height, width) in pixels, multiples of 16; one for all or one per prompt. None is
                that of the last picture, or 1024 x 1024.
            num_timesteps, timestep_shift, cfg_text_scale, cfg_img_scale, cfg_interval,
            cfg_renorm_type, cfg_renorm_min: see `SamplingConfig`. None takes the official
                setting for each prompt by itself: 1, (0.4, 1), "global" for text alone; 2, (0, 1),
                "text_channel" for a prompt with pictures.
            cache: extrapolate the velocities of some steps instead of computing them.
            think: let the model plan in text first.
            max_think_length, think_temperature: of that text; temperature None is greedy.
            batch_size: most images computed together, of those with one setting; None is all.
            progress: show a bar.

        Raises:
            ValueError, TypeError: an argument is out of range.
        """
        where = "generate"
        wanted = inputs.image_requests(
            prompts,
            images,
            seed,
            size,
            config=self.model.config,
            resized=self.pictures.for_vae.size,
            where=where,
        )
        batches = inputs.image_batches(
            wanted,
            batch_size,
            where=where,
            num_timesteps=num_timesteps,
            timestep_shift=timestep_shift,
            cfg_text_scale=cfg_text_scale,
            cfg_img_scale=cfg_img_scale,
            cfg_interval=cfg_interval,
            cfg_renorm_type=cfg_renorm_type,
            cfg_renorm_min=cfg_renorm_min,
            cache=cache,
        )

        start = clock.perf_counter()
        report = start_report(self.model)
        thoughts, latents, drawn = [], [], []
        num_steps = len(batches) * (num_timesteps - 1)
        done = count(1)
        with progress_bar("denoising", "step", show=progress) as bar:
            for indices, config in batches:
                batch = [wanted[i] for i in indices]
                guidance = self._read(batch, think, report)
                if think:
                    seeds = [request.seed for request in batch]
                    thoughts += self._plan(
                        guidance, max_think_length, think_temperature, seeds, report
                    )
                tokens = self._denoise(
                    batch, guidance, config, report, lambda: bar(next(done), num_steps)
                )
                drawn += self._draw(batch, tokens, report)
                latents += [x.cpu() for x in tokens]
        order = sorted(range(len(wanted)), key=[i for own, _ in batches for i in own].__getitem__)
        report.total_seconds = self._since(start)
        report.peak_memory_bytes = peak_memory(self.model.device)
        return GenerationResult(
            images=[drawn[i] for i in order],
            latents=[latents[i] for i in order],
            thoughts=[thoughts[i] for i in order] if think else None,
            seeds=[request.seed for request in wanted],
            sizes=[request.size for request in wanted],
            report=report,
        )

    @torch.no_grad()
    def chat(
        self,
        prompt: str,
        *,
        images: inputs.Images = None,
        max_length: int = 500,
        temperature: float | None = None,
        seed: int | None = None,
        think: bool = False,
    ) -> TextResult:
        """Answers a text, with or without pictures before it, in text.

        Args:
            prompt: the text.
            images: a picture or a list of them.
            max_length: most tokens of the answer, its start marker included.
            temperature: None takes the likeliest token each time; otherwise tokens are drawn.
            seed: for drawing; None is random.
            think: let the model reason first; its reasoning is part of the answer.

        Raises:
            ValueError, TypeError: an argument is out of range.
        """
        where = "chat"
        inputs.check_prompts(prompt if isinstance(prompt, str) else [prompt], where=where)
        pictures = inputs.check_images(images, prompt, where=where)[0]
        seeds = inputs.check_seeds(seed, 1, where=where)
        start = clock.perf_counter()
        report = start_report(self.model)
        contexts = self.model.new_contexts(1)
        if think:
            self.model.prefill_text(contexts, [self.tokenizer.encode(THINK_BEFORE_ANSWER)])
        see_images(
            self.model, contexts, [[self.pictures.look(image, vae=False) for image in pictures]]
        )
        self.model.prefill_text(contexts, [self.tokenizer.encode(prompt)])
        report.context_tokens = contexts[0].length
        report.prefill_seconds = self._since(start)
        before = clock.perf_counter()
        ids = generate_tokens(
            self.model, contexts, max_length=max_length, temperature=temperature, seeds=seeds
        )[0]
        report.text_tokens = len(ids) - 1
        report.text_seconds = self._since(before)
        report.total_seconds = self._since(start)
        report.peak_memory_bytes = peak_memory(self.model.device)
        return TextResult(text=self.tokenizer.decode(ids[1:]), token_ids=ids, report=report)

    def _read(
        self, batch: Sequence[inputs.ImageRequest], think: bool, report: Report
    ) -> list[Guidance]:
        start = clock.perf_counter()
        guidance = build_guidance(
            self.model,
            [self.tokenizer.encode(request.text) for request in batch],
            images=[
                [self.pictures.look(p, vae=True) for p in request.pictures] for request in batch
            ],
            system_ids=self.tokenizer.encode(THINK_BEFORE_IMAGE) if think else None,
        )
        report.context_tokens += sum(g.full.length for g in guidance)
        report.prefill_seconds += self._since(start)
        return guidance

    def _plan(
        self,
        guidance: Sequence[Guidance],
        max_length: int,
        temperature: float | None,
        seeds: Sequence[int],
        report: Report,
    ) -> list[str]:
        """Lets the full contexts write and then read a plan; the poorer ones never see it."""
        start = clock.perf_counter()
        full = [g.full for g in guidance]
        written = generate_tokens(
            self.model, full, max_length=max_length, temperature=temperature, seeds=seeds
        )
        plans = [self.tokenizer.decode(ids[1:]) for ids in written]
        self.model.prefill_text(full, [self.tokenizer.encode(plan) for plan in plans])
        report.text_tokens += sum(len(ids) - 1 for ids in written)
        report.text_seconds += self._since(start)
        return plans

    def _denoise(
        self,
        batch: Sequence[inputs.ImageRequest],
        guidance: Sequence[Guidance],
        config: SamplingConfig,
        report: Report,
        advance: Callable[[], Any],
    ) -> list[Tensor]:
        model = self.model.config
        grids = [model.token_grid(*request.size, where="generate") for request in batch]
        noise = [
            initial_noise(rows * columns, model.token_channels, request.seed)
            for (rows, columns), request in zip(grids, batch, strict=True)
        ]

        def on_step(_: int, seconds: float) -> None:
            report.step_seconds.append(seconds)
            advance()

        tokens = sample_latents(
            self.model,
            guidance,
            noise,
            grids,
            config,
            execution=self.execution,
            on_step=on_step,
        )
        report.steps = len(report.step_seconds)
        report.computed_steps += sum(computed_steps(config))
        report.image_tokens += sum(len(x) for x in tokens)
        return tokens

    def _draw(
        self, batch: Sequence[inputs.ImageRequest], tokens: Sequence[Tensor], report: Report
    ) -> list[Image]:
        start = clock.perf_counter()
        drawn = [
            self.pictures.draw(x, request.size) for x, request in zip(tokens, batch, strict=True)
        ]
        report.decode_seconds += self._since(start)
        return drawn

    def _since(self, start: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return clock.perf_counter() - start
