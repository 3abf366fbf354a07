# SPDX-License-Identifier: Apache-2.0
"""How one round of calls is timed: by the wall clock, by CUDA events, through CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

# What is measured: a function of the number of the round.
Call = Callable[[int], object]

# Of the time the host needs to launch a call, so much is hidden behind a waiting kernel at most.
_MOST_HIDDEN_SECONDS = 2e-3
_CYCLES_PER_SECOND = 2e9
# What the profilers of graph capture ask for: calls on a side stream before the capture.
_CAPTURE_WARMUP = 3


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
    """CUDA events around each call, which finds the L2 cache full of something else.

    Before each call a buffer of twice the L2 cache is read (not written: lines to be written back
    would be charged to the call), then a kernel waits for about the time the host needs to launch
    the call, so that the device never waits for the host within the events, unless the call itself
    waits for the device. The host waits once a round.

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


def capture(call: Call, num_inputs: int, *, cuda: Any = torch.cuda) -> Call:
    """Captures a call into CUDA graphs, one for each of the inputs that it takes turns with.

    Raises:
        RuntimeError: the call cannot be captured: it waits for the device, say.
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
