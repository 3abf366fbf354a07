# SPDX-License-Identifier: Apache-2.0
"""What is measured beside what: the whole block, each op alone, half of a FFN."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.ops import reference

from .cases import Case, work
from .check import check_backward, check_forward
from .measure import (
    Call,
    Candidate,
    NotMeasured,
    Session,
    Subject,
    inputs,
    measure_interleaved,
    name_of,
)
from .peers import PEERS, Peer, Setting, draw_weights

BLOCK, PRUNED = "sparse_ffn", "pruned_ffn"
OURS = "sparse_unified"
# Providers of the block that need no package but torch, for the demo.
BLOCK_PROVIDERS = ("dense", "dense_half", "dense_ours", "expert_loop", OURS)
# Ops with a gradient; and those of them for which frozen experts make a difference.
_TRAINED_OPS = {
    "fwd_bwd": ("route_topk", "permute", "combine", "grouped_ffn"),
    "fwd_bwd_frozen": ("grouped_ffn",),
}

OpCall = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Suite:
    """One group of providers, and those of them that ratios are given over (None: all)."""

    subject: Subject
    candidates: Mapping[str, Candidate]
    baselines: tuple[str, ...] | None = None


def module_call(
    module: nn.Module, direction: str, xs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Call:
    """One turn of a module: forward, or forward and backward of what requires a gradient."""

    def forward(turn: int) -> None:
        with torch.inference_mode():
            module(xs[turn % len(xs)])

    def both(turn: int) -> None:
        x = xs[turn % len(xs)].detach().requires_grad_()
        module(x).backward(grads[turn % len(grads)])
        module.zero_grad(set_to_none=True)

    return forward if direction == "fwd" else both


def block_suite(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    *,
    providers: Sequence[str] | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> Suite:
    """The whole block by every provider; each is compared with a reference before it is timed."""
    setting = Setting(case=case, dtype=dtype, device=device)
    weights = draw_weights(case, dtype, device)
    shape = (case.tokens, case.hidden_size)
    xs, grads = (inputs(shape, dtype, device=device) for _ in range(2))

    def build(peer: Peer) -> Call:
        if direction != "fwd" and not peer.trains:
            raise NotMeasured("has no backward")
        reason = peer.unavailable(setting)
        if reason is not None:
            raise NotMeasured(reason)
        provider = peer.build(setting, weights)
        for name, parameter in provider.named_parameters():
            parameter.requires_grad_(direction != "fwd_bwd_frozen" or name.endswith("gate.weight"))
        check_forward(provider, xs[0], case, weights)
        if direction != "fwd":
            check_backward(provider, xs[0], grads[0], case, weights)
        return module_call(provider, direction, xs, grads)

    return Suite(
        Subject(op=BLOCK, case=case.name, direction=direction, dtype=name_of(dtype)),
        {
            name: Candidate(
                build=partial(build, peers[name]),
                work=work(peers[name].formula, case, dtype, direction),
                can_capture=not peers[name].synchronises,
            )
            for name in providers or peers
        },
    )


def block_providers(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The block on the CPU by those who need torch alone; `dense` first, the baseline of ratios."""
    setting = Setting(case=case, dtype=dtype, device=torch.device("cpu"))
    weights = draw_weights(case, dtype)
    return {name: PEERS[name].build(setting, weights) for name in BLOCK_PROVIDERS}


def sparse_block(
    case: Case, dtype: torch.dtype, seed: int = 0, *, device: torch.device | str = "cpu"
) -> SparseMoE:
    """Our block with random experts and a random router, whose logits have unit variance."""
    torch.manual_seed(seed)
    block = SparseMoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        return_router_logits=False,
        device=device,
        dtype=dtype,
    )
    nn.init.normal_(block.gate.weight, std=case.hidden_size**-0.5)
    return block


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
        self.torch: dict[str, OpCall] = {
            "route_topk": lambda x: reference.route_topk(x, gate, top_k),
            "sort_by_expert": lambda _: reference.sort_by_expert(topk_idx, num_experts),
            "permute": lambda x: reference.permute(x, row_token),
            "combine": lambda _: reference.combine(rows, weights, token_rows),
            "ffn_importance": lambda x: reference.ffn_importance(x, *experts[:2]),
        }
        self.leaves: dict[str, tuple[Tensor, ...]] = {
            "route_topk": (gate,),
            "combine": (rows, weights),
            "grouped_ffn": experts,
        }
        # The fused FFN on experts of no width: all that it does besides the products.
        none = (x.new_empty(0, x.shape[1]),) * 2 + (x.new_empty(x.shape[1], 0),)
        self.moves: OpCall = lambda x: ops.grouped_ffn_combine(
            x, weights, row_token, token_rows, offsets, *none
        )


_AROUND = ("route_topk", "sort_by_expert", "permute", "combine")  # of the expert GEMMs
OPS = (*_AROUND, "grouped_ffn", "grouped_ffn_combine", "ffn_importance")


