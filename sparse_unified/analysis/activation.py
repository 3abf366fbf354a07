# SPDX-License-Identifier: Apache-2.0
"""Sets of active neurons, as bits, and how much they have in common."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., I] -> uint8 [..., ceil(I / 8)], neuron i in bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, size: int | None = None) -> Tensor:
    """uint8 [..., bytes] -> bool [..., size]; None is all bits."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=size, bitorder="little")
    return torch.from_numpy(bits).bool()


def most_active(values: Tensor, fraction: float) -> Tensor:
    """Marks the largest of values [..., I]: max(1, round(fraction * I)), lower indices in ties.

    Returns:
        bool [..., I].
    """
    count = max(1, round(fraction * values.shape[-1]))
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def mean_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap |a & b| / |a | b| of the sets of all pairs of samples.

    Args:
        active: packed sets [S, R, bytes].
        seen: which of them count, [S, R] bool.

    Returns:
        [R] fp64, NaN where fewer than two sets count.
    """
    means = []
    for column in range(active.shape[1]):
        sets = unpack_bits(active[seen[:, column], column]).double()
        common, sizes = sets @ sets.t(), sets.sum(1)  # [S, S], [S]
        jaccard = common / (sizes[:, None] + sizes - common)
        means.append(jaccard[torch.ones_like(jaccard, dtype=torch.bool).triu(1)].mean())
    return torch.stack(means)


def successive_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap of the sets of one sample in successive ranges.

    Args:
        active: packed sets [S, R, bytes].
        seen: which of them count, [S, R] bool.

    Returns:
        [R - 1] fp64, NaN where no sample has both sets.
    """
    sets, both = unpack_bits(active), seen[:, :-1] & seen[:, 1:]
    common = (sets[:, :-1] & sets[:, 1:]).sum(2).double()
    jaccard = common / (sets[:, :-1] | sets[:, 1:]).sum(2)
    return jaccard.where(both, torch.nan).nanmean(0)  # [S, R - 1] -> [R - 1]
