# SPDX-License-Identifier: Apache-2.0
"""pruned_ffn: SwiGLU FFN over a list of kept blocks of its width, chosen per call.

As with grouped_ffn_combine, two registered ops share one meaning: `pruned_ffn` returns y alone and
recomputes its activations when a gradient is asked of it, `pruned_ffn_train` returns them too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_unified.ops.registration import (
    call_ffn,
    register_fake,
    register_ffn_autograd,
)


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
    return call_ffn("pruned_ffn", arguments, recompute=recompute)


def _fake_train(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    kept = (a.x.shape[0], a.kept_blocks.shape[0] * a.block_size)
    return a.x.new_empty(a.x.shape), a.x.new_empty(kept), a.x.new_empty(kept)


register_fake("pruned_ffn", lambda a: a.x.new_empty(a.x.shape))
register_fake("pruned_ffn_train", _fake_train)
register_ffn_autograd("pruned_ffn", ((0,), (2, 3, 4)))
