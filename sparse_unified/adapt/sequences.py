# SPDX-License-Identifier: Apache-2.0
"""Training sequences from texts, pictures and latents, as BAGEL composes them.

A picture is generated from what comes before it in its sequence; each of these conditions is left
out now and then, so that the model also learns the poorer contexts that guidance compares with.
Draws come from the generator that is passed, in a fixed order and number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.packing import LatentSegment, Segment, TextSegment, VitSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """How sequences are drawn. Defaults are those of BAGEL's training.

    Args:
        timestep_shift: s of t <- s t / (1 + (s - 1) t); above 1 trains more near the noise.
        text_dropout: how often the text before a picture to generate is left out.
        vit_dropout, vae_dropout: how often the ViT, or the VAE, view of a picture to edit is.

    Raises:
        ValueError: a value is out of range.
    """

    timestep_shift: float = 1.0
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.timestep_shift < float("inf"):
            raise ValueError(
                "SequenceConfig: timestep_shift must be finite and above 0, "
                f"got {self.timestep_shift!r}"
            )
        for name in ("text_dropout", "vit_dropout", "vae_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"SequenceConfig: {name} must be from 0 to 1, got {getattr(self, name)!r}"
                )


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
) -> list[Segment]:
    """Returns a text and a picture to generate from it.

    Args:
        special_tokens: markers of the model.
        prompt_ids: of the text, without bos and eos.
        latent: scaled latent [C, h, w] of the picture.
        generator: of time, noise and dropout.
        config: how they are drawn.
    """
    return editing_sequence(special_tokens, (), prompt_ids, latent, generator, config)


def editing_sequence(
    special_tokens: SpecialTokens,
    sources: Sequence[ContextImage],
    prompt_ids: Sequence[int],
    latent: Tensor,
    generator: torch.Generator,
    config: SequenceConfig | None = None,
) -> list[Segment]:
    """Returns pictures, an instruction, and the picture to generate from them.

    Args:
        sources: the pictures before, each through the VAE, the ViT, or both, in this order.
        prompt_ids, latent, generator, config: as in `generation_sequence`.
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
        segments.append(text(special_tokens, prompt_ids))
    return [*segments, LatentSegment(latent=latent, time=time, noise=noise)]


def understanding_sequence(
    special_tokens: SpecialTokens,
    pictures: Sequence[Tensor],
    question_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> list[Segment]:
    """Returns pictures, a question about them, and the answer to predict.

    Args:
        special_tokens: markers of the model.
        pictures: normalised pixels [3, H, W] for the ViT.
        question_ids: without bos and eos; may be empty, as for a caption.
        answer_ids: without bos and eos, at least one.
    """
    segments: list[Segment] = [VitSegment(pixels=pixels) for pixels in pictures]
    if question_ids:
        segments.append(text(special_tokens, question_ids))
    return [*segments, text(special_tokens, answer_ids, predict=True)]


def text(
    special_tokens: SpecialTokens, ids: Sequence[int], *, predict: bool = False
) -> TextSegment:
    """Returns a text between bos and eos; `predict` trains the model to write it and its eos."""
    return TextSegment(token_ids=[special_tokens.bos, *ids, special_tokens.eos], predict=predict)
