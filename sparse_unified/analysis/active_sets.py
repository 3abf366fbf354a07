# SPDX-License-Identifier: Apache-2.0
"""Sets of neurons as bits, and how much they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., I] -> uint8 [..., ceil(I / 8)], neuron i in bit i % 8 of byte i // 8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """uint8 [..., ceil(size / 8)] -> bool [..., size]."""
    weights = torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] & weights) != 0).flatten(-2)[..., :size]


def most_active(values: Tensor, fraction: float) -> Tensor:
    """Marks the largest of values [..., I]: max(1, round(fraction * I)), lower indices in ties.

    Returns:
        bool [..., I].
    """
    count = max(1, round(fraction * values.shape[-1]))
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return mask.scatter_(-1, order[..., :count], True)


def mean_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap |a & b| / |a | b| of the sets of all pairs of samples.

    Args:
        active: packed sets [S, R, bytes]; seen: which of them count, [S, R] bool.

    Returns:
        [R] fp64, NaN where fewer than two sets count.
    """
    means = []
    for column in range(active.shape[1]):
        sets = unpack_bits(active[seen[:, column], column], 8 * active.shape[2]).double()
        common = sets @ sets.t()  # [S, S]
        sizes = sets.sum(1)
        jaccard = common / (sizes[:, None] + sizes - common)
        pairs = torch.triu(torch.ones_like(jaccard, dtype=torch.bool), 1)
        means.append(jaccard[pairs].mean())  # NaN of no pairs
    return torch.stack(means)


def successive_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap of the sets of one sample in successive ranges.

    Args:
        active: packed sets [S, R, bytes]; seen: which of them count, [S, R] bool.

    Returns:
        [R - 1] fp64, NaN where no sample has both sets.
    """
    means = []
    for column in range(active.shape[1] - 1):
        both = seen[:, column] & seen[:, column + 1]
        first, second = (
            unpack_bits(active[both, at], 8 * active.shape[2]) for at in (column, column + 1)
        )
        means.append(((first & second).sum(1).double() / (first | second).sum(1)).mean())
    return torch.stack(means) if means else torch.empty(0, dtype=torch.float64)
