# SPDX-License-Identifier: Apache-2.0
"""sort_by_expert: stable counting sort of the (token, slot) pairs by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unified.ops.registration import register_fake


def sort_by_expert(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups the R = T * K pairs of token and slot by expert, in flat order within an expert.

    Args:
        topk_idx: expert of each (token, slot), [T, K] int32, from 0 to num_experts - 1.
        num_experts: E.

    Returns:
        expert_offsets [E + 1] int32 (rows of expert e are [offsets[e], offsets[e + 1])),
        row_token [R] int32 (token of each row), token_rows [T, K] int32 (row of each pair).

    Raises:
        RuntimeError: a shape, dtype or index is out of range.
    """
    expert_offsets, row_token, token_rows = torch.ops.sparse_unified.sort_by_expert(
        topk_idx, num_experts
    )
    return expert_offsets, row_token, token_rows


register_fake(
    "sort_by_expert",
    lambda a: (
        a.topk_idx.new_empty((a.num_experts + 1,)),
        a.topk_idx.new_empty((a.topk_idx.shape[0] * a.topk_idx.shape[1],)),
        a.topk_idx.new_empty(a.topk_idx.shape),
    ),
)
