# SPDX-License-Identifier: Apache-2.0
"""Each op alone, on the tensors that a block would give it, beside its plain torch reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .block import Measured, Missing, Progress
from .cases import Case, work
from .harness import NUM_INPUTS, Roof, inputs, measure_group
from .peers.protocol import first_line
from .providers import sparse_block
from .suites import OpCall, OpCalls
from .target import Target
from .timing import Call, capture

# Ops with a gradient of their own; and those of them for which frozen experts make a difference.
_TRAINED_OPS = {
    "fwd": None,
    "fwd_bwd": ("route_topk", "permute", "combine", "grouped_ffn"),
    "fwd_bwd_frozen": ("grouped_ffn",),
}


def _first(outputs: Any) -> Tensor:
    out: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return out


def _forward(call: OpCall, xs: Sequence[Tensor], turn: int) -> None:
    with torch.inference_mode():
        call(xs[turn % len(xs)])


def _forward_backward(
    call: OpCall,
    xs: Sequence[Tensor],
    grad: Tensor,
    leaves: Sequence[Tensor],
    turn: int,
) -> None:
    x = xs[turn % len(xs)].detach().requires_grad_()
    torch.autograd.grad(_first(call(x)), (x, *leaves), grad, allow_unused=True)


def _call(calls: OpCalls, op: str, call: OpCall, direction: str, xs: Sequence[Tensor]) -> Call:
    """A function of the round; running it once here shows whether it can run at all."""
    if direction == "fwd":
        run: Call = partial(_forward, call, xs)
    else:
        leaves = calls.leaves.get(op, ())
        for leaf in leaves:
            leaf.requires_grad_(direction == "fwd_bwd")
        leaves = leaves if direction == "fwd_bwd" else ()
        grad = torch.randn_like(_first(call(xs[0])))
        run = partial(_forward_backward, call, xs, grad, leaves)
    run(0)
    return run


def measure_ops(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    target: Target,
    roof: Roof,
    *,
    repeats: int,
    ops: Sequence[str] | None = None,
    graph: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Measures each op in one direction, as far as it has one.

    Args:
        ops: names; all by default.
        graph: replay CUDA graphs of our ops.

    Returns:
        A record of each op, and of its torch reference where that has the same result.
    """
    measured = Measured()
    xs = inputs((case.tokens, case.hidden_size), dtype, device=target.device)
    with torch.no_grad():
        calls = OpCalls(sparse_block(case, dtype, device=target.device), xs[0])
    trained = _TRAINED_OPS[direction]
    for op in calls.ours:
        if (ops is not None and op not in ops) or (trained is not None and op not in trained):
            continue
        providers: Mapping[str, OpCall | None] = {
            "sparse_unified": calls.ours[op],
            "torch": calls.torch.get(op),
        }
        runs: dict[str, Call] = {}
        graphs: set[str] = set()
        for name, call in providers.items():
            if call is None:
                continue
            try:
                runs[name] = _call(calls, op, call, direction, xs)
                if graph and target.is_cuda and name == "sparse_unified":
                    runs[name] = capture(runs[name], NUM_INPUTS)
                    graphs.add(name)
            except Exception as error:  # one op that cannot run hides no other
                measured.missing.append(
                    Missing(
                        op=op,
                        case=case.name,
                        direction=direction,
                        dtype=str(dtype).removeprefix("torch."),
                        provider=name,
                        reason=first_line(error),
                    )
                )
        measured.records += measure_group(
            runs,
            dict.fromkeys(runs, work(op, case, dtype, direction)),
            op=op,
            case=case.name,
            direction=direction,
            dtype=dtype,
            roof=roof,
            repeats=repeats,
            timer=target.timer,
            baselines=("torch",) if "torch" in runs else (),
            graphs=frozenset(graphs),
            on_round=progress,
        )
    return measured
