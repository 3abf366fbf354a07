# SPDX-License-Identifier: Apache-2.0
"""Training sequences from texts, images and latents as BAGEL composes them, and what they draw.

An image is generated from what comes before it in its sequence; each of these conditions is left
out now and then, so that the model also learns the unconditional contexts of guidance.
All randomness of a run is a function of its seed and of the place in the run, so a run that is
resumed, or runs on another number of processes, draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_unified.adapt.config import SequenceConfig
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.packing import LatentSegment, Segment, TextSegment, VitSegment

_ORDER, _SEQUENCE = 0, 1


def sequence_generator(seed: int, step: int, place: int) -> torch.Generator:
    """Returns what the sequence at a place of the batch of a step draws from."""
    return _generator(seed, _SEQUENCE, step, place)


def _generator(*numbers: int) -> torch.Generator:
    """Returns a CPU generator whose seed is a hash of the numbers."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def data_index(length: int, seed: int, position: int) -> int:
    """Returns which datum stands at a position of a run: a new permutation of all every epoch."""
    epoch, place = divmod(position, length)
    return _permutation(length, seed, epoch)[place]


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=_generator(seed, _ORDER, epoch)).tolist()
    return order


def draw_time(generator: torch.Generator, shift: float = 1.0) -> float:
    """Draws a time in (0, 1): the sigmoid of a standard normal number, shifted."""
    time = torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64)).item()
    return shift * time / (1 + (shift - 1) * time)


def generation_sequence(
    special_tokens: SpecialTokens,
    prompt_ids: Sequence[int],
    latent: Tensor,
    generator: torch.Generator,
    config: SequenceConfig | None = None,
    *,
    sources: Sequence[ContextImage] = (),
) -> list[Segment]:
    """Returns a text and an image to generate from it, or from the images before it.

    Args:
        special_tokens: markers of the model.
        prompt_ids: of the text, without bos and eos.
        latent: scaled latent [C, h, w] of the image.
        generator: of time, noise and dropout, in a fixed order and number.
        config: how they are drawn.
        sources: images to edit, each through the VAE, the ViT, or both, in this order.
    """
    config = config or SequenceConfig()
    time = draw_time(generator, config.timestep_shift)
    noise = torch.randn(latent.shape, generator=generator)
    text_chance, vit_chance, vae_chance = torch.rand(3, generator=generator).tolist()
    segments: list[Segment] = []
    for source in sources:
        if source.latent is not None and vae_chance >= config.vae_dropout:
            segments.append(LatentSegment(latent=source.latent))
        if source.vit_pixels is not None and vit_chance >= config.vit_dropout:
            segments.append(VitSegment(pixels=source.vit_pixels))
    if text_chance >= config.text_dropout:
        segments.append(_text(special_tokens, prompt_ids))
    return [*segments, LatentSegment(latent=latent, time=time, noise=noise)]


def understanding_sequence(
    special_tokens: SpecialTokens,
    images: Sequence[Tensor],
    question_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> list[Segment]:
    """Returns images [3, H, W] for the ViT, a question, which may be empty, and its answer."""
    segments: list[Segment] = [VitSegment(pixels=pixels) for pixels in images]
    if question_ids:
        segments.append(_text(special_tokens, question_ids))
    return [*segments, _text(special_tokens, answer_ids, predict=True)]


def _text(
    special_tokens: SpecialTokens, ids: Sequence[int], *, predict: bool = False
) -> TextSegment:
    """Returns a text between bos and eos; `predict` trains the model to write it and its eos."""
    return TextSegment(token_ids=[special_tokens.bos, *ids, special_tokens.eos], predict=predict)
