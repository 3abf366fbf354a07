# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn: SwiGLU expert FFN over rows grouped by expert, gather fused into the load."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.ops.registration import refuse_gradient, refuse_tangents, register_fake


def grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """Runs every row through its expert e: y[r] = down_e(silu(gate_e z) * up_e z).

    z = x[row_token[r]]; expert e owns the rows [e * h, (e + 1) * h) of gate_proj and up_proj and
    the columns of the same range of down_proj; weights are neither copied nor padded. Has no
    gradient: with one wanted, call `grouped_ffn_combine`; a backward pass raises.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        row_token: token of each row, [R] int32, rows grouped by expert.
        expert_offsets: [E + 1] int32, first row of each expert and the number of rows.
        gate_proj, up_proj: [E * h, D], or [E, h, D], dtype of x, any row stride. Experts may
            be any number of rows apart, as in the halves of one [E, 2 * h, D].
        down_proj: [D, E * h], or [E, D, h] with them; likewise.

    Returns:
        y [R, D], dtype of x.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    arguments = (x, row_token, expert_offsets, gate_proj, up_proj, down_proj)
    if forward_ad._current_level >= 0:
        refuse_tangents("grouped_ffn", *arguments)
    y: Tensor = torch.ops.sparse_unified.grouped_ffn(*arguments)
    return y


register_fake("grouped_ffn", lambda a: a.x.new_empty((a.row_token.shape[0], a.x.shape[1])))
refuse_gradient("grouped_ffn", advice="; call grouped_ffn_combine")
