# SPDX-License-Identifier: Apache-2.0
"""Importance of each FFN neuron or head where no calibration statistics are at hand.

With statistics: `analysis.criteria`. As users hand it in: `checkpoint.scores`. Which of them
decides over a file: `convert.ranking`; over a live model: `surgery.cuts.rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Returns the random numbers of one layer, the same on every machine."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def random_scores(intermediate_size: int, *, seed: int, layer: int) -> Tensor:
    """Returns scores [I] fp32 in [0, 1), the same for the same seed and layer on every machine."""
    return torch.rand(intermediate_size, generator=layer_generator(seed, layer))


def magnitude_scores(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Ranks neurons by weight magnitude: |gate row| * |up row| * |down column|, L2 norms.

    The product does not change when a factor moves from one projection of a neuron to another, as
    the neuron's output under SwiGLU nearly does not.

    Args:
        gate_proj, up_proj: [I, D], any float dtype.
        down_proj: [D, I], any float dtype.

    Returns:
        scores [I] fp32, on the device of the weights.
    """
    scores = _column_norms(down_proj)
    for weight in (gate_proj, up_proj):
        scores *= torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return scores


def _column_norms(weight: Tensor, rows_at_once: int = 64) -> Tensor:
    """L2 norm of each column [I] fp32; a library norm over the rows is 15 times slower."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.split(rows_at_once):
        squares += rows.float().square().sum(0)
    return squares.sqrt()


def head_magnitude_scores(v_proj: Tensor, o_proj: Tensor) -> Tensor:
    """Ranks groups of heads by weight magnitude: |values| * |their output columns|, L2 norms.

    Queries and keys have no part in it: both are normalised per head, whatever their weights are.

    Args:
        v_proj: [G, d, D], value rows of the KV head of each of G groups, any float dtype.
        o_proj: [D, G, n], output columns of the n = queries_per_key * d channels of each group.

    Returns:
        scores [G] fp32, on the device of the weights.
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
