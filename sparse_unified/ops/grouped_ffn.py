# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn: SwiGLU expert FFN over rows grouped by expert, gather fused into the load.

Two registered ops share one kernel. `grouped_ffn` returns y alone and recomputes its activations
when a gradient is asked of it; `grouped_ffn_train` also returns the two activations, so that
backward does not. The function below picks the second where a gradient will be wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unified.ops.registration import (
    call_ffn,
    keep_wanted,
    register_fake,
    register_ffn_autograd,
)


def grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    token_rows: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Runs every row through its expert e: y[r] = down_e(silu(gate_e z) * up_e z).

    z = x[row_token[r]]; expert e owns the rows [e * h, (e + 1) * h) of gate_proj and up_proj and
    the columns of the same range of down_proj; weights are neither copied nor padded.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        row_token: token of each row, [R] int32, rows grouped by expert.
        expert_offsets: [E + 1] int32, first row of each expert and the number of rows.
        gate_proj, up_proj: [E * h, D], or [E, h, D], dtype of x, any row stride. Experts may
            be any number of rows apart, as in the halves of one [E, 2 * h, D].
        down_proj: [D, E * h], or [E, D, h] with them; likewise.
        token_rows: rows of each token, [T, K] int32, from `sort_by_expert`; needed for the
            gradient of x alone, which is summed in the order of the rows without it.
        recompute: trade time for memory: keep no activations for backward.

    Returns:
        y [R, D], dtype of x.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    arguments = (x, row_token, expert_offsets, gate_proj, up_proj, down_proj, token_rows)
    return call_ffn("grouped_ffn", arguments, recompute=recompute)


def _fake_train(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = a.row_token.shape[0]
    width = a.gate_proj.shape[:-1].numel() // (a.expert_offsets.shape[0] - 1)
    sizes = (a.x.shape[1], width, width)
    y, gate_rows, up_rows = (a.x.new_empty((num_rows, size)) for size in sizes)
    return y, gate_rows, up_rows


register_fake("grouped_ffn", lambda a: a.x.new_empty((a.row_token.shape[0], a.x.shape[1])))
register_fake("grouped_ffn_train", _fake_train)


def _sum_rows(grad_rows: Tensor, row_token: Tensor, x: Tensor, token_rows: Tensor | None) -> Tensor:
    """Gradient of x [T, D] from that of its rows [R, D]; without token_rows in row order.

    NOTE: index_add adds in order on the CPU and by atomics on CUDA, index_put the other way round.
    """
    summed: Tensor
    if token_rows is not None:
        summed = torch.ops.sparse_unified.combine(grad_rows, None, token_rows)
    else:
        wide = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if x.is_cuda:
            wide = wide.index_put((row_token.long(),), grad_rows.float(), accumulate=True)
        else:
            wide = wide.index_add(0, row_token, grad_rows.float())
        summed = wide.to(x.dtype)
    return summed


def _gradients(
    needs: Sequence[bool],
    grad_y: Tensor,
    inputs: tuple[Any, ...],
    activations: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    *arguments, token_rows = inputs
    needs_x, needs_weights = needs[0], any(needs[3:6])
    grad_rows, *grad_weights = torch.ops.sparse_unified.grouped_ffn_backward(
        grad_y, *arguments, *activations, needs_x, needs_weights
    )
    x, row_token = arguments[:2]
    grad_x = _sum_rows(grad_rows, row_token, x, token_rows) if needs_x else None
    return grad_x, None, None, *keep_wanted(grad_weights, needs[3:6]), None


register_ffn_autograd("grouped_ffn", _gradients)
