# SPDX-License-Identifier: Apache-2.0
"""Configurations of the grouped expert FFN side by side, in interleaved rounds of one process.

The choice of tiles is overridden by an environment variable that the kernels read at each call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import torch

from sparse_unified import ops

from .block import Measured, Missing, Progress
from .cases import Case, work
from .harness import Roof, inputs, measure_group
from .peers.protocol import first_line
from .providers import sparse_block
from .suites import OpCalls
from .target import Target
from .timing import Call

VARIABLE = "SPARSE_UNIFIED_GROUPED_FFN"
CHOSEN = "chosen"
_DIRECTIONS = {"fwd": ("up", "down"), "fwd_bwd": ("grad_hidden", "grad_rows", "grad_weights")}


def set_variant(variant: str) -> None:
    """Makes the calls that follow use a variant; `CHOSEN` is the kernels' own choice."""
    if variant == CHOSEN:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = variant


def tiles_of_error(text: str) -> tuple[str, ...]:
    """The tiles that a refusal of a wrong override lists: "... TILE one of A, B, got ..."."""
    match = re.search(r"TILE one of (.+?), got", text)
    return tuple(match[1].split(", ")) if match else ()


def find_variants(call: Callable[[], object], direction: str) -> tuple[str, ...]:
    """Every tile for every phase of a direction, one phase at a time; asked of the kernels."""
    set_variant("all=?")
    try:
        call()
    except RuntimeError as error:
        tiles = tiles_of_error(str(error))
    else:
        tiles = ()
    finally:
        set_variant(CHOSEN)
    return tuple(f"{phase}={tile}" for phase in _DIRECTIONS[direction] for tile in tiles)


def measure_variants(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    target: Target,
    roof: Roof,
    *,
    repeats: int,
    variants: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measures grouped_ffn in each variant, and in the one that is chosen without.

    Args:
        variants: values of the environment variable; by default all that the kernels know.

    Returns:
        A record of each variant that runs, named after it, with its ratio over the chosen one.
    """
    xs = inputs((case.tokens, case.hidden_size), dtype, device=target.device)
    block = sparse_block(case, dtype, device=target.device)
    with torch.no_grad():
        calls = OpCalls(block, xs[0])
    experts = calls.leaves["grouped_ffn"]
    op = calls.ours["grouped_ffn"]
    grad = torch.randn_like(ops.permute(xs[0], *calls.maps))

    def forward(turn: int) -> None:
        with torch.inference_mode():
            op(xs[turn % len(xs)])

    def both(turn: int) -> None:
        x = xs[turn % len(xs)].detach().requires_grad_()
        y = op(x)
        assert isinstance(y, torch.Tensor)
        torch.autograd.grad(y, (x, *experts), grad)

    run = forward if direction == "fwd" else both
    measured = Measured()
    runs: dict[str, Call] = {}
    for variant in (CHOSEN, *(variants or find_variants(lambda: forward(0), direction))):

        def one(turn: int, variant: str = variant) -> None:
            set_variant(variant)
            run(turn)

        try:
            one(0)
        except Exception as error:
            measured.missing.append(
                Missing(
                    op="grouped_ffn",
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
            dict.fromkeys(runs, work("grouped_ffn", case, dtype, direction)),
            op="grouped_ffn",
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