def op_call(calls: OpCalls, op: str, call: OpCall, direction: str, xs: Sequence[Tensor]) -> Call:
    """One turn of an op: forward, or forward and backward."""

    def first(x: Tensor) -> Tensor:
        found = call(x)
        out: Tensor = found[0] if isinstance(found, tuple) else found  # type: ignore[assignment]
        return out

    def forward(turn: int) -> None:
        with torch.inference_mode():
            call(xs[turn % len(xs)])

    if direction == "fwd":
        return forward
    leaves = calls.leaves.get(op, ())
    for leaf in leaves:
        leaf.requires_grad_(direction == "fwd_bwd")
    trained = leaves if direction == "fwd_bwd" else ()
    grad = torch.randn_like(first(xs[0]))

    def both(turn: int) -> None:
        x = xs[turn % len(xs)].detach().requires_grad_()
        torch.autograd.grad(first(x), (x, *trained), grad, allow_unused=True)

    return both


def op_suites(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    chosen: Sequence[str] = OPS,
) -> Iterator[Suite]:
    """Each op alone beside its torch reference, as far as it has that direction."""
    xs = inputs((case.tokens, case.hidden_size), dtype, device=device)
    with torch.no_grad():
        calls = OpCalls(sparse_block(case, dtype, device=device), xs[0])
    for op in chosen:
        if op not in _TRAINED_OPS.get(direction, OPS):
            continue
        runs = {OURS: calls.ours[op]} | ({"torch": calls.torch[op]} if op in calls.torch else {})
        yield Suite(
            Subject(op=op, case=case.name, direction=direction, dtype=name_of(dtype)),
            {
                name: Candidate(
                    build=partial(op_call, calls, op, call, direction, xs),
                    work=work(op, case, dtype, direction),
                    can_capture=name == OURS,
                )
                for name, call in runs.items()
            },
            ("torch",),
        )


class PrunedFfn(nn.Module):
    """pruned_ffn on the weights of `dense`; a share of its blocks is kept, drawn at random."""

    def __init__(self, dense: SwiGLU, block_size: int, num_kept: int, seed: int = 0) -> None:
        super().__init__()
        self.dense, self.block_size = dense, block_size
        num_blocks = dense.gate_proj.weight.shape[0] // block_size
        drawn = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.kept_blocks = drawn[:num_kept].sort().values.int().to(dense.gate_proj.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.dense
        weights = (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
        return ops.pruned_ffn(x, self.kept_blocks, *weights, self.block_size)


def pruned_suite(case: Case, dtype: torch.dtype, direction: str, device: torch.device) -> Suite:
    """Half of a FFN: pruned_ffn on half of the blocks, the dense FFN, and one of half the width.

    `dense_ours` is pruned_ffn on all blocks: the dense FFN at the rate of our own kernel.
    """
    torch.manual_seed(0)
    dense, dense_half = (
        SwiGLU(case.hidden_size, width, dtype=dtype, device=device)
        for width in (case.intermediate_size, case.active_width)
    )
    modules = {
        "dense": dense,
        "dense_ours": PrunedFfn(dense, case.block_size, case.num_blocks),
        "dense_half": dense_half,
        OURS: PrunedFfn(dense, case.block_size, case.num_blocks // 2),
    }
    shape = (case.tokens, case.hidden_size)
    xs, grads = (inputs(shape, dtype, device=device) for _ in range(2))
    for module in modules.values():
        module.requires_grad_(direction == "fwd_bwd")
    return Suite(
        Subject(op=PRUNED, case=case.name, direction=direction, dtype=name_of(dtype)),
        {
            name: Candidate(
                build=partial(module_call, module, direction, xs, grads),
                work=work(
                    "dense_ffn" if name in ("dense", "dense_ours") else "half_ffn",
                    case,
                    dtype,
                    direction,
                ),
            )
            for name, module in modules.items()
        },
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


def measure_overhead(case: Case, dtype: torch.dtype, session: Session) -> Overhead:
    """Measures both shares on the CPU; the first counts a buffer [R, D] that the block avoids."""
    xs = inputs((case.tokens, case.hidden_size), dtype)
    block = sparse_block(case, dtype)

    def rotating(call: OpCall) -> Call:
        return lambda turn: call(xs[turn % len(xs)])

    with torch.inference_mode():
        calls = OpCalls(block, xs[0])
        steps = {op: rotating(calls.ours[op]) for op in _AROUND}
        alone = sum(
            statistics.median(measure_interleaved({op: call}, repeats=session.repeats)[op])
            for op, call in steps.items()
        )
        parts = {"route_topk": steps["route_topk"], "sort_by_expert": steps["sort_by_expert"]}
        seconds = measure_interleaved(
            {"block": rotating(block), **parts, "moves": rotating(calls.moves)},
            repeats=session.repeats,
            on_round=session.on_round,
        )
    whole, *fused = (statistics.median(rounds) for rounds in seconds.values())
    return Overhead(alone=alone / whole, fused=sum(fused) / whole)
