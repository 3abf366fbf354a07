# SPDX-License-Identifier: Apache-2.0
"""What is measured beside what: the whole block, each op alone, half of a FFN, configurations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified._library import module as library
from sparse_unified.nn.sparse_moe import run_experts
from sparse_unified.ops import backend, choices, reference

from .cases import Case, work
from .check import check_result, judge_rows
from .measure import Call, Candidate, NotMeasured, Suite, inputs, name_of
from .peers import PEERS, Peer, PrunedFfn, Setting, TorchFfn, draw_weights

BLOCK, PRUNED = "sparse_ffn", "pruned_ffn"
OURS = "sparse_unified"
OPS = (
    "route_topk",
    "sort_by_expert",
    "permute",
    "combine",
    "grouped_ffn",
    "grouped_ffn_combine",
    "ffn_importance",
)
# Providers of the block that need no package but torch, for the demo.
BLOCK_PROVIDERS = ("dense", "dense_half", "dense_ours", "expert_loop", OURS)
# Ops with a gradient; and those of them for which frozen experts make a difference.
_TRAINED_OPS = {
    "fwd": OPS,
    "fwd_bwd": ("route_topk", "permute", "grouped_ffn_combine"),
    "fwd_bwd_frozen": ("grouped_ffn_combine",),
}
# Overrides the choice of kernels and tiles; they read it at each call.
VARIABLE = "SPARSE_UNIFIED_GROUPED_FFN"
CHOSEN = "chosen"

OpCall = Callable[[Tensor], Any]


def _subject(op: str, case: Case, direction: str, dtype: torch.dtype) -> dict[str, str]:
    return {"op": op, "case": case.name, "direction": direction, "dtype": name_of(dtype)}


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return inputs((case.tokens, case.hidden_size), dtype, device=device)


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
    xs, grads = (_inputs(case, dtype, device) for _ in range(2))

    def build(peer: Peer) -> Call:
        if direction != "fwd" and not peer.trains:
            raise NotMeasured("has no backward")
        provider = peer.build(setting, weights)
        for name, parameter in provider.named_parameters():
            parameter.requires_grad_(direction != "fwd_bwd_frozen" or name.endswith("gate.weight"))
        check_result(provider, xs[0], case, weights, None if direction == "fwd" else grads[0])
        return module_call(provider, direction, xs, grads)

    return Suite(
        subject=_subject(BLOCK, case, direction, dtype),
        candidates={
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


def op_calls(case: Case, x: Tensor) -> dict[str, tuple[dict[str, OpCall], tuple[Tensor, ...]]]:
    """Each op on the tensors that our block would give it: calls by provider, ours and the torch
    reference where there is one, and what a backward pass differentiates besides the tokens."""
    drawn = draw_weights(case, x.dtype, x.device)
    gate, gate_proj, up_proj, down_proj = (
        nn.Parameter(w) for w in (drawn.gate, drawn.gate_proj, drawn.up_proj, drawn.down_proj)
    )
    experts = gate_proj, up_proj, down_proj
    _, topk_logits, topk_idx = ops.route_topk(x, gate, case.top_k)
    offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, case.num_experts)
    maps = row_token, token_rows, offsets
    rows = ops.permute(x, row_token, token_rows)

    def both(call: Callable[[Any, Tensor], Any]) -> dict[str, OpCall]:
        return {OURS: partial(call, ops), "torch": partial(call, reference)}

    permute = {
        OURS: lambda x: ops.permute(x, row_token, token_rows),
        "torch": lambda x: reference.permute(x, row_token),
    }
    grouped_ffn = {OURS: lambda x: ops.grouped_ffn(x, row_token, offsets, *experts)}
    combined = {OURS: lambda x: ops.grouped_ffn_combine(x, topk_logits, *maps, *experts, 1.0)}
    return {
        "route_topk": (both(lambda by, x: by.route_topk(x, gate, case.top_k)), (gate,)),
        "sort_by_expert": (both(lambda by, _: by.sort_by_expert(topk_idx, case.num_experts)), ()),
        "permute": (permute, ()),
        "combine": (both(lambda by, _: by.combine(rows, topk_logits, token_rows, 1.0)), ()),
        "grouped_ffn": (grouped_ffn, ()),
        "grouped_ffn_combine": (combined, (topk_logits, *experts)),
        "ffn_importance": (both(lambda by, x: by.ffn_importance(x, gate_proj, up_proj)), ()),
    }


def _op_call(
    call: OpCall, direction: str, xs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> Callable[[int], Any]:
    """One turn of an op: its outputs, or the gradients of the tokens and of some leaves."""

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        found = call(x)
        return found if isinstance(found, tuple) else (found,)

    def forward(turn: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return outputs(xs[turn % len(xs)])

    if direction == "fwd":
        return forward
    for leaf in leaves:
        leaf.requires_grad_(direction == "fwd_bwd")
    trained = leaves if direction == "fwd_bwd" else ()
    grad = torch.randn_like(outputs(xs[0])[0])

    def both(turn: int) -> tuple[Tensor, ...]:
        x = xs[turn % len(xs)].detach().requires_grad_()
        return torch.autograd.grad(outputs(x)[0], (x, *trained), grad, allow_unused=True)

    return both


def op_suites(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    chosen: Sequence[str] = OPS,
) -> Iterator[Suite]:
    """Each op alone beside its torch reference, as far as it has that direction."""
    chosen = [op for op in chosen if op in _TRAINED_OPS[direction]]
    if not chosen:
        return
    xs = _inputs(case, dtype, device)
    with torch.no_grad():
        calls = op_calls(case, xs[0])
    for op in chosen:
        runs, leaves = calls[op]
        yield Suite(
            subject=_subject(op, case, direction, dtype),
            candidates={
                name: Candidate(
                    build=partial(_op_call, call, direction, xs, leaves),
                    work=work(op, case, dtype, direction),
                    can_capture=name == OURS,
                )
                for name, call in runs.items()
            },
            baselines=("torch",),
        )


def pruned_suite(case: Case, dtype: torch.dtype, direction: str, device: torch.device) -> Suite:
    """Half of a FFN: pruned_ffn on half of the blocks, the dense FFN, and one of half the width.

    `dense_ours` is pruned_ffn on all blocks: the dense FFN at the rate of our own kernel.
    """
    torch.manual_seed(0)
    dense, dense_half = (
        TorchFfn(case.hidden_size, width, dtype=dtype, device=device)
        for width in (case.intermediate_size, case.active_width)
    )
    modules = {
        "dense": (dense, "dense_ffn"),
        "dense_ours": (PrunedFfn(dense, case.block_size, case.num_blocks), "dense_ffn"),
        "dense_half": (dense_half, "half_ffn"),
        OURS: (PrunedFfn(dense, case.block_size, case.num_blocks // 2), "half_ffn"),
    }
    xs, grads = (_inputs(case, dtype, device) for _ in range(2))
    for module, _ in modules.values():
        module.requires_grad_(direction == "fwd_bwd")
    return Suite(
        subject=_subject(PRUNED, case, direction, dtype),
        candidates={
            name: Candidate(
                build=partial(module_call, module, direction, xs, grads),
                work=work(formula, case, dtype, direction),
            )
            for name, (module, formula) in modules.items()
        },
    )


def set_variant(variant: str) -> None:
    """Makes the calls that follow use a variant; `CHOSEN` is the kernels' own choice."""
    if variant == CHOSEN:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = variant


