# SPDX-License-Identifier: Apache-2.0
"""Between pictures and what the decoder works on: context images in, latent tokens out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_unified._common import optional
from sparse_unified.bagel.conditioning import ContextImage
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.transforms import to_image, to_rgb, vae_transform, vit_transform
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.bagel.vision import unpatchify

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: str | os.PathLike[str], *, where: str) -> Image:
    """Reads a picture from a file, whole.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            image: Image = optional("PIL.Image").open(stream)
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "a file of another or a damaged format"
        raise ValueError(f"{where}: {path} must be a readable picture, got {reason}") from error
    return image


class Pictures:
    """The transforms and the autoencoder of one model.

    Args:
        config: the model, which limits sizes.
        vae: its autoencoder.
    """

    def __init__(self, config: BagelConfig, vae: AutoEncoder) -> None:
        self.config = config
        self.vae = vae
        self.for_vae = vae_transform(config)
        self.for_vit = vit_transform(config)

    def look(self, image: Image, *, vae: bool) -> ContextImage:
        """Prepares a picture for a context, through the ViT and, to be edited, the VAE too.

        As in the source the ViT sees the picture at the size it has for the VAE.
        """
        image = self.for_vae.resize(to_rgb(image))
        latent = self.vae.encode(self.for_vae(image)[None])[0] if vae else None
        return ContextImage(latent=latent, vit_pixels=self.for_vit(image))

    def draw(self, tokens: Tensor, size: tuple[int, int]) -> Image:
        """Turns latent tokens [N, p * p * C] into a picture of `size` (height, width) pixels."""
        grid = self.config.token_grid(*size, where="draw")
        latent = unpatchify(tokens, *grid, self.config.latent_patch_size)
        return to_image(self.vae.decode(latent[None])[0])
