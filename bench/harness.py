# SPDX-License-Identifier: Apache-2.0
"""Timing: interleaved, warmed up, medians; on rotating inputs of random data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Work

# Copies of the input that calls take turns with, so that none finds it in its nearest cache.
NUM_INPUTS = 4
# Rounds before those that count.
WARMUP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What this machine reaches at most: matrix product and copy of large arrays."""

    tflops: float
    gbps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured line of the table."""

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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    *,
    repeats: int,
    warmup: int = WARMUP,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Runs every call once per round, so that all meet the same state of the machine.

    Args:
        calls: name -> function of the round number.
        repeats: rounds that count; `warmup` more come before.

    Returns:
        Seconds of each round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            elapsed = time.perf_counter() - start
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
    )


def inputs(shape: tuple[int, ...], dtype: torch.dtype, count: int = NUM_INPUTS) -> list[Tensor]:
    """Normal random tensors; zeros would let the clock and the caches flatter everyone."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def measure_roof(dtype: torch.dtype, repeats: int = 5) -> Roof:
    """Best of several: a 2048^3 matrix product, and a copy of 256 MB counted as read and write."""
    a, b = inputs((2048, 2048), dtype, 2)
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    seconds = measure_interleaved(
        {"gemm": lambda _: a @ b, "copy": lambda _: target.copy_(source)}, repeats=repeats
    )
    return Roof(
        tflops=2 * 2048**3 / min(seconds["gemm"]) / 1e12,
        gbps=2 * source.nbytes / min(seconds["copy"]) / 1e9,
    )
