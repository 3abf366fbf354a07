# SPDX-License-Identifier: Apache-2.0
"""combine: weighted sum of the rows of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.ops.registration import refuse_gradient, refuse_tangents, register_fake


def combine(
    y: Tensor, weights: Tensor | None, token_rows: Tensor, weight_offset: float = 0
) -> Tensor:
    """Brings rows back to tokens: out[t] = sum_k w[t, k] * y[token_rows[t, k]].

    w = weight_offset + weights. Accumulates in fp32 in the order of k and rounds once. Has no
    gradient: with one wanted, call `grouped_ffn_combine`; a backward pass raises.

    Args:
        y: rows [R, D]; fp32, bf16 or fp16.
        weights: [T, K] fp32; None stands for ones, whatever the offset.
        token_rows: rows of each token, [T, K] int32, every row once, from `sort_by_expert`.
        weight_offset: added to each weight, in fp32; 1 where weights are router logits.

    Returns:
        out [T, D], dtype of y.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("combine", y, weights)
    out: Tensor = torch.ops.sparse_unified.combine(y, weights, token_rows, weight_offset)
    return out


register_fake("combine", lambda a: a.y.new_empty((a.token_rows.shape[0], a.y.shape[1])))
refuse_gradient("combine", advice="; call grouped_ffn_combine")
