# SPDX-License-Identifier: Apache-2.0
"""Ops from torch ops alone, for devices without a kernel of ours.

Same semantics in the dtype of the weights. The sparse FFN reads the expert offsets back to the host
once per call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.ops import reference

_TILE_NEURONS = 1024


def expert_ffn(
    x: Tensor,
    weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """x [T, D], weights and topk_idx [T, K] -> y [T, D]; sort, grouped FFN and combine."""
    expert_offsets, row_token, token_rows = reference.sort_by_expert(topk_idx, num_experts)
    sizes = expert_offsets.diff().tolist()
    rows = reference.permute(x, row_token).split(sizes)
    outputs = [
        F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
        for own, gate, up, down in zip(
            rows,
            gate_proj.chunk(num_experts),
            up_proj.chunk(num_experts),
            down_proj.chunk(num_experts, dim=1),
            strict=True,
        )
    ]
    return reference.combine(torch.cat(outputs), weights, token_rows)


def ffn_importance(
    x: Tensor, gate_proj: Tensor, up_proj: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [I, D] -> sum |h|, sum h^2, tokens with |h| > threshold, each [I] fp32."""
    sums = []
    for gate, up in zip(gate_proj.split(_TILE_NEURONS), up_proj.split(_TILE_NEURONS), strict=True):
        hidden = (F.silu(F.linear(x, gate)) * F.linear(x, up)).float()  # [T, tile]
        size = hidden.abs()
        fired = (size > threshold).sum(0, dtype=torch.float32)
        sums.append((size.sum(0), hidden.square().sum(0), fired))
    sum_abs, sum_squares, num_fired = (torch.cat(parts) for parts in zip(*sums, strict=True))
    return sum_abs, sum_squares, num_fired
