# SPDX-License-Identifier: Apache-2.0
"""What an image is generated from, and the two poorer contexts that guidance compares it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.model import Bagel


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextImage:
    """An image a sequence looks at: through the VAE, through the ViT, or both, in this order.

    Args:
        latent: scaled VAE latent [C, h, w], or None.
        vit_pixels: normalised pixels [3, H, W], or None.
    """

    latent: Tensor | None = None
    vit_pixels: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The contexts of one image: all of it, without the prompt, and without the images."""

    full: Context
    without_text: Context
    without_image: Context


def see_images(
    model: Bagel, contexts: Sequence[Context], images: Sequence[Sequence[ContextImage]]
) -> None:
    """Lets each context see its images, in order; contexts may have different numbers of them."""
    for turn in range(max((len(own) for own in images), default=0)):
        pairs = [
            (context, own[turn])
            for context, own in zip(contexts, images, strict=True)
            if turn < len(own)
        ]
        through_vae = [(c, i.latent) for c, i in pairs if i.latent is not None]
        if through_vae:
            model.prefill_latents([c for c, _ in through_vae], [x for _, x in through_vae])
        through_vit = [(c, i.vit_pixels) for c, i in pairs if i.vit_pixels is not None]
        if through_vit:
            model.prefill_vit([c for c, _ in through_vit], [x for _, x in through_vit])


def build_guidance(
    model: Bagel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[ContextImage]] | None = None,
    system_ids: Sequence[int] | None = None,
) -> list[Guidance]:
    """Reads prompts, with the images before them, into the contexts that guidance needs.

    Args:
        prompt_ids: token ids of each prompt, without bos and eos.
        images: images before each prompt; None for none.
        system_ids: token ids of a text before everything, kept in all three contexts.

    Returns:
        One guidance per prompt. Without images `without_image` is a fork of `full`, so that it is
        recognised as the same and not computed twice.
    """
    count = len(prompt_ids)
    full = model.new_contexts(count)
    if system_ids is not None:
        model.prefill_text(full, [system_ids] * count)
    without_image = [context.fork() for context in full]
    seen = images if images is not None else [()] * count
    see_images(model, full, seen)
    without_text = [context.fork() for context in full]
    model.prefill_text(full, prompt_ids)
    edited = [i for i in range(count) if seen[i]]
    if edited:
        model.prefill_text([without_image[i] for i in edited], [prompt_ids[i] for i in edited])
    return [
        Guidance(
            full=full[i],
            without_text=without_text[i],
            without_image=without_image[i] if seen[i] else full[i].fork(),
        )
        for i in range(count)
    ]
