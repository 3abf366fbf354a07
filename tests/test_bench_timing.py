# SPDX-License-Identifier: Apache-2.0
"""What is recorded, waited for and captured, on a CUDA that only writes down what it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparse_unified.bench.timing import EventTimer, WallTimer, capture


class FakeCuda:
    """Stands for torch.cuda: a log, and a clock that ticks a millisecond an event."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = 0
        self.capturing = False

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            time: int

            def record(self) -> None:
                cuda.clock += 1
                self.time = cuda.clock
                cuda.log.append("event")

            def elapsed_time(self, other: Any) -> float:
                assert cuda.log[-1] == "synchronize"
                return float(other.time - self.time)

        return Event()

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0
        self.log.append("sleep")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Stream(self) -> Any:
        return FakeStream(self, "side")

    def current_stream(self) -> Any:
        return FakeStream(self, "main")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")

    def CUDAGraph(self) -> Any:
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.log.append(f"capture {pool}")
        self.capturing = True
        yield
        self.capturing = False


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.cuda.log.append(f"replay {id(self)}")


def test_wall_timer_calls_each_once_a_round() -> None:
    turns: list[tuple[str, int]] = []
    seconds = WallTimer().round(
        {"a": lambda turn: turns.append(("a", turn)), "b": lambda turn: turns.append(("b", turn))},
        7,
    )
    assert turns == [("a", 7), ("b", 7)]
    assert all(value >= 0 for value in seconds.values())


def test_event_timer_waits_for_the_device_once_a_round_and_not_inside_the_events() -> None:
    cuda = FakeCuda()
    timer = EventTimer(torch.device("cpu"), flush_bytes=64, cuda=cuda)
    calls = {"a": lambda _: cuda.log.append("a"), "b": lambda _: cuda.log.append("b")}
    seconds = timer.round(calls, 0)
    assert cuda.log == ["event", "a", "event", "event", "b", "event", "synchronize"]
    assert seconds == {"a": 1e-3, "b": 1e-3}
    cuda.log.clear()
    timer.round(calls, 1)  # now it knows what launching takes, and hides that
    once = ["sleep", "event"]
    assert cuda.log == [*once, "a", "event", *once, "b", "event", "synchronize"]


def test_event_timer_reads_a_buffer_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    timer = EventTimer(torch.device("cpu"), flush_bytes=4096, cuda=cuda)
    assert timer._buffer.nbytes == 4096
    assert timer._buffer.min() == 1  # never zeros
    summed = torch.Tensor.sum

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor is timer._buffer
        cuda.log.append("flush")
        return summed(tensor)

    monkeypatch.setattr(torch.Tensor, "sum", watched)
    timer.round({"a": lambda _: cuda.log.append("a")}, 0)
    assert cuda.log == ["flush", "event", "a", "event", "synchronize"]


def test_capture_warms_up_on_a_side_stream_and_makes_a_graph_an_input() -> None:
    cuda = FakeCuda()
    seen: list[tuple[int, bool]] = []
    replay = capture(lambda turn: seen.append((turn, cuda.capturing)), 2, cuda=cuda)
    assert seen == [(0, False), (1, False), (2, False), (0, True), (1, True)]
    assert cuda.log == [
        "side waits for main",
        "enter side",
        "leave side",
        "main waits for side",
        "synchronize",
        "capture None",
        "capture pool",
    ]
    cuda.log.clear()
    for turn in (0, 1, 2, -1):
        replay(turn)
    first, second, third, last = cuda.log
    assert first == third != second == last
    assert len(seen) == 5  # nothing runs twice on the host
