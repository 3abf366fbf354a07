# SPDX-License-Identifier: Apache-2.0
"""The whole block: every provider that can be had, checked, then timed in interleaved rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .cases import Case, work
from .check import WrongResultError, check_backward, check_forward
from .harness import NUM_INPUTS, Record, Roof, inputs, measure_group
from .peers import PEERS, Peer, Provider, Setting, Weights, draw_weights
from .peers.protocol import first_line
from .target import Target
from .timing import Call, capture

Progress = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A provider that was not measured, and why."""

    op: str
    case: str
    direction: str
    dtype: str
    provider: str
    reason: str


@dataclass(slots=True)
class Measured:
    """Records, and the providers without one."""

    records: list[Record] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


def _forward(provider: Provider, xs: Sequence[Tensor], turn: int) -> None:
    with torch.inference_mode():
        provider(xs[turn % len(xs)])


def _forward_backward(
    provider: Provider, xs: Sequence[Tensor], grads: Sequence[Tensor], turn: int
) -> None:
    x = xs[turn % len(xs)].detach().requires_grad_()
    provider(x).backward(grads[turn % len(grads)])
    provider.zero_grad(set_to_none=True)


def _prepare(
    peer: Peer,
    setting: Setting,
    direction: str,
    weights: Weights,
    xs: list[Tensor],
    grads: list[Tensor],
) -> tuple[Provider | None, str]:
    """Builds and checks a provider: (it, "") or (None, why it will not be measured)."""
    if direction != "fwd" and not peer.trains:
        return None, "has no backward"
    try:
        reason = peer.unavailable(setting)
        if reason is not None:
            return None, reason
        provider = peer.build(setting, weights)
        provider.set_frozen(direction == "fwd_bwd_frozen")
        check_forward(provider, xs[0], setting.case, weights)
        if direction != "fwd":
            frozen = direction == "fwd_bwd_frozen"
            check_backward(provider, xs[0], grads[0], setting.case, weights, frozen=frozen)
    except WrongResultError as error:
        return None, f"wrong result: {error}"
    except Exception as error:  # whatever a peer does, the others are measured
        return None, first_line(error)
    return provider, ""


def _captured(peer: Peer, call: Call, target: Target) -> tuple[Call, str]:
    """The call as a CUDA graph where it can be one; and why not."""
    if not target.is_cuda or peer.waits:
        return call, "waits for the device" if peer.waits else "no CUDA device"
    try:
        return capture(call, NUM_INPUTS), ""
    except Exception as error:
        return call, first_line(error)


def measure_block(
    case: Case,
    dtype: torch.dtype,
    direction: str,
    target: Target,
    roof: Roof,
    *,
    repeats: int,
    providers: Sequence[str] | None = None,
    graph: bool = False,
    progress: Progress | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> Measured:
    """Measures the block in one direction.

    Args:
        case, dtype, direction: what; a direction of `DIRECTIONS`.
        target, roof: where, and what it reaches at most.
        repeats: rounds that count.
        providers: names in `peers`; all by default.
        graph: replay CUDA graphs of providers that can be captured.

    Returns:
        A record of each provider that could be built and was right, and the others with a reason.
    """
    setting = Setting(case=case, dtype=dtype, device=target.device)
    weights = draw_weights(case, dtype, target.device)
    shape = (case.tokens, case.hidden_size)
    xs, grads = (inputs(shape, dtype, device=target.device) for _ in range(2))
    measured = Measured()
    built: dict[str, Provider] = {}
    calls: dict[str, Call] = {}
    graphs: set[str] = set()
    for name in providers or peers:
        provider, reason = _prepare(peers[name], setting, direction, weights, xs, grads)
        if provider is None:
            measured.missing.append(
                Missing(
                    op="sparse_ffn",
                    case=case.name,
                    direction=direction,
                    dtype=str(dtype).removeprefix("torch."),
                    provider=name,
                    reason=reason,
                )
            )
            continue
        built[name] = provider
        calls[name] = (
            partial(_forward, provider, xs)
            if direction == "fwd"
            else partial(_forward_backward, provider, xs, grads)
        )
        if graph:
            calls[name], why_not = _captured(peers[name], calls[name], target)
            if not why_not:
                graphs.add(name)
    measured.records += measure_group(
        calls,
        {name: work(peers[name].formula, case, dtype, direction) for name in calls},
        op="sparse_ffn",
        case=case.name,
        direction=direction,
        dtype=dtype,
        roof=roof,
        repeats=repeats,
        timer=target.timer,
        graphs=frozenset(graphs),
        on_round=progress,
    )
    built.clear()
    calls.clear()
    gc.collect()
    if target.is_cuda:
        torch.cuda.empty_cache()
    return measured
