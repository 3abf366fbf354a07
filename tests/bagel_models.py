# SPDX-License-Identifier: Apache-2.0
"""Models of the recorded cases, and images drawn with them, for the tests of BAGEL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unified.bagel import Bagel, BagelConfig, Execution, SamplingConfig
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.sampler import build_guidance, initial_noise, sample_latents

SPECIAL = SpecialTokens(bos=3, eos=4, start_of_image=5, end_of_image=6)
EXPERTS = {"num_experts": 4, "top_k": 2}


def random_model(config: BagelConfig, **factory: Any) -> Bagel:
    """A model whose routers are not zero."""
    model = Bagel(config, **factory)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model


def draw(
    model: Bagel,
    prompts: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[ContextImage]] | None = None,
    grid: tuple[int, int] = (2, 3),
    noise: Sequence[Tensor] | None = None,
    run: Execution | None = None,
    on_step: Any = None,
    **options: Any,
) -> list[Tensor]:
    """Denoises one image per prompt from noise of seed 0, 1, ..., by default 6 steps."""
    config = SamplingConfig(**{"num_timesteps": 7} | options)
    tokens = grid[0] * grid[1]
    if noise is None:
        noise = [initial_noise(tokens, 16, seed) for seed in range(len(prompts))]
    guidance = build_guidance(model, prompts, images=images)
    grids = [grid] * len(prompts)
    return sample_latents(model, guidance, noise, grids, config, execution=run, on_step=on_step)
