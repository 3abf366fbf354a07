# SPDX-License-Identifier: Apache-2.0
"""The one loop that measures: providers of one result in interleaved rounds, on rotating inputs.

Providers take turns within each round, so all of them meet the same state of the machine; a ratio
is the median of the ratios within a round. Two rounds of warm-up do not count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Work

# What is measured: a function of the number of the round.
Call = Callable[[int], object]

# Copies of the input that calls rotate over, so that none finds it in its nearest cache.
NUM_INPUTS = 4
# Rounds before those that count, and how many of these there are at least when time is short.
WARMUP, LEAST_ROUNDS = 2, 5
# A record whose rounds spread more (interquartile range over median) is marked, and not quoted.
MOST_SPREAD = 0.15
# Of the time the host needs to launch a call, so much is hidden behind a waiting kernel at most.
_MOST_HIDDEN_SECONDS = 2e-3
_CYCLES_PER_SECOND = 2e9
# Calls on a side stream before a graph is captured, as torch's documentation asks for.
_CAPTURE_WARMUP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """The most that this machine can reach.

    Args:
        tflops: no arithmetic in the dtype of the run is faster.
        gbps: of a triad, two arrays read and one written past the caches.
        source: what `tflops` is, for the reader of a table.
        peaks: instruction set -> number of threads -> TFLOP/s of multiply-adds on registers.
        gemms: TFLOP/s of each matrix product by name, the median of its rounds.
    """

    tflops: float
    gbps: float
    source: str = ""
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    gemms: dict[str, float] = field(default_factory=dict)


class NotMeasured(Exception):
    """Why a provider is not measured, in words for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A provider before it is built; whatever `build` raises is why it is not measured."""

    build: Callable[[], Call]
    work: Work
    can_capture: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A group of providers of one result."""

    subject: dict[str, str]  # op, case, direction and dtype, the first fields of each record
    candidates: Mapping[str, Candidate]  # by provider
    baselines: tuple[str, ...] | None = None  # those that ratios are given over, or all


# Times every call of a round once: calls and the number of the round -> seconds by name.
Timer = Callable[[Mapping[str, Call], int], dict[str, float]]


def wall_clock(calls: Mapping[str, Call], turn: int) -> dict[str, float]:
    """Times calls that are done when they return."""
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call(turn)
        seconds[name] = time.perf_counter() - start
    return seconds


class EventTimer:
    """CUDA events around each call, with the L2 cache flushed before it.

    Before each call a buffer of twice the L2 cache is read (not written: lines to be written back
    would be charged to the call), then a kernel waits for about the time the host needs to launch
    the call, so that the device never waits for the host within the events, unless the call itself
    synchronises. The host waits once a round.
    """

    def __init__(
        self, device: torch.device, *, flush_bytes: int | None = None, cuda: Any = torch.cuda
    ) -> None:
        self._cuda = cuda
        if flush_bytes is None:
            flush_bytes = 2 * int(cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.ones(max(flush_bytes // 4, 1), dtype=torch.float32, device=device)
        self._launch_seconds: dict[str, float] = {}

    def __call__(self, calls: Mapping[str, Call], turn: int) -> dict[str, float]:
        events = {}
        for name, call in calls.items():
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self._buffer.sum()
            hidden = min(self._launch_seconds.get(name, 0.0), _MOST_HIDDEN_SECONDS)
            if hidden:
                self._cuda._sleep(int(hidden * _CYCLES_PER_SECOND))
            start.record()
            began = time.perf_counter()
            call(turn)
            took = time.perf_counter() - began
            end.record()
            self._launch_seconds[name] = min(took, self._launch_seconds.get(name, took))
            events[name] = start, end
        self._cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def capture(call: Call, num_inputs: int = NUM_INPUTS, *, cuda: Any = torch.cuda) -> Call:
    """Captures a call into CUDA graphs, one for each of the inputs that it rotates over.

    Raises:
        RuntimeError: the call cannot be captured: it synchronises, say.
    """
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for turn in range(_CAPTURE_WARMUP):
            call(turn)
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()
    graphs: list[Any] = []
    for turn in range(num_inputs):
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            call(turn)
        graphs.append(graph)
    return lambda turn: graphs[turn % num_inputs].replay()


def measure_interleaved(
    calls: Mapping[str, Call],
    *,
    repeats: int,
    warmup: int = WARMUP,
    timer: Timer = wall_clock,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Runs every call once per round; returns the seconds of each round by name.

    Args:
        repeats: rounds that count; `warmup` more come before.
        seconds: after which there are no more rounds than `LEAST_ROUNDS`.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for turn in range(-warmup, repeats):
        if turn >= LEAST_ROUNDS and time.monotonic() - began > seconds:
            break
        for name, elapsed in timer(calls, turn).items():
            if turn >= 0:
                found[name].append(elapsed)
    return found


def summarize(
    seconds: Mapping[str, list[float]],
    provider: str,
    work: Work,
    roof: Roof,
    baselines: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Sums up the rounds of one provider: the numbers of a record.

    `spread` is the interquartile range of the rounds, relative to their median; `roof_fraction`
    the share of the peak arithmetic; `speedup` how many times faster than another provider.
    """
    own = seconds[provider]
    median = statistics.median(own)
    quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else [median, median, median]
    return {
        "median_us": median * 1e6,
        "min_us": min(own) * 1e6,
        "spread": (quartiles[2] - quartiles[0]) / median,
        "tflops": work.flops / median / 1e12,
        "gbps": work.bytes / median / 1e9,
        "roof_fraction": work.flops / median / 1e12 / roof.tflops,
        "speedup": {
            name: statistics.median(b / a for b, a in zip(rounds, own, strict=True))
            for name, rounds in seconds.items()
            if name != provider and (baselines is None or name in baselines)
        },
    }


@dataclass(slots=True, kw_only=True)
class Run:
    """How to measure on a device, and all that was found there.

    Args:
        device, timer: where, and how calls are timed there.
        roof: the most that is reached there.
        repeats: rounds that count.
        graph: replay CUDA graphs of what can be captured.
        seconds: to spend on a suite beyond its first rounds.
        records: a dict for each provider that was measured: subject, `summarize`, `graph`.
        missing: subject, provider and reason of the others.
    """

    device: torch.device
    timer: Timer
    roof: Roof
    repeats: int
    graph: bool = False
    seconds: float = float("inf")
    records: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    def measure(self, suite: Suite) -> None:
        """Builds the providers of a suite and measures those that could be built and run."""
        calls: dict[str, Call] = {}
        graphs = set()
        for name, candidate in suite.candidates.items():
            try:
                call = candidate.build()
                call(0)
            except Exception as error:  # whatever one provider does, the others are measured
                reason = str(error) if isinstance(error, NotMeasured) else first_line(error)
                self.missing.append({**suite.subject, "provider": name, "reason": reason})
                continue
            if self.graph and self.device.type == "cuda" and candidate.can_capture:
                try:
                    call = capture(call)
                    graphs.add(name)
                except Exception:  # then it is launched eagerly, and the record says so
                    torch.cuda.synchronize()
            calls[name] = call
        seconds = measure_interleaved(
            calls, repeats=self.repeats, timer=self.timer, seconds=self.seconds
        )
        for name in calls:
            work = suite.candidates[name].work
            numbers = summarize(seconds, name, work, self.roof, suite.baselines)
            record = {**suite.subject, "provider": name, **numbers, "graph": name in graphs}
            self.records.append(record)
        calls.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of its text, cut to what fits a table."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200].rstrip(": ")


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
