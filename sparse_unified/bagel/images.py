# SPDX-License-Identifier: Apache-2.0
"""Images to tensors and back: files, colour, size and range as the VAE and the ViT expect them."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import context, optional, require
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.bagel.vision import unpatchify
from sparse_unified.checkpoint.files import open_source

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_PIXELS = 14 * 14 * 9 * 1024
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MOST_PIXELS = 1 << 26
# Pixels along a side of a tile: four, which overlap by 128 pixels, are an image of 1024 x 1024.
TILE = 576
_PREVIEW = 256
_LOG = logging.getLogger(__name__)


def open_image(source: str | os.PathLike[str] | BinaryIO, *, where: str) -> Image:
    """Reads an image, whole: the first frame, upright as its EXIF orientation says.

    The official code ignores the orientation and sees images of phones on their side.

    Args:
        source: a file, or its opened contents. PNG, JPEG, WebP, GIF, BMP and TIFF of up to 2^26
            pixels are read; formats that Pillow reads by running other programs are not.
        where: whose argument it is, for the message of a ValueError.
    """
    name, reason = "an image", "a file of another or a damaged format"
    with context(where), ExitStack() as files:
        stream: Any = source
        if isinstance(source, (str, os.PathLike)):
            name, stream = str(source), files.enter_context(open_source(Path(source)))
        try:
            image: Image = optional("PIL.Image").open(stream, formats=_FORMATS)
            if image.width * image.height > _MOST_PIXELS:
                reason = f"{image.width} x {image.height} pixels, more than {_MOST_PIXELS}"
                raise ValueError(reason)
            image.load()
            optional("PIL.ImageOps").exif_transpose(image, in_place=True)
        except Exception as error:  # plugins raise errors of many kinds for damaged files
            raise ValueError(f"{name} must be a readable image, got {reason}") from error
        return image


def to_rgb(image: Image) -> Image:
    """Returns the image in RGB of 8 bits; transparent parts are laid over white. ValueError: it
    cannot be read, or its values are floating point numbers, of which no range is known."""
    pil = optional("PIL.Image")
    holds = image.mode != "F" and 0 not in image.size
    found = f"mode {image.mode} and size {image.size}"
    require(holds, "image must hold pixels of 8 or 16 bits a channel", found)
    try:
        if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would clip to 255
            values = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = pil.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode != "RGBA" and image.info.get("transparency") is None:
            return image.convert("RGB")
        image = image.convert("RGBA")
    except Exception as error:  # files are read here, if they were only opened before
        raise ValueError(f"image must be readable, got {str(error) or repr(error):.120}") from error
    white = pil.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def to_image(pixels: Tensor) -> Image:
    """Turns pixels [3, H, W] in [-1, 1] into an image; values outside are clamped."""
    bytes_ = ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return optional("PIL.Image").fromarray(bytes_.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """Resizes an image to sides between two limits that are multiples of a stride.

    Args:
        max_side: limit of the longer side in pixels, which wins.
        min_side: limit of the shorter side.
        stride: both sides become multiples of it.
        max_pixels: limit of the area.

    Source: `MaxLongEdgeMinShortEdgeResize` and `ImageTransform` of BAGEL.
    """

    max_side: int
    min_side: int
    stride: int
    max_pixels: int = _MAX_PIXELS

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height that an image of this size is resized to."""

        def scaled(scale: float) -> tuple[int, int]:
            sides = (round(round(side * scale) / self.stride) for side in (width, height))
            across, down = (max(self.stride, count * self.stride) for count in sides)
            return across, down

        scale = min(self.max_side / max(width, height), 1.0)
        width, height = scaled(max(scale, self.min_side / min(width, height)))
        if width * height > self.max_pixels:
            # As in the source the area ratio scales each side, which undershoots the limit.
            width, height = scaled(self.max_pixels / (width * height))
        if max(width, height) > self.max_side:
            width, height = scaled(self.max_side / max(width, height))
        return width, height

    def resize(self, image: Image) -> Image:
        """Returns the image at its new size, by bicubic interpolation."""
        return image.resize(self.size(*image.size), optional("PIL.Image").Resampling.BICUBIC)

    def __call__(self, image: Image) -> Tensor:
        """Returns the resized RGB image as pixels [3, H, W] fp32 in [-1, 1]."""
        return to_pixels(self.resize(to_rgb(image)))


def to_pixels(image: Image) -> Tensor:
    """Returns an RGB image as pixels [3, H, W] fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 255 * 2 - 1


def transforms(config: BagelConfig) -> tuple[ImageTransform, ImageTransform]:
    """Returns the transform for the VAE, to sides of 512 to 1024, and that for the ViT, to 224 to
    980, or less if the model takes less."""
    made = []
    for least, most, stride, count in (
        (512, 1024, config.latent_downsample, config.max_latent_size),
        (224, 980, config.vision.patch_size, config.vit_max_num_patch_per_side),
    ):
        limit = min(most, count * stride)
        made.append(ImageTransform(max_side=limit, min_side=min(least, limit), stride=stride))
    return made[0], made[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextImage:
    """An image a sequence looks at: through the VAE, through the ViT, or both, in this order."""

    latent: Tensor | None = None  # scaled, of the VAE, [C, h, w]
    vit_pixels: Tensor | None = None  # normalised, [3, H, W]


class ImageProcessor:
    """The transforms of one model, which limits sizes, and its autoencoder."""

    def __init__(self, config: BagelConfig, vae: AutoEncoder) -> None:
        self.config = config
        self.vae = vae
        self.for_vae, self.for_vit = transforms(config)

    def encode(self, image: Image, *, vae: bool) -> ContextImage:
        """Prepares an image for a context, through the ViT and, to be edited, the VAE too; the ViT
        sees it at the size it has for the VAE, as in the source."""
        image = self.for_vae.resize(to_rgb(image))
        latent = self.vae.encode(self.for_vae(image)[None])[0] if vae else None
        return ContextImage(latent=latent, vit_pixels=self.for_vit(image))

    def decode(
        self, tokens: Tensor, size: tuple[int, int], *, tiled: bool = False, small: bool = False
    ) -> Image:
        """Turns latent tokens [N, p * p * C] into an image of `size` (height, width) pixels.

        It is done in tiles, too, where decoding at once does not fit on the device. A small one is
        a preview of up to 256 pixels a side: latent pixels are averaged first.
        """
        grid = self.config.token_grid(*size)
        latent = unpatchify(tokens, *grid, self.config.latent_patch_size)[None]
        if small:
            latent = F.avg_pool2d(latent, -(-max(size) // _PREVIEW), ceil_mode=True)
        if not tiled:
            try:
                return to_image(self.vae.decode(latent)[0])
            except torch.OutOfMemoryError as error:
                first_line = str(error).partition(".")[0]
                _LOG.warning("image of %d x %d is decoded in tiles: %s", *size, first_line)
        # Not above, where the error still holds what was computed.
        return to_image(self.vae.decode(latent, tile=TILE // self.vae.config.downsample)[0])
