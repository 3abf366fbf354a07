# SPDX-License-Identifier: Apache-2.0
"""Timing: interleaved, warmed up, medians; on rotating inputs of random data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Work
from .timing import Call, Timer, WallTimer

# Copies of the input that calls take turns with, so that none finds it in its nearest cache.
NUM_INPUTS = 4
# Rounds before those that count.
WARMUP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What this machine reaches at most.

    Args:
        tflops: the best of all rounds of all matrix products.
        gbps: of a copy, bytes read and bytes written.
        gemms: TFLOP/s of each product by name, the median of its rounds.
    """

    tflops: float
    gbps: float
    gemms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured line of the table; `graph`: replayed from a CUDA graph."""

    op: str
    case: str
    direction: str
    dtype: str
    provider: str
    median_us: float
    min_us: float
    tflops: float
    gbps: float
    roof_fraction: float
    speedup: dict[str, float] = field(default_factory=dict)
    graph: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_interleaved(
    calls: Mapping[str, Call],
    *,
    repeats: int,
    warmup: int = WARMUP,
    timer: Timer | None = None,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Runs every call once per round, so that all meet the same state of the machine.

    Args:
        calls: name -> function of the round number.
        repeats: rounds that count; `warmup` more come before.
        timer: the wall clock by default.

    Returns:
        Seconds of each round by name.
    """
    timer = timer or WallTimer()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, repeats):
        for name, elapsed in timer.round(calls, turn).items():
            if turn >= 0:
                seconds[name].append(elapsed)
        if on_round is not None:
            on_round()
    return seconds


def record(
    seconds: Mapping[str, list[float]],
    name: str,
    *,
    op: str,
    case: str,
    direction: str,
    dtype: torch.dtype,
    work: Work,
    roof: Roof,
    baselines: tuple[str, ...] = (),
    graph: bool = False,
) -> Record:
    """Sums up the rounds of one provider; ratios are medians of the ratios within a round."""
    median = statistics.median(seconds[name])
    ideal = max(work.flops / (roof.tflops * 1e12), work.bytes / (roof.gbps * 1e9))
    return Record(
        op=op,
        case=case,
        direction=direction,
        dtype=str(dtype).removeprefix("torch."),
        provider=name,
        median_us=median * 1e6,
        min_us=min(seconds[name]) * 1e6,
        tflops=work.flops / median / 1e12,
        gbps=work.bytes / median / 1e9,
        roof_fraction=ideal / median,
        speedup={
            baseline: statistics.median(
                other / own for other, own in zip(seconds[baseline], seconds[name], strict=True)
            )
            for baseline in baselines
            if baseline != name
        },
        graph=graph,
    )


def measure_group(
    calls: Mapping[str, Call],
    works: Mapping[str, Work],
    *,
    op: str,
    case: str,
    direction: str,
    dtype: torch.dtype,
    roof: Roof,
    repeats: int,
    timer: Timer | None = None,
    baselines: tuple[str, ...] | None = None,
    graphs: frozenset[str] = frozenset(),
    on_round: Callable[[], object] | None = None,
) -> list[Record]:
    """Measures providers of one op in interleaved rounds; a record each.

    Args:
        calls, works: by provider.
        baselines: providers to give ratios over; all by default.
        graphs: providers whose call replays a CUDA graph.
    """
    seconds = measure_interleaved(calls, repeats=repeats, timer=timer, on_round=on_round)
    return [
        record(
            seconds,
            name,
            op=op,
            case=case,
            direction=direction,
            dtype=dtype,
            work=works[name],
            roof=roof,
            baselines=tuple(calls) if baselines is None else baselines,
            graph=name in graphs,
        )
        for name in calls
    ]


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    count: int = NUM_INPUTS,
    *,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Normal random tensors; zeros would let the clock and the caches flatter everyone."""
    generator = torch.Generator(device).manual_seed(1)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]
