# SPDX-License-Identifier: Apache-2.0
"""The dense model that the recorded behaviour began with, and its constructed autoencoder.

The autoencoder has FLUX's shape, and its latent is the picture: three channels, scaled latent =
gain * pixels, and back; where it downsamples, it takes the first pixel of each block.

How the identity gets through a group norm and a SiLU: a group holds x, -x, C, -C, so that its mean
is 0 and its deviation C / sqrt(2) up to a factor 1 + mean(x^2) / (2 C^2); and silu(x) - silu(-x)
= x exactly. Residual and attention branches end in weights of zero.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_unified.bagel.config import VAEConfig
from sparse_unified.bagel.vae import AutoEncoder, Downsample, Upsample

_PER_GROUP = 4  # x, -x, C, -C
_CONSTANT = 64.0


def write_dense(directory: str | Path) -> Path:
    """Writes the model directory; its weights are kept in bf16."""
    directory = Path(directory)
    shutil.copytree(Path(__file__).parent / "dense", directory)
    stored = load_file(directory / "ema.safetensors")
    save_file({key: t.float() for key, t in stored.items()}, directory / "ema.safetensors")
    save_file(identity_autoencoder(1.0, 2).state_dict(), directory / "ae.safetensors")
    return directory


@torch.no_grad()
def identity_autoencoder(gain: float, downsample: int = 1) -> AutoEncoder:
    """Returns the autoencoder with scaled latent [B, 3, H / f, W / f] = gain * pixels.

    Args:
        gain: see above.
        downsample: f, 1 or 2. Pictures of blocks of f x f equal pixels come back as they were.

    The relative error is mean(x^2) / (2 * 64^2), about 1e-4 for pixels in [-1, 1].
    """
    config = VAEConfig(
        ch=32 * _PER_GROUP, ch_mult=(1,) * downsample, num_res_blocks=1, z_channels=3
    )
    vae = AutoEncoder(config).eval()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters():
                parameter.zero_()
    for module in vae.modules():
        # Kept is the pixel in the middle or, padded to the right and below, the first of a block.
        if isinstance(module, (Downsample, Upsample)):
            at = int(isinstance(module, Upsample))
            module.conv.weight[:, :, at, at] = torch.eye(len(module.conv.weight))
    # Pixels in, unscaled latent out: latent / scale_factor + shift_factor.
    factor, shift = gain / config.scale_factor, config.shift_factor
    _spread_(vae.encoder.conv_in, 1.0, 0.0)
    _gather_(vae.encoder.norm_out, vae.encoder.conv_out, factor, shift)
    _spread_(vae.decoder.conv_in, 1 / factor, -shift / factor)
    _gather_(vae.decoder.norm_out, vae.decoder.conv_out, 1.0, 0.0)
    return vae


def _spread_(conv: nn.Conv2d, factor: float, shift: float) -> None:
    """Lets a convolution put factor * x + shift of channel i into group i, as x, -x, C, -C."""
    assert conv.bias is not None
    for i in range(3):
        for place, sign in ((0, 1.0), (1, -1.0)):
            conv.weight[_PER_GROUP * i + place, i, 1, 1] = sign * factor
            conv.bias[_PER_GROUP * i + place] = sign * shift
            conv.bias[_PER_GROUP * i + 2 + place] = sign * _CONSTANT


def _gather_(norm: nn.GroupNorm, conv: nn.Conv2d, factor: float, shift: float) -> None:
    """Undoes `_spread_` behind the norm: channel i becomes factor * x + shift."""
    assert conv.bias is not None
    norm.weight.fill_(_CONSTANT / 2**0.5)
    norm.bias.zero_()
    for i in range(3):
        for place, sign in ((0, 1.0), (1, -1.0)):
            conv.weight[i, _PER_GROUP * i + place, 1, 1] = sign * factor
        conv.bias[i] = shift
