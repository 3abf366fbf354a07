# SPDX-License-Identifier: Apache-2.0
"""A sparse FFN divided over processes by whole experts, so that their widths stay what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SparseMoE


class ExpertShare(nn.Module):
    """The whole experts of a sparse FFN that one process of a tensor-parallel group has.

    Every process routes all tokens, computes those of its experts, and adds the results up.

    Args:
        block: a sparse FFN of these experts alone.
        num_experts: of all processes. first: number of the first one here.
        top_k: experts a token uses.
        reduce: sums a tensor over the processes.
    """

    def __init__(
        self, block: SparseMoE, num_experts: int, first: int, top_k: int, reduce: Any
    ) -> None:
        super().__init__()
        like = block.gate.weight
        block.gate = nn.Linear(
            block.hidden_size, num_experts, bias=False, device=like.device, dtype=like.dtype
        )
        self.block, self.first, self.top_k, self.reduce = block, first, top_k, reduce

    def official_views(self) -> dict[str, Tensor | None]:
        """As of the block, under the numbers that the experts have in the file; None: not here."""
        views: dict[str, Tensor | None] = {}
        for name, view in self.block.official_views().items():
            kind, _, rest = name.partition(".")
            if kind == "experts":
                number, _, inner = rest.partition(".")
                for expert in range(self.block.gate.out_features):
                    views.setdefault(f"experts.{expert}.{inner}", None)
                name = f"experts.{self.first + int(number)}.{inner}"
            views[name] = view
        return views

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D]."""
        block, count = self.block, self.block.num_experts
        tokens = x.reshape(-1, x.shape[-1])
        _, topk_logits, topk_idx = ops.route_topk(tokens, block.gate.weight, self.top_k)
        is_own = (topk_idx >= self.first) & (topk_idx < self.first + count)
        # Rows of the experts elsewhere come last, and are zeros.
        chosen = torch.where(is_own, topk_idx - self.first, count)
        expert_offsets, row_token, token_rows = ops.sort_by_expert(chosen, count + 1)
        num_rows = int(expert_offsets[count])
        rows = tokens.new_zeros(len(row_token), tokens.shape[1])
        rows[:num_rows] = ops.grouped_ffn(
            tokens, row_token[:num_rows], expert_offsets[:-1], *block.plain_weights()
        )
        y = ops.combine(rows, topk_logits, token_rows, 1.0)
        summed: Tensor = self.reduce(y.view(x.shape))
        return summed
