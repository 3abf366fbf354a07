# SPDX-License-Identifier: Apache-2.0
"""Configurations of the expert GEMMs side by side, in interleaved rounds of one process.

The choice of kernels and tiles is overridden by an environment variable that the kernels read at
each call. What a variant computes is compared with the chosen one before it is timed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unified import ops
from sparse_unified.nn import SwiGLU

from .block import Measured, Missing, Progress
from .cases import Case, PrunedCase, Work, pruned_work, work
from .check import judge_rows
from .harness import Roof, inputs, measure_group
from .peers.protocol import first_line
from .providers import sparse_block
from .pruned_suite import PrunedFfn
from .suites import OpCalls
from .target import Target
from .timing import Call

VARIABLE = "SPARSE_UNIFIED_GROUPED_FFN"
CHOSEN = "chosen"
_DIRECTIONS = {"fwd": ("up", "down"), "fwd_bwd": ("grad_hidden", "grad_rows", "grad_weights")}
# What else than tiles the kernels for Hopper can be told, forward.
_HOPPER_SWITCHES = ("overlap=off", "fence=producer", "multicast=on")

Run = Callable[[int], tuple[Tensor, ...]]


def set_variant(variant: str) -> None:
    """Makes the calls that follow use a variant; `CHOSEN` is the kernels' own choice."""
    if variant == CHOSEN:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = variant


def variants_of_error(text: str, direction: str) -> tuple[str, ...]:
    """The variants of a direction by what the refusal of a wrong override lists.

    "... TILE one of A, B; of sm90a up one of C, D, down one of E, F; got ...": each family as it
    is, every tile for every phase of the portable kernels, and of Hopper's, which have a choice
    forward only, every tile and switch, one at a time.
    """
    match = re.search(
        r"TILE one of (?P<tiles>.+?); "
        r"of sm90a up one of (?P<up>.+?), down one of (?P<down>.+?); got",
        text,
    )
    if not match:
        return ()
    portable = [
        f"{phase}={tile}" for phase in _DIRECTIONS[direction] for tile in match["tiles"].split(", ")
    ]
    hopper: list[str] = []
    if direction == "fwd":
        hopper += [
            f"{phase}={tile}" for phase in ("up", "down") for tile in match[phase].split(", ")
        ]
        hopper += _HOPPER_SWITCHES
    return (
        *("family=sm80", *(f"family=sm80,{entry}" for entry in portable)),
        *("family=sm90a", *(f"family=sm90a,{entry}" for entry in hopper)),
    )


def find_variants(call: Callable[[], object], direction: str) -> tuple[str, ...]:
    """The variants of a direction, asked of the kernels; none where they are not overridden."""
    set_variant("all=?")
    try:
        call()
    except RuntimeError as error:
        return variants_of_error(str(error), direction)
    finally:
        set_variant(CHOSEN)
    return ()


@dataclass(frozen=True, slots=True)
class _Subject:
    """An op on a case: what one turn of it returns, and what that moves and computes."""

    op: str
    run: Run
    work: Work


def _grouped_ffn(case: Case, dtype: torch.dtype, direction: str, target: Target) -> _Subject:
    xs = inputs((case.tokens, case.hidden_size), dtype, device=target.device)
    block = sparse_block(case, dtype, device=target.device)
    with torch.no_grad():
        calls = OpCalls(block, xs[0])
    experts = calls.leaves["grouped_ffn"]
    op = calls.ours["grouped_ffn"]
    grad = torch.randn_like(ops.permute(xs[0], *calls.maps))

    def apply(x: Tensor) -> Tensor:
        y = op(x)
        assert isinstance(y, Tensor)
        return y

    def forward(turn: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (apply(xs[turn % len(xs)]),)

    def both(turn: int) -> tuple[Tensor, ...]:
        x = xs[turn % len(xs)].detach().requires_grad_()
        return torch.autograd.grad(apply(x), (x, *experts), grad)

    run = forward if direction == "fwd" else both
    return _Subject("grouped_ffn", run, work("grouped_ffn", case, dtype, direction))


def _pruned_ffn(case: PrunedCase, dtype: torch.dtype, direction: str, target: Target) -> _Subject:
    xs = inputs((case.tokens, case.hidden_size), dtype, device=target.device)
    dense = SwiGLU(case.hidden_size, case.intermediate_size, dtype=dtype, device=target.device)
    module = PrunedFfn(dense, case)
    weights = tuple(module.parameters())
    grad = torch.randn_like(xs[0])

    def forward(turn: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (module(xs[turn % len(xs)]),)

    def both(turn: int) -> tuple[Tensor, ...]:
        x = xs[turn % len(xs)].detach().requires_grad_()
        return torch.autograd.grad(module(x), (x, *weights), grad)

    run = forward if direction == "fwd" else both
    cost = pruned_work(case, dtype, direction, share=case.kept_share)
    return _Subject("pruned_ffn", run, cost)


def _compare(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for position, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        judge_rows(f"result {position}", output, other, dtype=output.dtype)


def measure_variants(
    case: Case | PrunedCase,
    dtype: torch.dtype,
    direction: str,
    target: Target,
    roof: Roof,
    *,
    repeats: int,
    variants: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measures grouped_ffn, or pruned_ffn, in each variant, and in the one chosen without.

    Args:
        case: of grouped_ffn, or a `PrunedCase` of pruned_ffn.
        variants: values of the environment variable; by default all that the kernels know.

    Returns:
        A record of each variant that runs and computes what the chosen one does, named after it,
        with its ratio over the chosen one; the others with the reason.
    """
    if isinstance(case, PrunedCase):
        subject = _pruned_ffn(case, dtype, direction, target)
    else:
        subject = _grouped_ffn(case, dtype, direction, target)
    measured = Measured()
    runs: dict[str, Call] = {}
    expected: tuple[Tensor, ...] | None = None
    if variants is None:
        variants = find_variants(lambda: subject.run(0), direction)
    for variant in (CHOSEN, *variants):

        def one(turn: int, variant: str = variant) -> None:
            set_variant(variant)
            subject.run(turn)

        try:
            set_variant(variant)
            outputs = subject.run(0)
            expected = outputs if variant == CHOSEN else expected
            if expected is not None:
                _compare(outputs, expected)
        except Exception as error:
            measured.missing.append(
                Missing(
                    op=subject.op,
                    case=case.name,
                    direction=direction,
                    dtype=str(dtype).removeprefix("torch."),
                    provider=variant,
                    reason=first_line(error),
                )
            )
        else:
            runs[variant] = one
    try:
        measured.records += measure_group(
            runs,
            dict.fromkeys(runs, subject.work),
            op=subject.op,
            case=case.name,
            direction=direction,
            dtype=dtype,
            roof=roof,
            repeats=repeats,
            timer=target.timer,
            baselines=(CHOSEN,) if CHOSEN in runs else (),
            on_round=progress,
        )
    finally:
        set_variant(CHOSEN)
    return measured
