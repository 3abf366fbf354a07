# SPDX-License-Identifier: Apache-2.0
"""How important neurons and heads are by their weights, what stays of them, and in which layers.

What stays is arithmetic on scores alone, so that a model in memory and a file lose the same. Scores
by calibration statistics: `analysis.criteria`. As users hand them in, and which of them decides
over a file or a live model: `checkpoint.scores`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from sparse_unified._common import list_some


def as_scores(value: object) -> Tensor:
    """Returns a tensor of `value`, itself where it is one; TypeError when it cannot become one."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"scores must be a tensor, got {type(value).__name__} that is none"
        ) from error


def check_scores(scores: Tensor, size: int) -> None:
    """Raises ValueError unless `scores` is a finite float tensor [size]."""
    if scores.ndim != 1 or scores.shape[0] != size:
        raise ValueError(f"scores must have shape [{size}], got {list(scores.shape)}")
    if not scores.dtype.is_floating_point:
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    bad = torch.nonzero(~torch.isfinite(scores))
    if bad.numel():
        first = int(bad[0])
        raise ValueError(f"scores must be finite, got {scores[first].item()} for neuron {first}")


def layer_generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def random_scores(intermediate_size: int, *, seed: int, layer: int) -> Tensor:
    """Returns scores [I] fp32 in [0, 1), the same on every machine."""
    return torch.rand(intermediate_size, generator=layer_generator(seed, layer))


def magnitude_scores(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Ranks neurons by weight magnitude: |gate row| * |up row| * |down column|, L2 norms.

    The product does not change when a factor moves from one projection of a neuron to another, as
    the neuron's output under SwiGLU nearly does not.

    gate_proj and up_proj [I, D], down_proj [D, I] of any float dtype -> scores [I] fp32, there.
    """
    scores = column_norms(down_proj)
    for weight in (gate_proj, up_proj):
        scores *= torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return scores


def column_norms(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """L2 norm of each column [I]; a library norm over the rows is 15 times slower."""
    squares = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for rows in weight.split(64):
        squares += rows.to(dtype).square().sum(0)
    return squares.sqrt()


def head_magnitude_scores(v_proj: Tensor, o_proj: Tensor) -> Tensor:
    """Ranks groups of heads by weight magnitude: |values| * |their output columns|, L2 norms.

    Queries and keys have no part in it: both are normalised per head, whatever their weights are.
    Value rows [G, d, D] of the KV head of each of G groups, and output columns [D, G, n] of its
    n = queries_per_key * d channels, of any float dtype -> scores [G] fp32.
    """
    values = torch.linalg.vector_norm(v_proj.flatten(1), dim=1, dtype=torch.float32)
    return values * torch.linalg.vector_norm(o_proj, dim=(0, 2), dtype=torch.float32)


def joint_scores(scores: Sequence[Tensor]) -> Tensor:
    """Adds scores of different origin, each [N] divided by its mean magnitude first; fp64, CPU."""
    total = torch.zeros(len(scores[0]), dtype=torch.float64)
    for values in scores:
        wide = values.detach().cpu().double()
        size = wide.abs().mean()
        total += wide / size if size > 0 else wide
    return total


def select_layers(
    layers: str | Sequence[int],
    num_layers: int,
    has: Callable[[int], bool] | None = None,
    what: str = "",
) -> tuple[int, ...]:
    """Returns the layers that are selected of `num_layers`, ascending, without repeats.

    Args:
        layers: "middle" (all but the first and the last), "all", "a-b" (both ends included), "a",
            comma-separated combinations of the last two, or a sequence of indices.
        has: whether a layer has what is meant, in words `what`; "all" and "middle" pass over those
            that lack it.

    Raises:
        ValueError: the selection is empty, malformed, or names a layer that the model lacks or that
            lacks what is meant.
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
    found = tuple(sorted(set(selected)))
    left = found if has is None else tuple(layer for layer in found if has(layer))
    if not left or (layers not in ("all", "middle") and len(left) < len(found)):
        gone = [layer for layer in found if layer not in left]
        raise ValueError(f"layers must have a {what}, got {list_some(gone)}, which skip it")
    return left


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
        first, last = int(match[1]), int(match[2] or match[1])
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
        `{layer: [kept] int64}`, ascending, on the CPU.
    """
    blocks = {layer: block_scores(values, block_size) for layer, values in scores.items()}
    if budget is Budget.UNIFORM:
        kept = {
            layer: highest(values, max(1, round(keep_ratio * len(values))))
            for layer, values in blocks.items()
        }
    else:
        kept = _keep_global(blocks, keep_ratio)
    return {layer: units_of(index, block_size) for layer, index in kept.items()}


def block_scores(scores: Tensor, block_size: int) -> Tensor:
    return scores.detach().cpu().double().unflatten(0, (-1, block_size)).sum(1)


def units_of(blocks: Tensor, block_size: int) -> Tensor:
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()


def highest(scores: Tensor, count: int) -> Tensor:
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
    chosen[highest(joined, count)] = True
    parts = chosen.split([len(values) for values in pooled])
    return {layer: part.nonzero()[:, 0] for layer, part in zip(blocks, parts, strict=True)}
