# SPDX-License-Identifier: Apache-2.0
"""What stays when a width is pruned, blocks of neurons or groups of heads, and in which layers.

Arithmetic on scores alone; it sees no weights, so that a model in memory and a file lose the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from sparse_unified.experts.layout import ExpertLayout


def select_layers(layers: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Resolves a layer selection against a model of `num_layers` layers.

    Args:
        layers: "middle" (all but the first and the last), "all", "a-b" (both ends included), "a",
            comma-separated combinations of the last two, or a sequence of indices.
        num_layers: number of decoder layers in the model.

    Returns:
        Ascending layer indices without repeats.

    Raises:
        ValueError: the selection is empty, malformed, or names a layer the model lacks.
    """
    if isinstance(layers, str):
        selected = _parse(layers.strip(), num_layers)
    else:
        selected = list(layers)
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in selected):
            raise ValueError(f"layers must be integers, got {selected!r}")
    for layer in selected:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers must lie in 0 to {num_layers - 1}, got {layer}")
    if not selected:
        raise ValueError(f"layers must name at least one of {num_layers} layers, got {layers!r}")
    return tuple(sorted(set(selected)))


def _parse(text: str, num_layers: int) -> list[int]:
    if text == "middle":
        return list(range(1, num_layers - 1))
    if text == "all":
        return list(range(num_layers))
    selected: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None:
            raise ValueError(f"layers must be 'middle', 'all', 'a-b' or 'a,b-c', got {text!r}")
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise ValueError(f"layers must ascend in a range, got {part.strip()!r}")
        # A huge range names a layer the model lacks; its first such layer is enough to say so.
        selected.extend(range(first, max(first, min(last, num_layers)) + 1))
    return selected


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
    blocks = {layer: _block_scores(values, block_size) for layer, values in scores.items()}
    if budget is Budget.UNIFORM:
        kept = {
            layer: _highest(values, max(1, round(keep_ratio * len(values))))
            for layer, values in blocks.items()
        }
    else:
        kept = _keep_global(blocks, keep_ratio)
    return {layer: _units(index, block_size) for layer, index in kept.items()}


def _block_scores(scores: Tensor, block_size: int) -> Tensor:
    return scores.detach().cpu().double().unflatten(0, (-1, block_size)).sum(1)


def _units(blocks: Tensor, block_size: int) -> Tensor:
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()


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


def keep_in_experts(
    scores: Tensor, layout: ExpertLayout, *, keep_ratio: float, block_size: int = 1
) -> Tensor:
    """Chooses the neurons of each expert with the highest scores, whole blocks of them.

    Routed experts of w neurons keep max(1, round(keep_ratio * w / block_size)) blocks each. A
    shared expert that is S expert widths wide, as `ExpertLayout` makes it, stays so, as checkpoints
    tell its width by S; one of another width keeps the ratio of its own.

    Args:
        scores: finite, [I] in expert order, higher is more important.
        layout: of the experts.
        keep_ratio: in (0, 1]. block_size: divides the width of every expert.

    Returns:
        [kept] int64, ascending positions in expert order, on the CPU.
    """
    blocks = _block_scores(scores, block_size)
    routed = max(1, round(keep_ratio * layout.expert_width / block_size))
    width, count = layout.shared_width, layout.num_shared_experts
    shared = max(1, round(keep_ratio * width / block_size))
    if routed * block_size == layout.expert_width:
        shared = width // block_size
    elif count and count * (layout.intermediate_size // (layout.num_experts + count)) == width:
        shared = min(count * routed, width // block_size)
    kept = []
    for name, (start, stop) in layout.ranges().items():
        own = blocks[start // block_size : stop // block_size]
        best = _highest(own, shared if name == "shared_expert" else routed)
        kept.append(start + _units(best, block_size))
    return torch.cat(kept)
