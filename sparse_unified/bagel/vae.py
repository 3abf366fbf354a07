# SPDX-License-Identifier: Apache-2.0
"""The autoencoder between pixels and latents (FLUX), under the key names of ae.safetensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.bagel.config import VAEConfig


def _norm(channels: int, **factory: Any) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6, **factory)


def _conv3(inputs: int, outputs: int, **factory: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **factory)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, **factory)
        self.conv1 = _conv3(inputs, outputs, **factory)
        self.norm2 = _norm(outputs, **factory)
        self.conv2 = _conv3(outputs, outputs, **factory)
        self.nin_shortcut = (
            nn.Conv2d(inputs, outputs, 1, **factory) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class AttnBlock(nn.Module):
    """x + attention over all pixels, one head of all channels."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.norm = _norm(channels, **factory)
        self.q = nn.Conv2d(channels, channels, 1, **factory)
        self.k = nn.Conv2d(channels, channels, 1, **factory)
        self.v = nn.Conv2d(channels, channels, 1, **factory)
        self.proj_out = nn.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape."""
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        return x + self.proj_out(mixed[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halves the resolution; the padding goes to the right and the bottom only."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, **factory)
        self.attn_1 = AttnBlock(channels, **factory)
        self.block_2 = ResnetBlock(channels, channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change to the next one, if there is one.

    Args:
        resample: "downsample" or "upsample"; "" stays at this resolution.
    """

    def __init__(
        self, inputs: int, outputs: int, num_blocks: int, resample: str = "", **factory: Any
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(outputs if block else inputs, outputs, **factory)
            for block in range(num_blocks)
        )
        if resample:
            kind = Downsample if resample == "downsample" else Upsample
            self.register_module(resample, kind(outputs, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H', W']."""
        blocks, *resample = self.children()
        assert isinstance(blocks, nn.ModuleList)
        for module in (*blocks, *resample):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Pixels [B, in, H, W] -> mean and log variance [B, 2 z, H / f, W / f]."""

    def __init__(self, config: VAEConfig, **factory: Any) -> None:
        super().__init__()
        self.conv_in = _conv3(config.in_channels, config.ch, **factory)
        widths = [config.ch, *(config.ch * multiple for multiple in config.ch_mult)]
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            resample = "downsample" if i < len(config.ch_mult) - 1 else ""
            self.down.append(Level(inputs, outputs, config.num_res_blocks, resample, **factory))
        self.mid = Middle(widths[-1], **factory)
        self.norm_out = _norm(widths[-1], **factory)
        self.conv_out = _conv3(widths[-1], 2 * config.z_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes pixels in [-1, 1]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, z, h, w] -> pixels [B, out, h * f, w * f]; `up.0` is the last level to run."""

    def __init__(self, config: VAEConfig, **factory: Any) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = _conv3(config.z_channels, widths[-1], **factory)
        self.mid = Middle(widths[-1], **factory)
        self.up = nn.ModuleList()
        for i, outputs in enumerate(widths):
            inputs = widths[min(i + 1, len(widths) - 1)]
            num_blocks, resample = config.num_res_blocks + 1, "upsample" if i else ""
            self.up.append(Level(inputs, outputs, num_blocks, resample, **factory))
        self.norm_out = _norm(widths[0], **factory)
        self.conv_out = _conv3(widths[0], config.out_ch, **factory)

    def forward(self, z: Tensor) -> Tensor:
        """Decodes unscaled latents."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


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
        self.encoder = Encoder(config, **factory)
        self.decoder = Decoder(config, **factory)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder runs."""
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are stored as, and what it computes in."""
        return self.decoder.conv_in.weight.dtype

    def _input(self, x: Tensor, name: str, channels: int, step: int) -> Tensor:
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % step or x.shape[3] % step:
            raise ValueError(
                f"AutoEncoder: {name} must have shape [B, {channels}, H, W] with sides that are "
                f"multiples of {step}, got {list(x.shape)}"
            )
        return x.to(device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Maps pixels [B, 3, H, W] in [-1, 1] to latents [B, z, H / f, W / f]."""
        config = self.config
        pixels = self._input(pixels, "pixels", config.in_channels, config.downsample)
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return config.scale_factor * (mean - config.shift_factor)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Maps latents [B, z, h, w] to pixels [B, 3, h * f, w * f], about in [-1, 1]."""
        config = self.config
        latent = self._input(latent, "latent", config.z_channels, 1)
        return self.decoder(latent / config.scale_factor + config.shift_factor)
