# SPDX-License-Identifier: Apache-2.0
"""The sparse FFN as stateless layers, in the form that the `kernels` package puts into models.

A layer has no constructor and no state: its `forward` runs on the module that it is put into, which
holds, with D hidden channels and E experts of h neurons,

    gate         nn.Linear, weight [E, D], no bias: the router
    gate_proj    [E * h, D], up_proj [E * h, D], down_proj [D, E * h]: parameters, expert by expert
    top_k        int, experts that a token uses

as `sparse_unified.nn.SparseMoE` without a shared expert does. On tokens x [T, D]

    y[t] = sum_k (1 + topk_logits[t, k]) * expert[topk_idx[t, k]](x[t])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified import ops


def sparse_ffn(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the sparse FFN that a module holds.

    Args:
        module: see above. x: [..., D], dtype and device of its weights.

    Returns:
        y [..., D] and the router logits [T, E] fp32.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or there is no kernel for them.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits, topk_logits, topk_idx = ops.route_topk(tokens, module.gate.weight, module.top_k)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, len(module.gate.weight))
    weights = 1 + topk_logits  # [T, K]
    experts = (module.gate_proj, module.up_proj, module.down_proj)
    if torch.is_grad_enabled():
        rows = ops.grouped_ffn(tokens, row_token, expert_offsets, *experts, token_rows)
        y = ops.combine(rows, weights, token_rows)
    else:
        y = ops.grouped_ffn_combine(
            tokens, weights, row_token, token_rows, expert_offsets, *experts
        )
    return y.view(x.shape), logits


class SparseFFN(nn.Module):
    """For modules that return y alone."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D]."""
        return sparse_ffn(self, x)[0]


class SparseFFNWithLogits(nn.Module):
    """For modules that return y and the router logits."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> y [..., D], logits [T, E] fp32."""
        return sparse_ffn(self, x)
