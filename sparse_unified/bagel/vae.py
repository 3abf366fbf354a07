# SPDX-License-Identifier: Apache-2.0
"""The autoencoder between pixels and latents (FLUX), under the key names of ae.safetensors."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified._common import require
from sparse_unified.bagel.config import VAEConfig


class Norm(nn.GroupNorm):
    """A group norm of 32 groups, then a SiLU."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__(32, channels, eps=1e-6, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = Norm(inputs, **factory)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, **factory)
        self.norm2 = Norm(outputs, **factory)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, **factory)
        is_same = inputs == outputs
        self.nin_shortcut = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return self.nin_shortcut(x) + hidden


class AttnBlock(nn.Module):
    """x + attention over all pixels, one head of all channels."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6, **factory)
        for name in ("q", "k", "v", "proj_out"):
            self.register_module(name, nn.Conv2d(channels, channels, 1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self._modules
        normed = part["norm"](x)
        q, k, v = (part[name](normed).flatten(2).mT[:, None] for name in ("q", "k", "v"))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        return x + part["proj_out"](mixed[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halves the resolution; the padding goes to the right and the bottom only."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpLevels(nn.Sequential):
    """Levels of rising resolution, of which the first is the last to run."""

    def forward(self, x: Tensor) -> Tensor:
        for level in reversed(self):
            x = level(x)
        return x


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _middle(channels: int, **factory: Any) -> nn.Sequential:
    """Attention between two residual blocks, at the lowest resolution."""
    first, last = (ResnetBlock(channels, channels, **factory) for _ in range(2))
    return _named(block_1=first, attn_1=AttnBlock(channels, **factory), block_2=last)


def _level(inputs: int, outputs: int, num_blocks: int, **factory: Any) -> nn.Sequential:
    """The residual blocks of one resolution; what changes to the next one is added to them."""
    pairs = pairwise([inputs] + [outputs] * num_blocks)
    return _named(block=nn.Sequential(*(ResnetBlock(*pair, **factory) for pair in pairs)))


def _encoder(config: VAEConfig, **factory: Any) -> nn.Sequential:
    """Pixels [B, in, H, W] in [-1, 1] -> mean and log variance [B, 2 z, H / f, W / f]."""
    first, *widths = config.ch, *(config.ch * multiple for multiple in config.ch_mult)
    pairs = pairwise([first, *widths])
    levels = [_level(*pair, config.num_res_blocks, **factory) for pair in pairs]
    for level, width in zip(levels[:-1], widths, strict=False):
        level.add_module("downsample", Downsample(width, **factory))
    return _named(
        conv_in=nn.Conv2d(config.in_channels, first, 3, padding=1, **factory),
        down=nn.Sequential(*levels),
        mid=_middle(widths[-1], **factory),
        norm_out=Norm(widths[-1], **factory),
        conv_out=nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1, **factory),
    )


def _decoder(config: VAEConfig, **factory: Any) -> nn.Sequential:
    """Latents [B, z, h, w] -> pixels [B, out, h * f, w * f]."""
    widths = [config.ch * multiple for multiple in config.ch_mult]
    pairs = zip([*widths[1:], widths[-1]], widths, strict=True)
    levels = [_level(*pair, config.num_res_blocks + 1, **factory) for pair in pairs]
    for level, width in zip(levels[1:], widths[1:], strict=True):
        level.add_module("upsample", Upsample(width, **factory))
    return _named(
        conv_in=nn.Conv2d(config.z_channels, widths[-1], 3, padding=1, **factory),
        mid=_middle(widths[-1], **factory),
        up=UpLevels(*levels),
        norm_out=Norm(widths[0], **factory),
        conv_out=nn.Conv2d(widths[0], config.out_ch, 3, padding=1, **factory),
    )


class AutoEncoder(nn.Module):
    """Pixels to scaled latents and back. The latent is the posterior mean: encoding is repeatable.

    Args:
        config: what it is made of.
        factory: device and dtype of the parameters.

    Source: the autoencoder of FLUX as BAGEL uses it, which samples from the posterior instead.
    """

    def __init__(self, config: VAEConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = _encoder(config, **factory)
        self.decoder: Any = _decoder(config, **factory)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder runs."""
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are stored as, and what it computes in."""
        return self.decoder.conv_in.weight.dtype

    def _input(self, x: Tensor, name: str, channels: int, step: int) -> Tensor:
        shape = list(x.shape)
        fits = len(shape) == 4 and shape[1] == channels and not any(n % step for n in shape[2:])
        rule = f"shape [B, {channels}, H, W] with sides that are multiples of {step}"
        require(fits, f"AutoEncoder: {name} must have {rule}", shape)
        return x.to(device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Maps pixels [B, 3, H, W] in [-1, 1] to latents [B, z, H / f, W / f]."""
        config = self.config
        pixels = self._input(pixels, "pixels", config.in_channels, config.downsample)
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return config.scale_factor * (mean - config.shift_factor)

    @torch.no_grad()
    def decode(self, latent: Tensor, *, tile: int = 0) -> Tensor:
        """Maps latents [B, z, h, w] to pixels [B, 3, h * f, w * f], about in [-1, 1].

        Args:
            tile: latent pixels along a side of the tiles that are decoded one after the other, and
                blended where they overlap; 0 decodes all at once. Norms and attention of a tile
                see no other, so pixels differ a little.
        """
        config = self.config
        latent = self._input(latent, "latent", config.z_channels, 1)
        latent = latent / config.scale_factor + config.shift_factor
        height, width = latent.shape[2:]
        if not tile or max(height, width) <= tile:
            return self.decoder(latent)
        scale, overlap = config.downsample, max(tile * 2 // 9, 1)

        def spans(length: int) -> list[slice]:
            starts = range(0, max(length - overlap, 1), tile - overlap)
            firsts = (max(min(n, length - tile), 0) for n in starts)
            return [slice(n, min(n + tile, length)) for n in firsts]

        shape = (len(latent), config.out_ch, height * scale, width * scale)
        pixels, total = (torch.zeros(s, device=latent.device) for s in (shape, shape[2:]))
        for rows in spans(height):
            for columns in spans(width):
                part = self.decoder(latent[:, :, rows, columns])
                # The weight of a pixel is its distance from the edge, up to that of an overlap.
                steps = (torch.arange(n, device=part.device) + 0.5 for n in part.shape[2:])
                down, across = (x.minimum(x.flip(0)).clamp(max=overlap * scale) for x in steps)
                weight = down[:, None] * across
                place = [slice(own.start * scale, own.stop * scale) for own in (rows, columns)]
                pixels[:, :, place[0], place[1]] += weight * part
                total[place[0], place[1]] += weight
        return (pixels / total).to(latent.dtype)
