# SPDX-License-Identifier: Apache-2.0
"""Configurations of the expert GEMMs side by side: `sparse-unified bench --variants`.

The choice of kernels and tiles is overridden by an environment variable that the kernels read at
each call. What a configuration computes is compared with the chosen one before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_unified import ops
from sparse_unified._library import module as library
from sparse_unified.nn import SwiGLU

from .cases import Case, work
from .check import judge_rows
from .measure import Call, Candidate, Measured, Session, Subject, inputs, name_of
from .suites import OpCalls, PrunedFfn, sparse_block

VARIABLE = "SPARSE_UNIFIED_GROUPED_FFN"
CHOSEN = "chosen"
Run = Callable[[int], tuple[Tensor, ...]]


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


def _grouped_ffn(case: Case, dtype: torch.dtype, direction: str, device: torch.device) -> Run:
    xs = inputs((case.tokens, case.hidden_size), dtype, device=device)
    with torch.no_grad():
        calls = OpCalls(sparse_block(case, dtype, device=device), xs[0])
        grad = torch.randn_like(ops.permute(xs[0], *calls.maps))
    return _run(calls.ours["grouped_ffn"], calls.leaves["grouped_ffn"], xs, grad, direction)


def _pruned_ffn(case: Case, dtype: torch.dtype, direction: str, device: torch.device) -> Run:
    xs = inputs((case.tokens, case.hidden_size), dtype, device=device)
    dense = SwiGLU(case.hidden_size, case.intermediate_size, dtype=dtype, device=device)
    module = PrunedFfn(dense, case.block_size, case.num_blocks // 2)
    return _run(module, tuple(module.parameters()), xs, torch.randn_like(xs[0]), direction)


def _run(
    op: Callable[[Tensor], Any],
    leaves: Sequence[Tensor],
    xs: Sequence[Tensor],
    grad: Tensor,
    direction: str,
) -> Run:
    """What one turn returns: the output, or the gradients of tokens and weights."""

    def forward(turn: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (op(xs[turn % len(xs)]),)

    def both(turn: int) -> tuple[Tensor, ...]:
        x = xs[turn % len(xs)].detach().requires_grad_()
        return torch.autograd.grad(op(x), (x, *leaves), grad)

    return forward if direction == "fwd" else both


def measure_variants(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    session: Session,
    variants: Sequence[str] | None = None,
) -> Measured:
    """Measures grouped_ffn, or pruned_ffn, in each variant, and in the one chosen without.

    Args:
        case: of grouped_ffn, or of pruned_ffn where it has blocks.
        variants: values of the environment variable; by default all that the kernels know.

    Returns:
        A record of each variant that runs and computes what the chosen one does, named after it,
        with its ratio over the chosen one; the others with the reason.
    """
    if case.block_size:
        op, run = "pruned_ffn", _pruned_ffn(case, dtype, direction, session.device)
    else:
        op, run = "grouped_ffn", _grouped_ffn(case, dtype, direction, session.device)
    cost = work("half_ffn" if case.block_size else op, case, dtype, direction)
    expected = run(0)

    def build(variant: str) -> Call:
        set_variant(variant)
        for position, (found, wanted) in enumerate(zip(run(0), expected, strict=True)):
            judge_rows(f"result {position}", found, wanted, dtype=found.dtype)

        def call(turn: int) -> None:
            set_variant(variant)
            run(turn)

        return call

    if variants is None:
        variants = find_variants(direction) if session.device.type == "cuda" else ()
    try:
        return session.measure(
            Subject(op=op, case=case.name, direction=direction, dtype=name_of(dtype)),
            {
                variant: Candidate(build=partial(build, variant), work=cost, can_capture=False)
                for variant in (CHOSEN, *variants)
            },
            (CHOSEN,),
        )
    finally:
        set_variant(CHOSEN)
