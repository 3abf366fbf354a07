# SPDX-License-Identifier: Apache-2.0
"""The sparse FFN from torch ops alone, for devices without a kernel of ours.

Same semantics in the dtype of the weights, one host read-back of the expert offsets per call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.ops import reference


def expert_ffn(
    x: Tensor,
    weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """x [T, D], weights and topk_idx [T, K] -> y [T, D]; sort, grouped FFN and combine."""
    expert_offsets, row_token, token_rows = reference.sort_by_expert(topk_idx, num_experts)
    sizes = expert_offsets.diff().tolist()
    rows = reference.permute(x, row_token).split(sizes)
    outputs = [
        F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
        for own, gate, up, down in zip(
            rows,
            gate_proj.chunk(num_experts),
            up_proj.chunk(num_experts),
            down_proj.chunk(num_experts, dim=1),
            strict=True,
        )
    ]
    return reference.combine(torch.cat(outputs), weights, token_rows)
