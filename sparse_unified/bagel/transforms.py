# SPDX-License-Identifier: Apache-2.0
"""Pictures to tensors and back: colour, size and range as the VAE and the ViT expect them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import optional
from sparse_unified.bagel.config import BagelConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_PIXELS = 14 * 14 * 9 * 1024


def to_rgb(image: Image) -> Image:
    """Returns the picture in RGB; transparent parts are laid over white."""
    if image.mode != "RGBA" and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = optional("PIL.Image").new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def to_image(pixels: Tensor) -> Image:
    """Turns pixels [3, H, W] in [-1, 1] into a picture; values outside are clamped."""
    bytes_ = ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return optional("PIL.Image").fromarray(bytes_.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """Resizes a picture to sides between two limits that are multiples of a stride.

    Args:
        max_side, min_side: limits of the longer and the shorter side in pixels; the upper one wins.
        stride: both sides become multiples of it.
        max_pixels: limit of the area.

    Source: `MaxLongEdgeMinShortEdgeResize` and `ImageTransform` of BAGEL.
    """

    max_side: int
    min_side: int
    stride: int
    max_pixels: int = _MAX_PIXELS

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height that a picture of this size is resized to."""
        scale = min(self.max_side / max(width, height), 1.0)
        scale = max(scale, self.min_side / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > self.max_pixels:
            # As in the source the area ratio scales each side, which undershoots the limit.
            width, height = self._scaled(width, height, self.max_pixels / (width * height))
        if max(width, height) > self.max_side:
            width, height = self._scaled(width, height, self.max_side / max(width, height))
        return width, height

    def resize(self, image: Image) -> Image:
        """Returns the picture at its new size, by bicubic interpolation."""
        return image.resize(self.size(*image.size), optional("PIL.Image").Resampling.BICUBIC)

    def __call__(self, image: Image) -> Tensor:
        """Returns the resized RGB picture as pixels [3, H, W] fp32 in [-1, 1]."""
        pixels = torch.from_numpy(np.array(self.resize(to_rgb(image)), dtype=np.float32))
        return pixels.permute(2, 0, 1) / 255 * 2 - 1

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        width, height = (
            max(self.stride, round(round(side * scale) / self.stride) * self.stride)
            for side in (width, height)
        )
        return width, height


def vae_transform(config: BagelConfig) -> ImageTransform:
    """Returns the transform for the VAE: sides 512 to 1024, or less if the model takes less."""
    limit = min(1024, config.max_latent_size * config.latent_downsample)
    return ImageTransform(max_side=limit, min_side=min(512, limit), stride=config.latent_downsample)


def vit_transform(config: BagelConfig) -> ImageTransform:
    """Returns the transform for the ViT: sides 224 to 980, or less if the model takes less."""
    patch_size = config.vision.patch_size
    limit = min(980, config.vit_max_num_patch_per_side * patch_size)
    return ImageTransform(max_side=limit, min_side=min(224, limit), stride=patch_size)
