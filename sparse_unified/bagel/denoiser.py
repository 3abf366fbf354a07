# SPDX-License-Identifier: Apache-2.0
"""The step that is repeated: velocities of noisy images in contexts that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_unified.bagel.attention import Packing, pack
from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.embeddings import grid_positions

if TYPE_CHECKING:
    from sparse_unified.bagel.model import Bagel


class Denoiser:
    """Predicts d x / d t of several noisy images, each in several contexts, in one packed pass.

    What no step changes is computed once, here. A call then makes no tensor on the host and asks
    nothing of the device, so that it can be compiled as one graph and recorded as a CUDA graph.

    Args:
        model: on the device where it runs.
        grids: rows and columns of tokens of each image, N of them.
        branches: contexts in which to predict each image; they are only read.
    """

    def __init__(
        self,
        model: Bagel,
        grids: Sequence[tuple[int, int]],
        branches: Sequence[Sequence[Context]],
    ) -> None:
        flat = [context for contexts in branches for context in contexts]
        self.model = model
        self.num_branches = [len(contexts) for contexts in branches]
        self.packing = packing_of_images(
            model,
            flat,
            [r * c for (r, c), own in zip(grids, branches, strict=True) for _ in own],
            extend=False,
        )
        self.markers = model.markers().repeat(len(flat), 1)
        self.positions = [
            grid_positions(*grid, model.config.max_latent_size, device=model.device)
            for grid in grids
        ]

    @torch.no_grad()
    def __call__(self, tokens: Sequence[Tensor], time: Tensor) -> list[Tensor]:
        """Runs the model once.

        Args:
            tokens: noisy image [N, p * p * C] of each image.
            time: [1] fp32 on the device of the model, 1 for noise and 0 for a finished image.

        Returns:
            For each image the velocities [number of its branches, N, p * p * C], fp32.
        """
        return predict(self, tokens, time)


def packing_of_images(
    model: Bagel, contexts: Sequence[Context], lengths: Sequence[int], *, extend: bool
) -> Packing:
    """Packs images of so many tokens, each between its two markers, behind their contexts."""
    return pack(
        model.config.llm,
        contexts,
        [2] * len(contexts),
        gen_lengths=lengths,
        extend=extend,
        device=model.device,
    )


def predict(denoiser: Denoiser, tokens: Sequence[Tensor], time: Tensor) -> list[Tensor]:
    """What `Denoiser` calls; a function, to be compiled."""
    model, counts = denoiser.model, denoiser.num_branches
    gen: list[Tensor] = []
    for x, positions, count in zip(tokens, denoiser.positions, counts, strict=True):
        gen += [model.embed_latent(x, positions, time)] * count
    hidden = model.language_model.model(denoiser.markers, torch.cat(gen), denoiser.packing)[1]
    out = model.llm2vae(hidden).float()
    lengths = [len(x) * count for x, count in zip(tokens, counts, strict=True)]
    return [
        part.view(count, len(x), -1)
        for part, x, count in zip(out.split(lengths), tokens, counts, strict=True)
    ]
