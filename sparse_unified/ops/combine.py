# SPDX-License-Identifier: Apache-2.0
"""combine: weighted sum of the rows of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import register_autograd

from sparse_unified.ops.registration import (
    refuse_gradient,
    refuse_tangents,
    register_fake,
)


def combine(y: Tensor, weights: Tensor | None, token_rows: Tensor) -> Tensor:
    """Brings rows back to tokens: out[t] = sum_k weights[t, k] * y[token_rows[t, k]].

    Accumulates in fp32 in the order of k and rounds once.

    Args:
        y: rows [R, D]; fp32, bf16 or fp16.
        weights: [T, K] fp32; None stands for ones.
        token_rows: rows of each token, [T, K] int32, every row once, from `sort_by_expert`.

    Returns:
        out [T, D], dtype of y.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("combine", y, weights)
    out: Tensor = torch.ops.sparse_unified.combine(y, weights, token_rows)
    return out


register_fake("combine", lambda a: a.y.new_empty((a.token_rows.shape[0], a.y.shape[1])))
register_fake(
    "combine_backward",
    lambda a: (
        a.y.new_empty((a.y.shape[0] if a.needs_y else 0, a.y.shape[1])),
        a.weights.new_empty((a.weights.shape[0] if a.needs_weights else 0, a.weights.shape[1])),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, token_rows = inputs
    ctx.has_weights = weights is not None
    ctx.keeps_y = ctx.has_weights and ctx.needs_input_grad[1]  # of size [R, D]
    kept = [y] if ctx.keeps_y else []
    ctx.save_for_backward(*kept, *([weights] if ctx.has_weights else []), token_rows)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    if not ctx.has_weights:
        (token_rows,) = ctx.saved_tensors
        row_token = torch.argsort(token_rows.reshape(-1)) // token_rows.shape[1]
        return torch.ops.sparse_unified.permute(grad_out, row_token.int(), token_rows), None, None
    *kept, weights, token_rows = ctx.saved_tensors
    needs_y, needs_weights = ctx.needs_input_grad[:2]
    # Every row has one slot; the values of y are for the gradient of the weights alone.
    y = kept[0] if kept else grad_out.new_empty((token_rows.numel(), grad_out.shape[1]))
    grad_y, grad_weights = torch.ops.sparse_unified.combine_backward(
        grad_out, y, weights, token_rows, needs_y, needs_weights
    )
    return grad_y if needs_y else None, grad_weights if needs_weights else None, None


register_autograd("sparse_unified::combine", _backward, setup_context=_setup_context)
refuse_gradient("combine_backward")
