# SPDX-License-Identifier: Apache-2.0
"""Ops from torch ops, for devices without a kernel of ours or with a better one of torch's.

Same semantics in the dtype of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.ops import reference
from sparse_unified.ops.permute import permute

_TILE_NEURONS = 1024

combine = reference.combine


def route_topk(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.route_topk`; under autocast too, which would round the logits to 16 bits."""
    if not torch.amp.is_autocast_available(x.device.type):
        return reference.route_topk(x, gate, top_k)
    with torch.autocast(x.device.type, enabled=False):
        return reference.route_topk(x, gate, top_k)


def grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    token_rows: Tensor,
) -> Tensor:
    """`ops.grouped_ffn` of at least one row by torch's grouped_mm, on views of the weights.

    Gate and up are rounded before SwiGLU. Rows and widths must be multiples of 16 bytes.
    """
    num_experts = expert_offsets.shape[0] - 1
    if gate_proj.dim() == 2:
        gate_proj, up_proj = (w.unflatten(0, (num_experts, -1)) for w in (gate_proj, up_proj))
        down_proj = down_proj.unflatten(1, (num_experts, -1)).transpose(0, 1)
    ends = expert_offsets[1:]
    rows = permute(x, row_token, token_rows)  # [R, D]
    gate, up = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (gate_proj, up_proj))
    return F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, D] -> values [R, D] e4m3 and scales [R] fp32, the largest of a row over 448."""
    most = rows.abs().amax(1).float().clamp(min=1e-12)  # a row of zeros stays one
    scales = most / torch.finfo(torch.float8_e4m3fn).max
    return (rows.float() / scales.unsqueeze(1)).to(torch.float8_e4m3fn), scales


@torch.library.custom_op("sparse_unified::scaled_grouped_mm", mutates_args=())
def _scaled_grouped_mm(
    rows: Tensor, scales: Tensor, weights: Tensor, weight_scales: Tensor, ends: Tensor
) -> Tensor:
    # NOTE: an op, because that of torch cannot be compiled: it has no fake implementation.
    recipe = F.ScalingType.RowWise
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        rows, weights, scales, recipe, weight_scales, recipe, offs=ends
    )


@_scaled_grouped_mm.register_fake
def _(rows: Tensor, scales: Tensor, weights: Tensor, weight_scales: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((len(rows), weights.shape[2]), dtype=torch.bfloat16)


def scaled_grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Any,
    up_proj: Any,
    down_proj: Any,
) -> Tensor:
    """`grouped_ffn` in fp8, by torch's scaled_grouped_mm on views of the weights; no gradients.

    Tokens and the rows between the products are rounded to fp8 too, with a scale each.

    Args:
        x: [T, D] bf16, T > 0.
        gate_proj, up_proj: torchao's `Float8Tensor` [I, D]; down_proj: [D, I]; with a scale a row.
            D, I and I / E are multiples of 16.

    Raises:
        RuntimeError: x has not the dtype that the weights were packed from.
    """
    if x.dtype != gate_proj.dtype:
        raise RuntimeError(
            f"SparseMoE: x must be of {gate_proj.dtype} as the weights, got {x.dtype}"
        )
    num_experts = expert_offsets.shape[0] - 1
    ends = expert_offsets.narrow(0, 1, num_experts)
    values, scales = to_fp8(x)
    # Eight values at a time: torch does not gather fp8 everywhere.
    rows = values.view(torch.int64)[row_token].view(values.dtype)  # [R, D]
    gate, up = (
        _scaled_grouped_mm(
            rows,
            scales[row_token],
            weight.qdata.unflatten(0, (num_experts, -1)).transpose(1, 2),  # [E, D, h]
            weight.scale.view(num_experts, -1),
            ends,
        )
        for weight in (gate_proj, up_proj)
    )
    return _scaled_grouped_mm(
        *to_fp8(F.silu(gate) * up),
        down_proj.qdata.unflatten(1, (num_experts, -1)).permute(1, 2, 0),  # [E, h, D]
        down_proj.scale.view(1, -1).expand(num_experts, -1),
        ends,
    )


def expert_ffn(
    x: Tensor,
    weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weight_offset: float = 0,
) -> Tensor:
    """x [T, D], weights and topk_idx [T, K] -> y [T, D]; sort, grouped FFN and combine.

    Reads the expert offsets back to the host. Weights of experts: as of `ops.grouped_ffn`.
    """
    expert_offsets, row_token, token_rows = reference.sort_by_expert(topk_idx, num_experts)
    sizes = expert_offsets.diff().tolist()
    rows = reference.permute(x, row_token).split(sizes)
    experts = (
        (gate_proj.chunk(num_experts), up_proj.chunk(num_experts), down_proj.chunk(num_experts, 1))
        if gate_proj.dim() == 2
        else (gate_proj, up_proj, down_proj)
    )
    outputs = [
        F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
        for own, gate, up, down in zip(rows, *experts, strict=True)
    ]
    return reference.combine(torch.cat(outputs), weights, token_rows, weight_offset)


def ffn_importance(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    threshold: float = 0.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [I, D], token_weights [T] -> three sums over tokens, each [I] fp32.

    Those of `ops.ffn_importance`, summed in fp64. Values are not looked at, which would be a wait:
    a threshold or weight out of range gives what the formula gives.
    """
    weights = torch.ones_like(x[:, 0]) if token_weights is None else token_weights
    is_counted = (weights > 0).unsqueeze(1)
    weights = weights.double()
    sums = []
    for gate, up in zip(gate_proj.split(_TILE_NEURONS), up_proj.split(_TILE_NEURONS), strict=True):
        hidden = F.silu(F.linear(x, gate).float()) * F.linear(x, up).float()  # [T, tile]
        size = torch.where(is_counted, hidden.abs(), 0.0).double()
        fired = ((size > threshold) & is_counted).double()
        sums.append(torch.stack([weights @ size, weights @ size.square(), weights @ fired]))
    sum_abs, sum_squares, num_fired = torch.cat(sums, dim=1).float()
    return sum_abs, sum_squares, num_fired
