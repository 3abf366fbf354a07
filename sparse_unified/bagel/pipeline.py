# SPDX-License-Identifier: Apache-2.0
"""Prompts and pictures in, pictures or text out."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_unified.bagel import inputs
from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.conditioning import ContextImage, build_guidance, see_images
from sparse_unified.bagel.loading import find_model, load_bagel
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.optional import optional
from sparse_unified.bagel.results import GenerationResult, TextResult, peak_memory, start_report
from sparse_unified.bagel.sampler import Renorm, initial_noise, sample_latents
from sparse_unified.bagel.text import generate_tokens
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.bagel.transforms import to_image, to_rgb, vae_transform, vit_transform
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.bagel.vision import unpatchify

if TYPE_CHECKING:
    from PIL.Image import Image

# The words the released checkpoints were trained to think with, from BAGEL's inferencer; the
# space at the end of the first line of each belongs to them.
THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user "
    "with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)


class BagelPipeline:
    """A model, its autoencoder and its tokenizer.

    Args:
        model: dense or sparse.
        vae: its autoencoder.
        tokenizer: its tokenizer, with the marker ids of `model.config`.
    """

    def __init__(self, model: Bagel, vae: AutoEncoder, tokenizer: Tokenizer) -> None:
        if tokenizer.special_tokens != model.config.special_tokens:
            raise ValueError(
                "BagelPipeline: tokenizer must have the marker ids of the model, "
                f"{model.config.special_tokens}, got {tokenizer.special_tokens}"
            )
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer
        self.vae_transform = vae_transform(model.config)
        self.vit_transform = vit_transform(model.config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> BagelPipeline:
        """Loads a dense or sparse checkpoint; host memory holds the weights and one tensor more.

        Args:
            name: a model directory, or a hub id such as "ByteDance-Seed/BAGEL-7B-MoT".
            device: where the weights go.
            dtype: what they become; None keeps what each file holds.

        Raises:
            ValueError: there is no such model, or its files are damaged or disagree.
            ImportError: a package of the `bagel` extra is missing.
        """
        directory = find_model(name)
        tokenizer = Tokenizer.from_directory(directory)
        model, vae = load_bagel(
            directory, device=device, dtype=dtype, special_tokens=tokenizer.special_tokens
        )
        return cls(model, vae, tokenizer)

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
        think: bool = False,
        max_think_length: int = 1000,
        think_temperature: float | None = None,
        progress: bool = True,
    ) -> GenerationResult:
        """Generates one image per prompt, all of them together.

        Args:
            prompts: one text or several.
            images: pictures to edit: for one text a picture or a list; for several texts a list
                with an entry for each (a picture, a list, or None).
            seed: one per image; a single number is counted up from image to image; None is random.
                The same prompt and seed give the same image alone or among others.
            size: (height, width) in pixels, multiples of 16; one for all or one per prompt. None is
                that of the last picture, or 1024 x 1024.
            num_timesteps, timestep_shift, cfg_text_scale, cfg_img_scale, cfg_interval,
            cfg_renorm_type, cfg_renorm_min: see `SamplingConfig`. None takes the official
                setting: 1, (0.4, 1), "global" for text alone; 2, (0, 1), "text_channel" as soon
                as one prompt has pictures.
            think: let the model plan in text first.
            max_think_length, think_temperature: of that text; temperature None is greedy.
            progress: show a bar.

        Raises:
            ValueError, TypeError: an argument is out of range.
        """
        where = "generate"
        texts = inputs.check_prompts(prompts, where=where)
        pictures = inputs.check_images(images, prompts, where=where)
        seeds = inputs.check_seeds(seed, len(texts), where=where)
        config = inputs.sampling_config(
            any(pictures),
            num_timesteps=num_timesteps,
            timestep_shift=timestep_shift,
            cfg_text_scale=cfg_text_scale,
            cfg_img_scale=cfg_img_scale,
            cfg_interval=cfg_interval,
            cfg_renorm_type=cfg_renorm_type,
            cfg_renorm_min=cfg_renorm_min,
        )
        last_sizes = [self._picture_size(own[-1]) if own else None for own in pictures]
        sizes = inputs.choose_sizes(size, last_sizes, self.model.config, where=where)
        grids = [self.model.config.token_grid(*pair, where=where) for pair in sizes]

        start = clock.perf_counter()
        report = start_report(self.model, self.model.device, self.model.dtype)
        guidance = build_guidance(
            self.model,
            [self.tokenizer.encode(text) for text in texts],
            images=[[self._look(image, vae=True) for image in own] for own in pictures],
            system_ids=self.tokenizer.encode(THINK_BEFORE_IMAGE) if think else None,
        )
        report.prefill_seconds = self._since(start)
        thoughts = None
        if think:
            before = clock.perf_counter()
            full = [g.full for g in guidance]
            written = self._write(full, max_think_length, think_temperature, seeds)
            thoughts = [self.tokenizer.decode(ids[1:]) for ids in written]
            self.model.prefill_text(full, [self.tokenizer.encode(text) for text in thoughts])
            report.text_tokens = sum(len(ids) - 1 for ids in written)
            report.text_seconds = self._since(before)
        report.context_tokens = sum(g.full.length for g in guidance)

        channels = self.model.config.token_channels
        noise = [
            initial_noise(rows * columns, channels, own)
            for (rows, columns), own in zip(grids, seeds, strict=True)
        ]
        with _bar(config.num_timesteps - 1, progress) as advance:

            def on_step(_: int, seconds: float) -> None:
                report.step_seconds.append(seconds)
                advance()

            latents = sample_latents(self.model, guidance, noise, grids, config, on_step=on_step)
        report.steps = len(report.step_seconds)
        report.image_tokens = sum(len(tokens) for tokens in latents)

        before = clock.perf_counter()
        drawn = [self.decode(tokens, grid) for tokens, grid in zip(latents, grids, strict=True)]
        report.decode_seconds = self._since(before)
        report.total_seconds = self._since(start)
        report.peak_memory_bytes = peak_memory(self.model.device)
        return GenerationResult(
            images=drawn,
            latents=[tokens.cpu() for tokens in latents],
            thoughts=thoughts,
            seeds=seeds,
            sizes=sizes,
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
        if not isinstance(prompt, str):
            raise TypeError(f"{where}: prompt must be a string, got {type(prompt).__name__}")
        inputs.check_prompts(prompt, where=where)
        pictures = inputs.check_images(images, prompt, where=where)[0]
        seeds = inputs.check_seeds(seed, 1, where=where)
        start = clock.perf_counter()
        report = start_report(self.model, self.model.device, self.model.dtype)
        contexts = self.model.new_contexts(1)
        if think:
            self.model.prefill_text(contexts, [self.tokenizer.encode(THINK_BEFORE_ANSWER)])
        see_images(self.model, contexts, [[self._look(image, vae=False) for image in pictures]])
        self.model.prefill_text(contexts, [self.tokenizer.encode(prompt)])
        report.context_tokens = contexts[0].length
        report.prefill_seconds = self._since(start)
        before = clock.perf_counter()
        ids = self._write(contexts, max_length, temperature, seeds)[0]
        report.text_tokens = len(ids) - 1
        report.text_seconds = self._since(before)
        report.total_seconds = self._since(start)
        report.peak_memory_bytes = peak_memory(self.model.device)
        return TextResult(text=self.tokenizer.decode(ids[1:]), token_ids=ids, report=report)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Image:
        """Turns latent tokens [N, p * p * C], rows by columns, into a picture."""
        latent = unpatchify(tokens, *grid, self.model.config.latent_patch_size)
        return to_image(self.vae.decode(latent[None])[0])

    def _picture_size(self, image: Image) -> tuple[int, int]:
        width, height = self.vae_transform.size(*image.size)
        return height, width

    def _look(self, image: Image, *, vae: bool) -> ContextImage:
        """Prepares a picture; as in the official code the ViT sees it at the size of the VAE."""
        image = self.vae_transform.resize(to_rgb(image))
        latent = None
        if vae:
            latent = self.vae.encode(self.vae_transform(image)[None])[0]
        return ContextImage(latent=latent, vit_pixels=self.vit_transform(image))

    def _write(
        self,
        contexts: Sequence[Context],
        max_length: int,
        temperature: float | None,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        return generate_tokens(
            self.model, contexts, max_length=max_length, temperature=temperature, seeds=seeds
        )

    def _since(self, start: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return clock.perf_counter() - start


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __enter__(self) -> Callable[[], Any]:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _bar(total: int, show: bool) -> Any:
    if not show:
        return nullcontext(lambda: None)
    return _Bar(optional("tqdm.auto").tqdm(total=total, desc="denoising", unit="step"))
