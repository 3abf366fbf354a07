# SPDX-License-Identifier: Apache-2.0
"""route_topk: router GEMM and top-k of the raw logits, in one pass over x."""

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


def route_topk(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses top_k experts for every token: logits = x @ gate.T, no bias, no softmax.

    Accumulates in fp32 whatever the input type. Larger logits come first, NaN before everything,
    equal logits by lower expert index.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        gate: router weight [E, D], dtype of x.
        top_k: K, experts per token, from 1 to E.

    Returns:
        logits [T, E] fp32, topk_logits [T, K] fp32, topk_idx [T, K] int32.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("route_topk", x, gate)
    logits, topk_logits, topk_idx = torch.ops.sparse_unified.route_topk(x, gate, top_k)
    return logits, topk_logits, topk_idx


register_fake(
    "route_topk",
    lambda a: (
        a.x.new_empty((a.x.shape[0], a.gate.shape[0]), dtype=torch.float32),
        a.x.new_empty((a.x.shape[0], a.top_k), dtype=torch.float32),
        a.x.new_empty((a.x.shape[0], a.top_k), dtype=torch.int32),
    ),
)
register_fake(
    "route_topk_backward",
    lambda a: (
        a.x.new_empty((a.x.shape[0] if a.needs_x else 0, a.x.shape[1])),
        a.x.new_empty((a.gate.shape[0] if a.needs_gate else 0, a.x.shape[1])),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, _ = inputs
    topk_idx = output[2]
    ctx.mark_non_differentiable(topk_idx)
    ctx.save_for_backward(x, gate, topk_idx)


def _backward(
    ctx: Any, grad_logits: Tensor, grad_topk_logits: Tensor, _: Any
) -> tuple[Tensor | None, Tensor | None, None]:
    x, gate, topk_idx = ctx.saved_tensors
    needs_x, needs_gate = ctx.needs_input_grad[:2]
    grad_x, grad_gate = torch.ops.sparse_unified.route_topk_backward(
        grad_logits, grad_topk_logits, topk_idx, x, gate, needs_x, needs_gate
    )
    return grad_x if needs_x else None, grad_gate if needs_gate else None, None


register_autograd("sparse_unified::route_topk", _backward, setup_context=_setup_context)
refuse_gradient("route_topk_backward")
