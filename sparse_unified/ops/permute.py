# SPDX-License-Identifier: Apache-2.0
"""permute: gathers the token of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import register_autograd

from sparse_unified.ops.registration import refuse_tangents, register_fake


def permute(x: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """Copies tokens into expert order: y[r] = x[row_token[r]].

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        row_token: token of each row, [R] int32, from `sort_by_expert`.
        token_rows: rows of each token, [T, K] int32, from `sort_by_expert`; for the gradient.

    Returns:
        y [R, D], dtype of x.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("permute", x)
    y: Tensor = torch.ops.sparse_unified.permute(x, row_token, token_rows)
    return y


register_fake("permute", lambda a: a.x.new_empty((a.row_token.shape[0], a.x.shape[1])))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
    (token_rows,) = ctx.saved_tensors
    return torch.ops.sparse_unified.combine(grad_y, None, token_rows), None, None


register_autograd("sparse_unified::permute", _backward, setup_context=_setup_context)
