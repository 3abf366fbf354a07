# SPDX-License-Identifier: Apache-2.0
"""Which units stay when a width is pruned: blocks of neurons of a FFN, or groups of heads.

Arithmetic on scores alone; it sees no weights, so that a model in memory and a file lose the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor


class Budget(str, Enum):
    """What a ratio is taken of."""

    UNIFORM = "uniform"  # every layer keeps the same share
    GLOBAL = "global"  # the layers share one budget, and the best units of all of them stay


def keep_units(
    scores: Mapping[int, Tensor], *, keep_ratio: float, budget: Budget, block_size: int = 1
) -> dict[int, Tensor]:
    """Chooses the units of each layer with the highest scores, whole blocks of them.

    The score of a block is the sum of its units' scores; among equal ones the first stay. A layer
    of N units keeps max(1, round(keep_ratio * N / block_size)) blocks. Under a global budget the
    layers together keep round(keep_ratio * blocks of all), at least the best block of each; their
    scores are then first divided by the mean magnitude of the layer's, because activations, and
    with them scores, grow from layer to layer.

    Args:
        scores: finite, [N] of each layer, higher is more important.
        keep_ratio: in (0, 1]. block_size: divides every N.

    Returns:
        `{layer: [kept] int64}`, ascending unit indices on the CPU.
    """
    blocks = {
        layer: values.detach().cpu().double().unflatten(0, (-1, block_size)).sum(1)
        for layer, values in scores.items()
    }
    if budget is Budget.UNIFORM:
        kept = {
            layer: _highest(values, max(1, round(keep_ratio * len(values))))
            for layer, values in blocks.items()
        }
    else:
        kept = _keep_global(blocks, keep_ratio)
    within = torch.arange(block_size)
    return {
        layer: (index[:, None] * block_size + within).flatten() for layer, index in kept.items()
    }


def _highest(scores: Tensor, count: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _keep_global(blocks: Mapping[int, Tensor], keep_ratio: float) -> dict[int, Tensor]:
    pooled = []
    for values in blocks.values():
        size = values.abs().mean()
        relative = values / size if size > 0 else values.clone()
        relative[relative.argmax()] = torch.inf  # no layer is emptied
        pooled.append(relative)
    joined = torch.cat(pooled)
    count = max(len(blocks), round(keep_ratio * len(joined)))
    chosen = torch.zeros(len(joined), dtype=torch.bool)
    chosen[_highest(joined, count)] = True
    parts = chosen.split([len(values) for values in pooled])
    return {layer: part.nonzero()[:, 0] for layer, part in zip(blocks, parts, strict=True)}
