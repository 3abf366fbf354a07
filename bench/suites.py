# SPDX-License-Identifier: Apache-2.0
"""What is measured for a case: the whole block beside its rivals, and each op alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

from .cases import Case, work
from .harness import Record, Roof, inputs, measure_interleaved, record
from .providers import block_providers, sparse_block

Progress = Callable[[], object]
OpCall = Callable[[Tensor], object]

# The steps around the expert GEMMs; together they are the price of being sparse.
OVERHEAD_OPS = ("route_topk", "sort_by_expert", "permute", "combine")


def _forward(module: nn.Module, xs: list[Tensor], turn: int) -> None:
    with torch.inference_mode():
        module(xs[turn % len(xs)])


def _forward_backward(module: nn.Module, xs: list[Tensor], grads: list[Tensor], turn: int) -> None:
    x = xs[turn % len(xs)].detach().requires_grad_()
    module(x).backward(grads[turn % len(grads)])
    module.zero_grad(set_to_none=True)


def measure_block(
    case: Case, dtype: torch.dtype, direction: str, roof: Roof, repeats: int, progress: Progress
) -> Iterator[Record]:
    """The whole block: ours, dense, dense at the active width, a loop over experts."""
    providers = block_providers(case, dtype)
    shape = (case.tokens, case.hidden_size)
    xs, grads = inputs(shape, dtype), inputs(shape, dtype)
    calls: dict[str, Callable[[int], object]] = {
        name: partial(_forward, module, xs)
        if direction == "fwd"
        else partial(_forward_backward, module, xs, grads)
        for name, module in providers.items()
    }
    seconds = measure_interleaved(calls, repeats=repeats, on_round=progress)
    for name in calls:
        op = "dense_ffn" if name == "dense" else "sparse_ffn"
        yield record(
            seconds,
            name,
            op="sparse_ffn",
            case=case.name,
            direction=direction,
            dtype=dtype,
            work=work(op, case, dtype, direction),
            roof=roof,
            baselines=("dense", "dense_half", "expert_loop"),
        )


class OpCalls:
    """Each op on the tensors that a block of this case would give it, and its torch reference."""

    def __init__(self, block: SparseMoE, x: Tensor) -> None:
        gate, top_k, num_experts = block.gate.weight, block.top_k, block.num_experts
        experts = (block.gate_proj, block.up_proj, block.down_proj)
        _, topk_logits, topk_idx = ops.route_topk(x, gate, top_k)
        offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
        weights = 1 + topk_logits
        rows = ops.permute(x, row_token, token_rows)
        self.ours: dict[str, OpCall] = {
            "route_topk": lambda x: ops.route_topk(x, gate, top_k),
            "sort_by_expert": lambda _: ops.sort_by_expert(topk_idx, num_experts),
            "permute": lambda x: ops.permute(x, row_token, token_rows),
            "combine": lambda _: ops.combine(rows, weights, token_rows),
            "grouped_ffn": lambda x: ops.grouped_ffn(x, row_token, offsets, *experts),
            "grouped_ffn_combine": lambda x: ops.grouped_ffn_combine(
                x, weights, row_token, token_rows, offsets, *experts
            ),
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
        }


def _taking_turns(call: OpCall, xs: list[Tensor]) -> Callable[[int], object]:
    return lambda turn: call(xs[turn % len(xs)])


def measure_ops(
    case: Case, dtype: torch.dtype, roof: Roof, repeats: int, progress: Progress
) -> Iterator[Record]:
    """Each op alone, forward, beside its plain torch reference (the FFNs beside nothing)."""
    xs = inputs((case.tokens, case.hidden_size), dtype)
    with torch.inference_mode():
        calls = OpCalls(sparse_block(case, dtype), xs[0])
        for op, ours in calls.ours.items():
            providers = {"sparse_unified": _taking_turns(ours, xs)}
            if op in calls.torch:
                providers["torch"] = _taking_turns(calls.torch[op], xs)
            seconds = measure_interleaved(providers, repeats=repeats, on_round=progress)
            for name in providers:
                yield record(
                    seconds,
                    name,
                    op=op,
                    case=case.name,
                    direction="fwd",
                    dtype=dtype,
                    work=work(op, case, dtype),
                    roof=roof,
                    baselines=("torch",) if op in calls.torch else (),
                )


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
