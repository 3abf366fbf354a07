# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn_combine: grouped_ffn and combine in one pass, for inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.ops.registration import refuse_gradient, refuse_tangents, register_fake


def grouped_ffn_combine(
    x: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_rows: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """Runs tokens through their experts and sums: out[t] = sum_k weights[t, k] * expert(x[t]).

    Equals `combine(grouped_ffn(...), weights, token_rows)`, without the [R, D] rows in between.
    Has no gradient: with one wanted, call the two ops; a backward pass raises.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        weights: [T, K] fp32.
        row_token, token_rows, expert_offsets: [R], [T, K], [E + 1] int32, from `sort_by_expert`.
        gate_proj, up_proj, down_proj: as of `grouped_ffn`.

    Returns:
        out [T, D], dtype of x.

    Raises:
        RuntimeError: a shape, dtype, index or the order of the rows does not fit.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("grouped_ffn_combine", x, weights, gate_proj, up_proj, down_proj)
    out: Tensor = torch.ops.sparse_unified.grouped_ffn_combine(
        x, weights, row_token, token_rows, expert_offsets, gate_proj, up_proj, down_proj
    )
    return out


register_fake("grouped_ffn_combine", lambda a: a.x.new_empty(a.x.shape))
refuse_gradient("grouped_ffn_combine", advice="; call grouped_ffn and combine")
