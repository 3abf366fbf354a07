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
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cases import Work

# What is measured: a function of the number of the round.
Call = Callable[[int], object]

# Copies of the input that calls rotate over, so that none finds it in its nearest cache.
NUM_INPUTS = 4
# Rounds before those that count.
WARMUP = 2
# Of the time the host needs to launch a call, so much is hidden behind a waiting kernel at most.
_MOST_HIDDEN_SECONDS = 2e-3
_CYCLES_PER_SECOND = 2e9
# Calls on a side stream before a graph is captured, as torch's documentation asks for.
_CAPTURE_WARMUP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """The most that this machine was seen to reach.

    Args:
        tflops: the fastest round of the fastest of `gemms`.
        gbps: of a copy, bytes read and bytes written.
        gemms: TFLOP/s of each matrix product by name, the median of its rounds.
        source: what the products are, for the reader of a table.
    """

    tflops: float
    gbps: float
    gemms: dict[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a group of providers computes: one op on one case, in one direction and dtype."""

    op: str
    case: str
    direction: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of the table.

    Args:
        spread: interquartile range of the rounds, relative to their median.
        speedup: provider -> how many times faster than it.
        graph: replayed from a CUDA graph.
    """

    op: str
    case: str
    direction: str
    dtype: str
    provider: str
    median_us: float
    min_us: float
    spread: float
    tflops: float
    gbps: float
    roof_fraction: float
    speedup: dict[str, float] = field(default_factory=dict)
    graph: bool = False


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

    def __iadd__(self, other: Measured) -> Measured:
        self.records += other.records
        self.missing += other.missing
        return self


class NotMeasured(Exception):
    """Why a provider is not measured, in words for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A provider before it is built.

    Args:
        build: makes and checks the call; whatever it raises is why the provider is not measured.
        work: what one call computes and moves.
        can_capture: a CUDA graph may hold it.
    """

    build: Callable[[], Call]
    work: Work
    can_capture: bool = True


class Timer(Protocol):
    """Times every call of a round once."""

    def round(self, calls: Mapping[str, Call], turn: int) -> dict[str, float]:
        """Returns the seconds of each call by name."""


class WallTimer:
    """The wall clock, for calls that are done when they return."""

    def round(self, calls: Mapping[str, Call], turn: int) -> dict[str, float]:
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

    Args:
        device: a CUDA device.
        flush_bytes: size of the buffer; twice the L2 cache by default.
        cuda: stands for `torch.cuda`.
    """

    def __init__(
        self, device: torch.device, *, flush_bytes: int | None = None, cuda: Any = torch.cuda
    ) -> None:
        self._cuda = cuda
        if flush_bytes is None:
            flush_bytes = 2 * int(cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.ones(max(flush_bytes // 4, 1), dtype=torch.float32, device=device)
        self._launch_seconds: dict[str, float] = {}

    def round(self, calls: Mapping[str, Call], turn: int) -> dict[str, float]:
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
    graphs = []
    pool = None
    for turn in range(num_inputs):
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=pool):
            call(turn)
        pool = graph.pool()
        graphs.append(graph)
    return lambda turn: graphs[turn % num_inputs].replay()


def measure_interleaved(
    calls: Mapping[str, Call],
    *,
    repeats: int,
    warmup: int = WARMUP,
    timer: Timer | None = None,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Runs every call once per round.

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


def summarize(
    subject: Subject,
    seconds: Mapping[str, list[float]],
    provider: str,
    work: Work,
    roof: Roof,
    *,
    baselines: tuple[str, ...],
    graph: bool = False,
) -> Record:
    """Sums up the rounds of one provider."""
    own = seconds[provider]
    median = statistics.median(own)
    quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else [median, median, median]
    ideal = max(work.flops / (roof.tflops * 1e12), work.bytes / (roof.gbps * 1e9))
    return Record(
        **asdict(subject),
        provider=provider,
        median_us=median * 1e6,
        min_us=min(own) * 1e6,
        spread=(quartiles[2] - quartiles[0]) / median,
        tflops=work.flops / median / 1e12,
        gbps=work.bytes / median / 1e9,
        roof_fraction=ideal / median,
        speedup={
            name: statistics.median(b / a for b, a in zip(seconds[name], own, strict=True))
            for name in baselines
            if name != provider
        },
        graph=graph,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """How to measure.

    Args:
        device, timer: where, and how calls are timed there.
        roof: the most that is reached there.
        repeats: rounds that count.
        graph: replay CUDA graphs of what can be captured.
        on_round: called after each round.
    """

    device: torch.device
    timer: Timer
    roof: Roof
    repeats: int
    graph: bool = False
    on_round: Callable[[], object] | None = None

    def measure(
        self,
        subject: Subject,
        candidates: Mapping[str, Candidate],
        baselines: tuple[str, ...] | None = None,
    ) -> Measured:
        """Builds providers, and measures those that could be built and run.

        Args:
            candidates: by provider.
            baselines: providers to give ratios over; all by default.

        Returns:
            A record of each provider that runs, and the others with the reason.
        """
        measured = Measured()
        calls: dict[str, Call] = {}
        graphs = set()
        for name, candidate in candidates.items():
            try:
                call = candidate.build()
                call(0)
            except Exception as error:  # whatever one provider does, the others are measured
                reason = str(error) if isinstance(error, NotMeasured) else first_line(error)
                missing = Missing(**asdict(subject), provider=name, reason=reason)
                measured.missing.append(missing)
                continue
            if self.graph and self.device.type == "cuda" and candidate.can_capture:
                try:
                    call = capture(call)
                    graphs.add(name)
                except Exception:  # then it is launched eagerly, and the record says so
                    torch.cuda.synchronize()
            calls[name] = call
        seconds = measure_interleaved(
            calls, repeats=self.repeats, timer=self.timer, on_round=self.on_round
        )
        measured.records = [
            summarize(
                subject,
                seconds,
                name,
                candidates[name].work,
                self.roof,
                baselines=tuple(
                    other for other in calls if baselines is None or other in baselines
                ),
                graph=name in graphs,
            )
            for name in calls
        ]
        calls.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return measured


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
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line}"[:200].rstrip(": ")


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
