# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn: SwiGLU expert FFN over rows grouped by expert, gather fused into the load.

Two registered ops share one kernel. `grouped_ffn` returns y alone and recomputes its activations
when a gradient is asked of it; `grouped_ffn_train` also returns the two activations, so that
backward does not. The function below picks the second where a gradient will be wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_unified.ops.registration import refuse_gradient, register_fake


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
        gate_proj, up_proj: [E * h, D], dtype of x, any row stride.
        down_proj: [D, E * h], dtype of x, any row stride.
        token_rows: rows of each token, [T, K] int32, from `sort_by_expert`; needed for the
            gradient of x alone, which is summed in the order of the rows without it.
        recompute: trade time for memory: keep no activations for backward.

    Returns:
        y [R, D], dtype of x.

    Raises:
        RuntimeError: a shape, dtype or index does not fit.
    """
    arguments = (x, row_token, expert_offsets, gate_proj, up_proj, down_proj, token_rows)
    wants_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, gate_proj, up_proj, down_proj)
    )
    y: Tensor
    if wants_gradient and not recompute:
        y, _, _ = torch.ops.sparse_unified.grouped_ffn_train(*arguments)
    else:
        y = torch.ops.sparse_unified.grouped_ffn(*arguments)
    return y


@register_fake("grouped_ffn")
def _fake(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    token_rows: Tensor | None = None,
) -> Tensor:
    return x.new_empty((row_token.shape[0], x.shape[1]))


@register_fake("grouped_ffn_train")
def _fake_train(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    token_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = row_token.shape[0]
    width = gate_proj.shape[0] // (expert_offsets.shape[0] - 1)
    return (
        x.new_empty((num_rows, x.shape[1])),
        x.new_empty((num_rows, width)),
        x.new_empty((num_rows, width)),
    )


@register_fake("grouped_ffn_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_rows: Tensor,
    up_rows: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_size, width = x.shape[1], gate_proj.shape[0]
    return (
        x.new_empty((row_token.shape[0] if needs_x else 0, hidden_size)),
        x.new_empty((width if needs_weights else 0, hidden_size)),
        x.new_empty((width if needs_weights else 0, hidden_size)),
        x.new_empty((hidden_size if needs_weights else 0, width)),
    )


def _sum_rows(grad_rows: Tensor, row_token: Tensor, x: Tensor, token_rows: Tensor | None) -> Tensor:
    """Gradient of x [T, D] from that of its rows [R, D]; without token_rows in row order."""
    summed: Tensor
    if token_rows is not None:
        summed = torch.ops.sparse_unified.combine(grad_rows, None, token_rows)
    else:
        wide = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        summed = wide.index_add(0, row_token, grad_rows.float()).to(x.dtype)
    return summed


def _gradients(
    ctx: Any, grad_y: Tensor, activations: tuple[Tensor, Tensor], saved: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    x, row_token, expert_offsets, gate_proj, up_proj, down_proj, *rest = saved
    needs_x = ctx.needs_input_grad[0]
    needs_weights = any(ctx.needs_input_grad[3:6])
    grad_rows, *grad_weights = torch.ops.sparse_unified.grouped_ffn_backward(
        grad_y,
        x,
        row_token,
        expert_offsets,
        gate_proj,
        up_proj,
        down_proj,
        *activations,
        needs_x,
        needs_weights,
    )
    grad_x = None
    if needs_x:
        grad_x = _sum_rows(grad_rows, row_token, x, rest[0] if rest else None)
    if not needs_weights:
        return grad_x, *[None] * 6
    wanted = (
        grad if needed else None
        for grad, needed in zip(grad_weights, ctx.needs_input_grad[3:6], strict=True)
    )
    return grad_x, None, None, *wanted, None


def _save(ctx: Any, inputs: tuple[Any, ...], *activations: Tensor) -> None:
    present = inputs if inputs[-1] is not None else inputs[:-1]
    ctx.save_for_backward(*present, *activations)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, gate_rows, up_rows = torch.ops.sparse_unified.grouped_ffn_train(*saved[:6])
    return _gradients(ctx, grad_y, (gate_rows, up_rows), saved)


def _setup_context_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate_rows, up_rows = output
    ctx.mark_non_differentiable(gate_rows, up_rows)
    _save(ctx, inputs, gate_rows, up_rows)


def _backward_train(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *saved, gate_rows, up_rows = ctx.saved_tensors
    return _gradients(ctx, grad_y, (gate_rows, up_rows), tuple(saved))


torch.library.register_autograd(
    "sparse_unified::grouped_ffn", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "sparse_unified::grouped_ffn_train", _backward_train, setup_context=_setup_context_train
)
refuse_gradient("grouped_ffn_backward")
