# SPDX-License-Identifier: Apache-2.0
"""Shapes by name, and the bytes and FLOPs of each op as formulas of them.

T tokens, D hidden size, I intermediate size, E experts, h = I / E, K top_k, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of the sparse FFN; no shared expert."""

    name: str
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def expert_width(self) -> int:
        return self.intermediate_size // self.num_experts


def _family(prefix: str, tokens: list[int], hidden_size: int, intermediate_size: int) -> list[Case]:
    return [
        Case(
            name=f"{prefix}-{experts}to{top_k}-T{count}",
            tokens=count,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=experts,
            top_k=top_k,
        )
        for experts, top_k in ((16, 8), (32, 16))
        for count in tokens
    ]


def _odd(name: str, tokens: int, hidden_size: int, width: int, experts: int, top_k: int) -> Case:
    return Case(
        name=name,
        tokens=tokens,
        hidden_size=hidden_size,
        intermediate_size=experts * width,
        num_experts=experts,
        top_k=top_k,
    )


CASES = {
    case.name: case
    for case in (
        # A quarter of BAGEL's hidden size and width: the same experts, in seconds on two cores.
        *_family("quarter", [512, 1024, 4096], 896, 4736),
        *_family("bagel", [256, 1024, 4096], 3584, 18944),
        # Sizes that fit no tile: to see that they run, not how fast.
        _odd("odd-16to16-T37", 37, 256, 592, 16, 16),  # every expert
        _odd("odd-5to2-T1", 1, 136, 24, 5, 2),  # experts without a token
        _odd("odd-12to5-T777", 777, 1000, 208, 12, 5),  # no power of two
        _odd("odd-7to3-T300", 300, 72, 40, 7, 3),
        _odd("odd-1to1-T129", 129, 512, 1184, 1, 1),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCase:
    """One shape of a dense FFN of which half of the width blocks are kept."""

    name: str
    tokens: int
    hidden_size: int
    intermediate_size: int
    block_size: int

    @property
    def num_kept(self) -> int:
        return self.intermediate_size // self.block_size // 2

    @property
    def kept_share(self) -> float:
        return self.num_kept * self.block_size / self.intermediate_size


def _pruned_family(
    prefix: str, tokens: list[int], hidden_size: int, intermediate_size: int
) -> list[PrunedCase]:
    return [
        PrunedCase(
            name=f"{prefix}-half-bs{block_size}-T{count}",
            tokens=count,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            block_size=block_size,
        )
        for block_size in (16, 32, 64, 128)
        for count in tokens
    ]


PRUNED_CASES = {
    case.name: case
    for case in (
        *_pruned_family("quarter", [512, 1024, 4096], 896, 4736),
        *_pruned_family("bagel", [256, 1024, 4096], 3584, 18944),
    )
}

CPU_DEFAULTS = (
    "quarter-16to8-T1024",
    "quarter-32to16-T1024",
    *(f"quarter-half-bs{block_size}-T1024" for block_size in (16, 32, 64, 128)),
)
CUDA_DEFAULTS = (
    *(name for name in CASES if name.startswith("bagel-")),
    *(f"bagel-half-bs{block_size}-T4096" for block_size in (16, 32, 64, 128)),
)

# Forward; and backward, of everything; and backward with experts frozen, as in the first tuning.
DIRECTIONS = ("fwd", "fwd_bwd", "fwd_bwd_frozen")
# How often a direction runs each GEMM: forward, input gradient, weight gradient.
_GEMM_PASSES = {"fwd": 1, "fwd_bwd": 3, "fwd_bwd_frozen": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """What one call moves and computes at least."""

    flops: float
    bytes: float


def work(op: str, case: Case, dtype: torch.dtype, direction: str = "fwd") -> Work:
    """FLOPs and bytes of one call: every operand read or written once.

    A backward pass counts as the GEMMs it repeats; with frozen experts, all but one of three. That
    of `permute` and `combine`, which run none, moves rows the other way.
    """
    t, d, e, r = case.tokens, case.hidden_size, case.num_experts, case.rows
    size = dtype.itemsize
    weights = 3 * d * case.intermediate_size * size
    formulas = {
        "route_topk": Work(2 * t * d * e, (t * d + e * d) * size + t * (e + 2 * case.top_k) * 4),
        "sort_by_expert": Work(0, (3 * r + e + 1) * 4),
        "permute": Work(0, (t + r) * d * size + r * 4),
        "combine": Work(2 * r * d, (t + r) * d * size + 2 * r * 4),
        "grouped_ffn": Work(6 * r * d * case.expert_width, (t + r) * d * size + weights),
        "grouped_ffn_combine": Work(
            6 * r * d * case.expert_width + 2 * r * d, 2 * t * d * size + weights
        ),
        "sparse_ffn": Work(
            6 * r * d * case.expert_width + 2 * r * d + 2 * t * d * e, 2 * t * d * size + weights
        ),
        "ffn_importance": Work(
            4 * t * d * case.intermediate_size,
            t * d * size + weights * 2 / 3 + 3 * case.intermediate_size * 4,
        ),
        "dense_ffn": Work(6 * t * d * case.intermediate_size, 2 * t * d * size + weights),
        # A dense FFN of the active width, which touches no other weights.
        "half_ffn": Work(
            6 * r * d * case.expert_width,
            2 * t * d * size + weights * case.top_k // case.num_experts,
        ),
    }
    backward = {
        "permute": Work(r * d, (t + r) * d * size + r * 4),
        # Gradients of the rows, written, and of their weights, for which the rows are read.
        "combine": Work(3 * r * d, (t + 2 * r) * d * size + 3 * r * 4),
    }
    forward = formulas[op]
    if direction == "fwd" or op not in backward:
        return _repeated(forward, direction)
    return Work(forward.flops + backward[op].flops, forward.bytes + backward[op].bytes)


def pruned_work(
    case: PrunedCase, dtype: torch.dtype, direction: str = "fwd", *, share: float
) -> Work:
    """FLOPs and bytes of a dense FFN at `share` of its width, as `work` counts them."""
    t, d, width = case.tokens, case.hidden_size, case.intermediate_size * share
    forward = Work(6 * t * d * width, (2 * t * d + 3 * d * width) * dtype.itemsize)
    return _repeated(forward, direction)


def _repeated(forward: Work, direction: str) -> Work:
    passes = _GEMM_PASSES[direction]
    return Work(passes * forward.flops, passes * forward.bytes)
