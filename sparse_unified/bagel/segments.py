# SPDX-License-Identifier: Apache-2.0
"""Training sequences: what they consist of, and what a packed batch of them is.

A sequence is a list of segments. Text is causal; an image sees all of itself; both see what comes
before them in their sequence, except noised latents, which nothing after them sees. Rotary
positions are those of inference: a token of text takes one, an image takes one for all its tokens,
and a noised image leaves its position to what follows.

Source: the packed training sequences of BAGEL (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_unified.bagel.joint_attention import JointPacking


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSegment:
    """Text, as token ids with bos and eos.

    Attributes:
        token_ids: at least one id.
        predict: the loss asks for every token after the first.
    """

    token_ids: Sequence[int]
    predict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VitSegment:
    """An image seen through the ViT: normalised pixels [3, H, W]."""

    pixels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSegment:
    """An image as its scaled VAE latent.

    Attributes:
        latent: [C, h, w], clean.
        time: None for an image that is looked at (time 0); else what the loss asks for: the
            velocity noise - latent at (1 - time) * latent + time * noise.
        noise: [C, h, w], with a time only.

    Raises:
        ValueError: one of time and noise without the other, or a time outside [0, 1].
    """

    latent: Tensor
    time: float | None = None
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.time is None) != (self.noise is None):
            raise ValueError(
                "LatentSegment: time and noise must be given together, got only "
                f"{'noise' if self.time is None else 'time'}"
            )
        if self.time is not None and not 0 <= self.time <= 1:
            raise ValueError(f"LatentSegment: time must be from 0 to 1, got {self.time}")
        if self.noise is not None and self.noise.shape != self.latent.shape:
            raise ValueError(
                f"LatentSegment: noise must have the shape of latent, {list(self.latent.shape)}, "
                f"got {list(self.noise.shape)}"
            )


Segment = TextSegment | VitSegment | LatentSegment


# Without slots, as what it holds: between processes, those are copied one by one in Python.
@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Packed sequences. U und tokens, G gen tokens, all tensors on one device.

    Attributes:
        und_ids: [U] int64, ids of text and markers; 0 where a ViT token stands.
        label_rows, labels: [n] int64, rows of the und stream and the token that follows each.
        vit_patches: [V, p * p * 3]; vit_positions: [V] int64, in the tables of the ViT and of the
            decoder alike; vit_lengths: patches of each image.
        latents: [G, p * p * C] fp32, noised; latent_positions: [G] int64.
        times: [images] fp32; time_rows: [G] int64, the image of each token.
        velocity_rows: [m] int64, gen tokens the loss asks for; velocities: [m, p * p * C] fp32.
        packing: rotary positions, groups and masks.
        text_tokens, image_tokens: n and m. num_tokens: U + G. num_sequences: how many.
    """

    und_ids: Tensor
    label_rows: Tensor
    labels: Tensor
    vit_patches: Tensor | None
    vit_positions: Tensor | None
    vit_lengths: tuple[int, ...]
    latents: Tensor | None
    latent_positions: Tensor | None
    times: Tensor | None
    time_rows: Tensor | None
    velocity_rows: Tensor
    velocities: Tensor
    packing: JointPacking
    text_tokens: int
    image_tokens: int
    num_tokens: int
    num_sequences: int

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Returns the same on a device."""
        if self.und_ids.device == torch.device(device):
            return self
        moved: TrainingBatch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init}
        return replace(value, **own)
    return value
