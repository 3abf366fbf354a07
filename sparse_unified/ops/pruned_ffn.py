# SPDX-License-Identifier: Apache-2.0
"""pruned_ffn: SwiGLU FFN over a list of kept blocks of its width, chosen per call.

As with grouped_ffn, two registered ops share one meaning: `pruned_ffn` returns y alone and
recomputes its activations when a gradient is asked of it, `pruned_ffn_train` returns them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_unified.ops.registration import refuse_gradient, register_fake


def pruned_ffn(
    x: Tensor,
    kept_blocks: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    block_size: int,
    *,
    recompute: bool = False,
) -> Tensor:
    """Sums the kept blocks b of a FFN: y = sum_b down_b(silu(gate_b x) * up_b x).

    Block b owns the neurons [b * block_size, (b + 1) * block_size): rows of gate_proj and up_proj,
    columns of down_proj. What is not kept is neither read nor computed, and the weights stay as
    they are, so the list may change with every call. Sums run in the order of the list.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        kept_blocks: [B] int32, each block at most once, in any order; none gives y = 0.
        gate_proj, up_proj: [I, D], dtype of x, any row stride; I a multiple of 16.
        down_proj: [D, I], dtype of x, any row stride.
        block_size: neurons of a block, a multiple of 16 from 16 to 128 that divides I.
        recompute: trade time for memory: keep no activations for backward.

    Returns:
        y [T, D], dtype of x. Differentiable in x and the weights; blocks that are not kept get
        gradients of zero.

    Raises:
        RuntimeError: a shape, dtype, block or block size does not fit.
    """
    arguments = (x, kept_blocks, gate_proj, up_proj, down_proj, block_size)
    wants_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, gate_proj, up_proj, down_proj)
    )
    y: Tensor
    if wants_gradient and not recompute:
        y, _, _ = torch.ops.sparse_unified.pruned_ffn_train(*arguments)
    else:
        y = torch.ops.sparse_unified.pruned_ffn(*arguments)
    return y


@register_fake("pruned_ffn")
def _fake(
    x: Tensor,
    kept_blocks: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    block_size: int,
) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("pruned_ffn_train")
def _fake_train(
    x: Tensor,
    kept_blocks: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0], kept_blocks.shape[0] * block_size)
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)


@register_fake("pruned_ffn_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    kept_blocks: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_rows: Tensor,
    up_rows: Tensor,
    block_size: int,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_size, width = x.shape[1], gate_proj.shape[0]
    return (
        x.new_empty((x.shape[0] if needs_x else 0, hidden_size)),
        x.new_empty((width if needs_weights else 0, hidden_size)),
        x.new_empty((width if needs_weights else 0, hidden_size)),
        x.new_empty((hidden_size if needs_weights else 0, width)),
    )


def _gradients(
    ctx: Any, grad_y: Tensor, activations: tuple[Tensor, Tensor], saved: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    needs_x, _, *needs_weights, _ = ctx.needs_input_grad
    grad_x, *grad_weights = torch.ops.sparse_unified.pruned_ffn_backward(
        grad_y, *saved, *activations, ctx.block_size, needs_x, any(needs_weights)
    )
    wanted = (
        grad if needed else None for grad, needed in zip(grad_weights, needs_weights, strict=True)
    )
    return grad_x if needs_x else None, None, *wanted, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, gate_rows, up_rows = torch.ops.sparse_unified.pruned_ffn_train(*saved, ctx.block_size)
    return _gradients(ctx, grad_y, (gate_rows, up_rows), saved)


def _setup_context_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate_rows, up_rows = output
    ctx.mark_non_differentiable(gate_rows, up_rows)
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors, gate_rows, up_rows)


def _backward_train(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *saved, gate_rows, up_rows = ctx.saved_tensors
    return _gradients(ctx, grad_y, (gate_rows, up_rows), tuple(saved))


torch.library.register_autograd(
    "sparse_unified::pruned_ffn", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "sparse_unified::pruned_ffn_train", _backward_train, setup_context=_setup_context_train
)
refuse_gradient("pruned_ffn_backward")
