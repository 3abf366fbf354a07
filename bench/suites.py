# SPDX-License-Identifier: Apache-2.0
"""The ops of a block as calls, and what the steps around its experts cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unified import ops
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

from .cases import Case
from .harness import inputs, measure_interleaved
from .providers import sparse_block

Progress = Callable[[], object]
OpCall = Callable[[Tensor], object]

# The steps around the expert GEMMs; together they are the price of being sparse.
OVERHEAD_OPS = ("route_topk", "sort_by_expert", "permute", "combine")


class OpCalls:
    """Each op on the tensors that a block of this case would give it, and its torch reference.

    `leaves` are what else a backward pass of an op differentiates, besides its tokens.
    """

    def __init__(self, block: SparseMoE, x: Tensor) -> None:
        gate, top_k, num_experts = block.gate.weight, block.top_k, block.num_experts
        experts = (block.gate_proj, block.up_proj, block.down_proj)
        _, topk_logits, topk_idx = ops.route_topk(x, gate, top_k)
        offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
        weights = 1 + topk_logits
        self.maps = row_token, token_rows
        rows = ops.permute(x, row_token, token_rows)
        self.ours: dict[str, OpCall] = {
            "route_topk": lambda x: ops.route_topk(x, gate, top_k),
            "sort_by_expert": lambda _: ops.sort_by_expert(topk_idx, num_experts),
            "permute": lambda x: ops.permute(x, row_token, token_rows),
            "combine": lambda _: ops.combine(rows, weights, token_rows),
            "grouped_ffn": lambda x: ops.grouped_ffn(x, row_token, offsets, *experts, token_rows),
            "grouped_ffn_combine": lambda x: ops.grouped_ffn_combine(
                x, weights, row_token, token_rows, offsets, *experts
            ),
            "ffn_importance": lambda x: ops.ffn_importance(x, *experts[:2]),
        }
        self.leaves: dict[str, tuple[Tensor, ...]] = {
            "route_topk": (gate,),
            "combine": (rows, weights),
            "grouped_ffn": experts,
        }
        none = (x.new_empty(0, x.shape[1]),) * 2 + (x.new_empty(x.shape[1], 0),)
        self.moves: OpCall = lambda x: ops.grouped_ffn_combine(
            x, weights, row_token, token_rows, offsets, *none
        )
        self.torch: dict[str, OpCall] = {
            "route_topk": lambda x: reference.route_topk(x, gate, top_k),
            "sort_by_expert": lambda _: reference.sort_by_expert(topk_idx, num_experts),
            "permute": lambda x: reference.permute(x, row_token),
            "combine": lambda _: reference.combine(rows, weights, token_rows),
            "ffn_importance": lambda x: reference.ffn_importance(x, *experts[:2]),
        }


def _taking_turns(call: OpCall, xs: list[Tensor]) -> Callable[[int], object]:
    return lambda turn: call(xs[turn % len(xs)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What is not an expert GEMM, as shares of the time of the whole block.

    `alone`: routing, sorting, permuting and combining as ops of their own, each in its own rounds.
    `fused`: routing and sorting, and what the fused FFN spends on bringing tokens to experts and
    back, which is its time on experts of no width; all in the rounds of the block, caches cold.
    """

    alone: float
    fused: float


def measure_overhead(case: Case, dtype: torch.dtype, repeats: int, progress: Progress) -> Overhead:
    """Measures both shares; the first counts a buffer [R, D] that the block does without."""
    xs = inputs((case.tokens, case.hidden_size), dtype)
    block = sparse_block(case, dtype)
    with torch.inference_mode():
        calls = OpCalls(block, xs[0])
        steps = {op: _taking_turns(calls.ours[op], xs) for op in OVERHEAD_OPS}
        alone = sum(
            statistics.median(measure_interleaved({op: call}, repeats=repeats)[op])
            for op, call in steps.items()
        )
        seconds = measure_interleaved(
            {
                "block": _taking_turns(block, xs),
                "route_topk": steps["route_topk"],
                "sort_by_expert": steps["sort_by_expert"],
                "moves": _taking_turns(calls.moves, xs),
            },
            repeats=repeats,
            on_round=progress,
        )
    whole, *parts = (statistics.median(rounds) for rounds in seconds.values())
    return Overhead(alone=alone / whole, fused=sum(parts) / whole)
