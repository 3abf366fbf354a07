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
        """Dense over active arithmetic: the most that a ratio over dense is at the same rate."""
        return 2.0 if self.block_size else self.num_experts / self.top_k


# A quarter of BAGEL's hidden size and width (the same experts, in seconds on two cores), and BAGEL.
_SIZES = {"quarter": (896, 4736), "bagel": (3584, 18944)}
# All for 16 experts, those from 256 on for the other shapes.
TOKENS = (1, 4, 16, 64, 256, 512, 1024, 4096)
_SHAPES = {
    "16to8": {"num_experts": 16, "top_k": 8},
    "32to16": {"num_experts": 32, "top_k": 16},
    **{f"half-bs{size}": {"block_size": size} for size in (16, 32, 64, 128)},
}
# Tokens, hidden size, expert width, experts, top_k that fit no tile: to see that they run, not how
# fast. Every expert; experts without a token; no power of two.
_ODD = ((37, 256, 592, 16, 16), (1, 136, 24, 5, 2), (777, 1000, 208, 12, 5), (300, 72, 40, 7, 3))

CASES = {
    f"{size}-{kind}-T{tokens}": Case(
        name=f"{size}-{kind}-T{tokens}",
        tokens=tokens,
        hidden_size=hidden_size,
        intermediate_size=width,
        **shape,
    )
    for size, (hidden_size, width) in _SIZES.items()
    for kind, shape in _SHAPES.items()
    for tokens in (TOKENS if kind == "16to8" else TOKENS[4:])
} | {
    f"odd-{experts}to{top_k}-T{tokens}": Case(
        name=f"odd-{experts}to{top_k}-T{tokens}",
        tokens=tokens,
        hidden_size=hidden_size,
        intermediate_size=experts * width,
        num_experts=experts,
        top_k=top_k,
    )
    for tokens, hidden_size, width, experts, top_k in _ODD
}

CPU_DEFAULTS = (
    "quarter-16to8-T1024",
    "quarter-32to16-T1024",
    *(f"quarter-{kind}-T1024" for kind in _SHAPES if "half" in kind),
    *(f"quarter-16to8-T{tokens}" for tokens in TOKENS if tokens not in (512, 1024)),
)
CUDA_DEFAULTS = tuple(
    f"bagel-{kind}-T{tokens}"
    for kind in _SHAPES
    for tokens in ((4096,) if "half" in kind else (256, 1024, 4096))
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
    of `permute`, which runs none, moves rows the other way.
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
    backward = {"permute": Work(r * d, (t + r) * d * size + r * 4)}
    forward = formulas[op]
    if direction != "fwd" and op in backward:
        return Work(forward.flops + backward[op].flops, forward.bytes + backward[op].bytes)
    passes = _GEMM_PASSES[direction]
    return Work(passes * forward.flops, passes * forward.bytes)
