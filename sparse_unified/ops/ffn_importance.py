# SPDX-License-Identifier: Apache-2.0
"""ffn_importance: what each neuron of a SwiGLU FFN does on some tokens, for calibration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.ops import composed
from sparse_unified.ops.registration import refuse_gradient, refuse_tangents, register_fake


def ffn_importance(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    threshold: float = 0.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens, with h = silu(gate_proj x) * up_proj x and weights w (1 without).

        sum_abs = sum_t w[t] |h[t]|      sum_squares = sum_t w[t] h[t]^2
        num_fired = sum_t w[t] [|h[t]| > threshold]

    h is never whole in memory, only a tile of it. A call returns its own sums, which long
    calibrations should add up in fp64.

    Args:
        x: tokens [T, D]; fp32, bf16 or fp16.
        gate_proj, up_proj: [I, D], dtype of x, any row stride.
        threshold: above which |h| counts as firing; finite and at least 0.
        token_weights: [T] fp32, finite and at least 0; tokens of weight 0 (padding, masked) count
            for nothing, even where they hold NaN.

    Returns:
        sum_abs, sum_squares, num_fired, each [I] fp32, summed in fp64 over tiles of tokens.

    Raises:
        RuntimeError: a shape, dtype or value does not fit; a gradient is asked of the result.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents("ffn_importance", x, gate_proj, up_proj, token_weights)
    sum_abs, sum_squares, num_fired = torch.ops.sparse_unified.ffn_importance(
        x, gate_proj, up_proj, threshold, token_weights
    )
    return sum_abs, sum_squares, num_fired


register_fake(
    "ffn_importance",
    lambda a: tuple(a.x.new_empty(a.gate_proj.shape[:1], dtype=torch.float32) for _ in range(3)),
)
torch.library.impl("sparse_unified::ffn_importance", "CUDA")(composed.ffn_importance)
refuse_gradient("ffn_importance")