def find_variants(direction: str) -> tuple[str, ...]:
    """The variants of a direction, as the library lists them."""
    listed: list[str] = library.grouped_ffn_variants()
    is_backward = direction == "fwd_bwd"
    return tuple(v for v in listed if "," not in v or (",grad_" in v) == is_backward)


def runs_grouped_mm(case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's products may run the experts of a case, as a variant."""
    is_legal = dtype == torch.bfloat16 and not case.block_size and device.type == "cuda"
    return is_legal and backend.has_grouped_mm(device)


def variant_suite(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    variants: Sequence[str] | None = None,
) -> Suite:
    """What a block does behind its router, or pruned_ffn of a case with blocks, by each variant: by
    default all that the kernels know, and torch's products where they may run.

    Each is compared with the chosen one before it is timed. `set_variant(CHOSEN)` afterwards.
    """
    xs = _inputs(case, dtype, device)
    if case.block_size:
        op, formula = PRUNED, "half_ffn"
        dense = TorchFfn(case.hidden_size, case.intermediate_size, dtype=dtype, device=device)
        module = PrunedFfn(dense, case.block_size, case.num_blocks // 2)
        run = _op_call(module, direction, xs, tuple(module.parameters()))
    else:
        op = formula = "grouped_ffn_combine"
        drawn = draw_weights(case, dtype, device)
        gate, up, down = (
            nn.Parameter(w) for w in (drawn.gate_proj, drawn.up_proj, drawn.down_proj)
        )
        _, weights, idx = ops.route_topk(xs[0], drawn.gate, case.top_k)

        def experts(x: Tensor) -> Tensor:
            return run_experts(x, weights, idx, case.num_experts, gate, up, down, 1.0)

        run = _op_call(experts, direction, xs, (weights, gate, up, down))
    expected = run(0)

    def build(variant: str) -> Call:
        set_variant(variant)
        for position, (found, wanted) in enumerate(zip(run(0), expected, strict=True)):
            judge_rows(f"result {position}", found, wanted, dtype)

        def call(turn: int) -> None:
            set_variant(variant)
            run(turn)

        return call

    if variants is None:
        variants = find_variants(direction) if device.type == "cuda" else ()
        if runs_grouped_mm(case, dtype, device):
            variants += (f"family={choices.GROUPED_MM}",)
    cost = work(formula, case, dtype, direction)
    return Suite(
        subject=_subject(op, case, direction, dtype),
        candidates={
            variant: Candidate(build=partial(build, variant), work=cost, can_capture=False)
            for variant in (CHOSEN, *variants)
        },
        baselines=(CHOSEN,),
    )
