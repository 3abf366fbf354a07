# SPDX-License-Identifier: Apache-2.0
"""The training of the miniature's autoencoder, from nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenes import CELLS, picture_of, properties, templates
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.mini.model import VAE

_NOISE = 0.3  # most of what is added to latents of unit variance: a sampler is not exact either


def draw_pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws scenes without a prompt: each cell empty, or any object, as often as not.

    Returns:
        pixels [count, 3, 48, 48], and the kind [count, 9] of each cell (`scenes.templates`).
    """
    cells = templates()
    kinds = torch.randint(1, len(cells), (count, CELLS), generator=generator)
    kinds *= torch.rand(count, CELLS, generator=generator) < 0.5
    return picture_of(cells[kinds]), kinds


def train_autoencoder(
    steps: int = 2000,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> AutoEncoder:
    """Returns an autoencoder whose scaled latents of scenes have mean 0 and variance 1.

    A kind of cell has one code, whatever is around it: the sum of one of its shape and one of its
    own. These are learned together with the decoder, from noisy sums, and the encoder learns to
    give them. That of the shape lets cells agree which of them holds which object; that of its own
    is what a model has to remember.

    Args:
        progress: called with each step and the mean squared error of its pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoEncoder(VAE)
        members = _members()
        codes = torch.nn.Parameter(torch.randn(members.shape[1], VAE.z_channels, 2, 2))
    parameters = [*vae.parameters(), codes]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    for step in range(1, steps + 1):
        pixels, kinds = draw_pictures(batch_size, generator)
        latents = picture_of(torch.einsum("bcm,mzhw->bczhw", members[kinds], codes))
        noise = _NOISE * torch.rand(batch_size, 1, 1, 1, generator=generator)
        noisy = latents + noise * torch.randn(latents.shape, generator=generator)
        error = F.mse_loss(vae.decoder(noisy / VAE.scale_factor + VAE.shift_factor), pixels)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        spread = (mean.square() + (deviation - 1).square()).mean()
        found = vae.encoder(pixels).chunk(2, dim=1)[0]
        given = F.mse_loss(VAE.scale_factor * (found - VAE.shift_factor), latents.detach())
        optimizer.zero_grad(set_to_none=True)
        (error + 0.1 * spread + 0.1 * given).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, float(error.detach()))
    return vae.eval()


def _members() -> Tensor:
    """Returns which codes the kinds of cells are the sum of, [109, 115], squares adding up to 1."""
    parts = [{kind[0], " ".join(kind)} for kind in properties()]
    names = sorted(set.union(*parts))
    members = torch.tensor([[float(name in own) for name in names] for own in parts])
    return members / members.norm(dim=1, keepdim=True)
