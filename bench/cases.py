# SPDX-License-Identifier: Apache-2.0
"""Shapes by name, and the bytes and FLOPs of each op as formulas of them.

T tokens, D hidden size, I intermediate size, E experts, h = I / E, K top_k, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of a FFN: split into experts, or with half of the blocks of its width kept.

    Args:
        num_experts, top_k: of a sparse FFN, without a shared expert.
        block_size: neurons of a block of a pruned FFN; 0 of a sparse one.
    """

    name: str
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int = 1
    top_k: int = 1
    block_size: int = 0

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def expert_width(self) -> int:
        return self.intermediate_size // self.num_experts

    @property
    def num_blocks(self) -> int:
        return self.intermediate_size // self.block_size

    @property
    def active_width(self) -> int:
        """Neurons that a token uses."""
        if self.block_size:
            return self.num_blocks // 2 * self.block_size
        return self.top_k * self.expert_width

    @property
    def ceiling(self) -> float:
        """Dense over active arithmetic."""
        if self.block_size:
            return 2.0
        return self.num_experts / self.top_k


# A quarter of BAGEL's hidden size and width (the same experts, in seconds on two cores), and BAGEL.
_SIZES = {
    "quarter": {"hidden_size": 896, "intermediate_size": 4736},
    "bagel": {"hidden_size": 3584, "intermediate_size": 18944},
}
_TOKENS = {"quarter": (512, 1024, 4096), "bagel": (256, 1024, 4096)}
_BLOCK_SIZES = (16, 32, 64, 128)


def _family(prefix: str) -> list[Case]:
    shapes = [
        (f"{experts}to{top_k}", {"num_experts": experts, "top_k": top_k})
        for experts, top_k in ((16, 8), (32, 16))
    ]
    shapes += [(f"half-bs{size}", {"block_size": size}) for size in _BLOCK_SIZES]
    return [
        Case(name=f"{prefix}-{kind}-T{tokens}", tokens=tokens, **_SIZES[prefix], **shape)
        for kind, shape in shapes
        for tokens in _TOKENS[prefix]
    ]


def _odd(tokens: int, hidden_size: int, width: int, experts: int, top_k: int) -> Case:
    return Case(
        name=f"odd-{experts}to{top_k}-T{tokens}",
        tokens=tokens,
        hidden_size=hidden_size,
        intermediate_size=experts * width,
        num_experts=experts,
        top_k=top_k,
    )


CASES = {
    case.name: case
    for case in (
        *_family("quarter"),
        *_family("bagel"),
        # Sizes that fit no tile: to see that they run, not how fast.
        _odd(37, 256, 592, 16, 16),  # every expert
        _odd(1, 136, 24, 5, 2),  # experts without a token
        _odd(777, 1000, 208, 12, 5),  # no power of two
        _odd(300, 72, 40, 7, 3),
        _odd(129, 512, 1184, 1, 1),
    )
}

CPU_DEFAULTS = (
    "quarter-16to8-T1024",
    "quarter-32to16-T1024",
    *(f"quarter-half-bs{size}-T1024" for size in _BLOCK_SIZES),
)
CUDA_DEFAULTS = (
    *(name for name in CASES if name.startswith("bagel-") and "half" not in name),
    *(f"bagel-half-bs{size}-T4096" for size in _BLOCK_SIZES),
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
    width, active = case.intermediate_size, case.active_width
    size = dtype.itemsize
    weights = 3 * d * width * size
    tokens = 2 * t * d * size  # x and y
    products, active_products = 6 * t * d * width, 6 * t * d * active
    formulas = {
        "route_topk": Work(2 * t * d * e, (t * d + e * d) * size + t * (e + 2 * case.top_k) * 4),
        "sort_by_expert": Work(0, (3 * r + e + 1) * 4),
        "permute": Work(0, (t + r) * d * size + r * 4),
        "combine": Work(2 * r * d, (t + r) * d * size + 2 * r * 4),
        "grouped_ffn": Work(active_products, (t + r) * d * size + weights),
        "grouped_ffn_combine": Work(active_products + 2 * r * d, tokens + weights),
        "sparse_ffn": Work(active_products + 2 * r * d + 2 * t * d * e, tokens + weights),
        "ffn_importance": Work(4 * t * d * width, t * d * size + weights * 2 / 3 + 3 * width * 4),
        "dense_ffn": Work(products, tokens + weights),
        # A dense FFN of the active width, which touches no other weights: pruned_ffn, too.
        "half_ffn": Work(active_products, tokens + 3 * d * active * size),
    }
    backward = {
        "permute": Work(r * d, (t + r) * d * size + r * 4),
        # Gradients of the rows, written, and of their weights, for which the rows are read.
        "combine": Work(3 * r * d, (t + 2 * r) * d * size + 3 * r * 4),
    }
    forward = formulas[op]
    if direction != "fwd" and op in backward:
        return Work(forward.flops + backward[op].flops, forward.bytes + backward[op].bytes)
    passes = _GEMM_PASSES[direction]
    return Work(passes * forward.flops, passes * forward.bytes)
