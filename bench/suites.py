# SPDX-License-Identifier: Apache-2.0
"""What is measured for a case: the whole block beside its rivals, and each op alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.ops import reference

from .cases import Case, work
from .harness import Record, Roof, inputs, measure_interleaved, record
from .providers import block_providers, sparse_block

Progress = Callable[[], object]

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


def measure_ops(
    case: Case, dtype: torch.dtype, roof: Roof, repeats: int, progress: Progress
) -> Iterator[Record]:
    """Each op alone, forward, beside its plain torch reference (the FFNs beside nothing)."""
    block = sparse_block(case, dtype)
    gate, experts = block.gate.weight, (block.gate_proj, block.up_proj, block.down_proj)
    xs = inputs((case.tokens, case.hidden_size), dtype)
    with torch.inference_mode():
        _, topk_logits, topk_idx = ops.route_topk(xs[0], gate, case.top_k)
        offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, case.num_experts)
        weights = 1 + topk_logits
        rows = ops.permute(xs[0], row_token, token_rows)
        ffn_calls = {
            "grouped_ffn": lambda x: ops.grouped_ffn(x, row_token, offsets, *experts),
            "grouped_ffn_combine": lambda x: ops.grouped_ffn_combine(
                x, weights, row_token, token_rows, offsets, *experts
            ),
        }
        calls = {
            "route_topk": (
                lambda x: ops.route_topk(x, gate, case.top_k),
                lambda x: reference.route_topk(x, gate, case.top_k),
            ),
            "sort_by_expert": (
                lambda _: ops.sort_by_expert(topk_idx, case.num_experts),
                lambda _: reference.sort_by_expert(topk_idx, case.num_experts),
            ),
            "permute": (
                lambda x: ops.permute(x, row_token, token_rows),
                lambda x: reference.permute(x, row_token),
            ),
            "combine": (
                lambda _: ops.combine(rows, weights, token_rows),
                lambda _: reference.combine(rows, weights, token_rows),
            ),
            **{name: (call, None) for name, call in ffn_calls.items()},
        }
        for op, (ours, torch_reference) in calls.items():
            providers = {"sparse_unified": ours}
            if torch_reference is not None:
                providers["torch"] = torch_reference
            seconds = measure_interleaved(
                {
                    name: lambda turn, call=call: call(xs[turn % len(xs)])  # type: ignore[misc]
                    for name, call in providers.items()
                },
                repeats=repeats,
                on_round=progress,
            )
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
                    baselines=("torch",) if torch_reference is not None else (),
                )


def overhead_fraction(records: list[Record], case: str) -> float | None:
    """Routing, sorting, permuting and combining, each alone, over the time of the whole block."""
    ours = {
        r.op: r.median_us
        for r in records
        if r.case == case and r.provider == "sparse_unified" and r.direction == "fwd"
    }
    if not {*OVERHEAD_OPS, "sparse_ffn"} <= ours.keys():
        return None
    return sum(ours[op] for op in OVERHEAD_OPS) / ours["sparse_ffn"]
