# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn_combine: tokens through their experts and back, forward and backward.

Two registered ops share one meaning. `grouped_ffn_combine` returns y alone and recomputes its
activations when a gradient is asked of it; `grouped_ffn_combine_train` also returns the two
activations, so that backward does not. The function below picks the second where a gradient will
be wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.ops.registration import (
    call_ffn,
    register_fake,
    register_ffn_autograd,
)


def grouped_ffn_combine(
    x: Tensor,
    weights: Tensor,
    row_token: Tensor,
    token_rows: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weight_offset: float = 0,  # NOTE: 0.0 would be a symbol to torch.compile(dynamic=True)
    *,
    recompute: bool = False,
) -> Tensor:
    """Runs tokens through their experts and sums: y[t] = sum_k w[t, k] * expert(x[t]).

    w = weight_offset + weights. Equals `combine(grouped_ffn(...), weights, token_rows,
    weight_offset)`; for backward it keeps gate and up [R, h] and nothing of size [R, D].

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        weights: [T, K] fp32.
        row_token, token_rows, expert_offsets: [R], [T, K], [E + 1] int32, from `sort_by_expert`.
        gate_proj, up_proj, down_proj: as of `grouped_ffn`.
        weight_offset: added to each weight, in fp32; 1 where weights are router logits.
        recompute: trade time for memory: keep no activations for backward.

    Returns:
        y [T, D], dtype of x. Differentiable in x, weights and the weights of the experts.

    Raises:
        RuntimeError: a shape, dtype, index or the order of the rows does not fit.
    """
    indices = (row_token, token_rows, expert_offsets)
    arguments = (x, weights, *indices, gate_proj, up_proj, down_proj, weight_offset)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # a step of inference
        y: Tensor = torch.ops.sparse_unified.grouped_ffn_combine(*arguments)
        return y
    return call_ffn("grouped_ffn_combine", arguments, recompute=recompute)


def _fake_train(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    width = a.gate_proj.shape[:-1].numel() // (a.expert_offsets.shape[0] - 1)
    kept = (a.row_token.shape[0], width)
    return a.x.new_empty(a.x.shape), a.x.new_empty(kept), a.x.new_empty(kept)


register_fake("grouped_ffn_combine", lambda a: a.x.new_empty(a.x.shape))
register_fake("grouped_ffn_combine_train", _fake_train)
register_ffn_autograd("grouped_ffn_combine", ((0,), (1,), (5, 6, 7)))
