# SPDX-License-Identifier: Apache-2.0
"""The evaluators that come with the package, for BAGEL pipelines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.analysis.evaluate import Better
from sparse_unified.analysis.samples import Sample
from sparse_unified.bagel import BagelPipeline, Guidance, build_guidance, generate_tokens
from sparse_unified.bagel.attention import KVCache
from sparse_unified.bagel.images import ContextImage, open_image
from sparse_unified.bagel.sampler import initial_noise, see_images
from sparse_unified.bagel.vision import patchify

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_LOSS = 700.0  # exp of more is no double


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much the built-in evaluators compute.

    Args:
        size: height and width of generated images in pixels; None is what `generate` takes.
        num_timesteps: points of the time grid of whole generations.
        times: at which the velocity is measured on held-out pairs, 1 being noise.
        max_length: most tokens of an answer, its start marker included.
        batch_size: most images computed together.

    Raises:
        ValueError: a value is out of range.
    """

    size: tuple[int, int] | None = None
    num_timesteps: int = 25
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    max_length: int = 64
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("num_timesteps", "max_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"Settings: {name} must be at least 2, got {getattr(self, name)}")
        if self.batch_size < 1:
            raise ValueError(f"Settings: batch_size must be at least 1, got {self.batch_size}")
        if not self.times or not all(0 < time <= 1 for time in self.times):
            raise ValueError(f"Settings: times must be above 0 and at most 1, got {self.times}")


def _open(path: Path) -> Image:
    return open_image(path, where="samples")


def look_at(pipeline: BagelPipeline, sample: Sample, *, vae: bool) -> list[ContextImage]:
    """Prepares the pictures before a prompt."""
    return [pipeline.image_processor.encode(_open(path), vae=vae) for path in sample.sources]


def guidance_of(pipeline: BagelPipeline, sample: Sample) -> Guidance:
    """Lets the model read what an image is generated from."""
    looks = look_at(pipeline, sample, vae=True)
    ids = pipeline.tokenizer.encode(sample.prompt)
    return build_guidance(pipeline.model, [ids], images=[looks])[0]


def question_context(
    pipeline: BagelPipeline, sample: Sample, looks: Sequence[ContextImage] | None = None
) -> KVCache:
    """Lets the model read what a text is to follow; `looks` are its pictures, if prepared."""
    contexts = pipeline.model.new_contexts(1)
    looks = look_at(pipeline, sample, vae=False) if looks is None else looks
    see_images(pipeline.model, contexts, [looks])
    pipeline.model.prefill_text(contexts, [pipeline.tokenizer.encode(sample.prompt)])
    return contexts[0]


class VelocityError:
    """Mean squared error of the predicted velocity on held-out pairs of text and image.

    With x0 the latent of the image and e the noise of the seed of the sample, the model sees
    (1 - t) x0 + t e and should answer e - x0; without guidance, averaged over times, tokens and
    samples.

    Args:
        samples: with an image each.
        times: t of the forward passes.
    """

    better: Mapping[str, Better] = {"velocity_error": Better.LOWER}

    def __init__(self, samples: Sequence[Sample], times: Sequence[float]) -> None:
        missing = [sample.prompt for sample in samples if sample.image is None]
        if missing or not samples:
            got = f"none for {missing[0]!r}" if missing else "no samples"
            raise ValueError(f"VelocityError: samples must have an image each, got {got}")
        self.samples, self.times = samples, times
        self._latents: list[tuple[Tensor, tuple[int, int]]] = []

    def prepare(self, pipeline: BagelPipeline) -> None:
        """Encodes the images, once."""
        patch = pipeline.model.config.latent_patch_size
        self._latents = []
        for sample in self.samples:
            assert sample.image is not None
            pixels = pipeline.image_processor.for_vae(_open(sample.image))
            latent = pipeline.vae.encode(pixels[None])[0]
            grid = (latent.shape[1] // patch, latent.shape[2] // patch)
            self._latents.append((patchify(latent, patch).float().cpu(), grid))

    @torch.no_grad()
    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        if not self._latents:
            self.prepare(pipeline)
        errors = []
        for sample, (clean, grid) in zip(self.samples, self._latents, strict=True):
            context = guidance_of(pipeline, sample).full
            noise = initial_noise(clean.shape[0], clean.shape[1], sample.seed)
            for time in self.times:
                noisy = (1 - time) * clean + time * noise
                at = torch.tensor([time])
                predicted = pipeline.model.velocity([noisy], [grid], at, [[context]])[0][0]
                errors.append(F.mse_loss(predicted.cpu(), noise - clean).item())
        return {"velocity_error": sum(errors) / len(errors)}


class DenseDistance:
    """How far whole generations are from those of the dense model at the same seeds.

    `latent_distance` is |x - x_dense| / |x_dense| of the latent tokens, `image_distance` the root
    mean square difference of the pixels, of which 1 is the whole range; means over the samples.
    """

    better: Mapping[str, Better] = {
        "latent_distance": Better.LOWER,
        "image_distance": Better.LOWER,
    }

    def __init__(self, samples: Sequence[Sample], settings: Settings) -> None:
        self.samples, self.settings = samples, settings
        self._dense: list[tuple[Tensor, Tensor]] = []

    def prepare(self, pipeline: BagelPipeline) -> None:
        """Generates with the dense model."""
        self._dense = self._generate(pipeline)

    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        if not self._dense:
            raise RuntimeError("DenseDistance: prepare must have seen the dense model, got no call")
        latent, image = 0.0, 0.0
        for (x, pixels), (x0, pixels0) in zip(self._generate(pipeline), self._dense, strict=True):
            latent += float((x - x0).norm() / x0.norm())
            image += float((pixels - pixels0).square().mean().sqrt())
        count = len(self.samples)
        return {"latent_distance": latent / count, "image_distance": image / count}

    def _generate(self, pipeline: BagelPipeline) -> list[tuple[Tensor, Tensor]]:
        sources: list[Any] = [[_open(p) for p in s.sources] or None for s in self.samples]
        result = pipeline.generate(
            [sample.prompt for sample in self.samples],
            images=sources,
            seed=[sample.seed for sample in self.samples],
            size=self.settings.size,
            num_timesteps=self.settings.num_timesteps,
            batch_size=self.settings.batch_size,
            progress=False,
        )
        pixels = [torch.from_numpy(np.array(image)).float() / 255 for image in result.images]
        return list(zip(result.latents, pixels, strict=True))


class TextAgreement:
    """How much the model goes on agreeing with the answers of the dense one.

    `text_agreement` is the share of the tokens of the dense model's greedy answers, its end marker
    included, that are the model's first choice after the same beginning. `perplexity` is exp of the
    mean negative log likelihood (or of 700, if that is less) of the reference answers, which are
    the dense model's own where a sample has none.
    """

    better: Mapping[str, Better] = {
        "text_agreement": Better.HIGHER,
        "perplexity": Better.LOWER,
    }

    def __init__(self, samples: Sequence[Sample], settings: Settings) -> None:
        self.samples, self.settings = samples, settings
        self._answers: list[list[int]] = []

    def prepare(self, pipeline: BagelPipeline) -> None:
        """Lets the dense model answer."""
        special = pipeline.model.config.special_tokens
        self._answers = []
        for sample in self.samples:
            context = question_context(pipeline, sample)
            ids = generate_tokens(pipeline.model, [context], max_length=self.settings.max_length)[0]
            ended = len(ids) < self.settings.max_length
            self._answers.append(ids + [special.eos] * ended)

    def __call__(self, pipeline: BagelPipeline) -> dict[str, float]:
        if not self._answers:
            raise RuntimeError("TextAgreement: prepare must have seen the dense model, got no call")
        special = pipeline.model.config.special_tokens
        agreed, tokens, loss, reference_tokens = 0, 0, 0.0, 0
        for sample, answer in zip(self.samples, self._answers, strict=True):
            context = question_context(pipeline, sample)
            logits = _continue(pipeline, context, answer)
            wanted = torch.tensor(answer[1:], device=logits.device)
            agreed += int((logits.argmax(-1) == wanted).sum())
            tokens += len(wanted)
            if sample.answer is not None:
                ids = [special.bos, *pipeline.tokenizer.encode(sample.answer), special.eos]
                logits = _continue(pipeline, context, ids)
                wanted = torch.tensor(ids[1:], device=logits.device)
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            reference_tokens += len(wanted)
        mean = min(loss / reference_tokens, _MAX_LOSS)
        return {"text_agreement": agreed / tokens, "perplexity": math.exp(mean)}


def _continue(pipeline: BagelPipeline, context: KVCache, ids: Sequence[int]) -> Tensor:
    """Returns the logits [L - 1, vocab_size] for all tokens but the first."""
    return pipeline.model.text_logits([context.fork()], [ids[:-1]])[0]
