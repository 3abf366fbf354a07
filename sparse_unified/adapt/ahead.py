# SPDX-License-Identifier: Apache-2.0
"""Batches of the steps to come, prepared by another process while this one computes.

What a step draws depends on the seed and its number alone, so it makes no difference which process
draws it. Tensors lie in memory that both processes see, in two places that take turns.

This is not torch's DataLoader because that shares every tensor by a file of its own. To receive a
batch of the miniature (25 small tensors, 3 to 7 ms to make) took 10 to 13 ms by it, and 0.2 to 0.3
ms so.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Of each place; memory that is never written to is never taken. What does not fit is sent.
_SHARED_BYTES = 1 << 28
_PLACES, _ALIGNMENT = 2, 64
# Processes wake each other once for so many steps.
_STEPS_AT_ONCE = 4


def can_help() -> bool:
    """Whether another process can prepare batches: a copy of this one, on a core that is idle.

    Where torch's threads take all cores they wait for each other actively, and to displace one of
    them costs more than a batch.
    """
    if multiprocessing.current_process().daemon:
        return False
    own = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if own else os.cpu_count() or 1
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return can_fork and torch.get_num_threads() < cores


@contextmanager
def prepared_ahead(prepare: Callable[[int], T], first: int, end: int) -> Iterator[Callable[[], T]]:
    """Prepares the steps from `first` to `end` - 1 inside the block; needs `can_help`.

    Args:
        prepare: returns what a step needs. It runs in a copy of this process, with one thread,
            and may touch no accelerator.

    Yields:
        A function that returns what the next step needs, whose tensors are there until it is
        called again. It raises what `prepare` raised, and RuntimeError if the other process died.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    memory = [mmap.mmap(-1, _SHARED_BYTES) for _ in range(_PLACES)]
    process = context.Process(
        target=_serve, args=(prepare, first, end, ours, theirs, memory), name="batches", daemon=True
    )
    with warnings.catch_warnings():
        # A forked process that computes with one thread needs none of those it lost.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        process.start()
    theirs.close()
    try:
        yield _Reader(ours, memory).receive
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


class _Reader:
    """Reads what the other process sends."""

    def __init__(self, pipe: Connection, memory: list[mmap.mmap]) -> None:
        self._pipe = pipe
        self._memory = [memoryview(place) for place in memory]
        self._waiting: deque[Any] = deque()

    def receive(self) -> Any:
        """Returns the next value, or raises it."""
        if not self._waiting:
            self._waiting.extend(self._read())
        found = self._waiting.popleft()
        if isinstance(found, Exception):
            raise found
        return found

    def _read(self) -> list[Any]:
        with suppress(OSError):
            # What was read last is done with, so its place is free. Nobody may be there to hear it.
            self._pipe.send_bytes(b"1")
        try:
            spans, holder = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise RuntimeError(
                "Trainer: the process that prepares batches must live until the last step, "
                "got its end"
            ) from None
        place = self._memory[0]
        self._memory.reverse()
        found: list[Any] = pickle.loads(holder, buffers=[place[start:end] for start, end in spans])
        return found


def _serve(
    prepare: Callable[[int], object],
    first: int,
    end: int,
    ours: Connection,
    theirs: Connection,
    memory: list[mmap.mmap],
) -> None:
    # Else this process would keep the pipe open, and wait for a reader that is gone.
    ours.close()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        for number, start in enumerate(range(first, end, _STEPS_AT_ONCE)):
            found: list[Any] = []
            try:
                for step in range(start, min(start + _STEPS_AT_ONCE, end)):
                    found.append(prepare(step))
            except Exception as error:
                found.append(error)
            # The other process works in one place until it asks for the next values.
            if number:
                theirs.recv_bytes()
            theirs.send_bytes(_packed(found, memory[number % _PLACES]))
            if isinstance(found[-1], Exception):
                return


def _packed(value: Any, place: mmap.mmap) -> bytes:
    """Puts the tensors of a value into shared memory; returns where, and what holds them."""
    spans: list[tuple[int, int]] = []

    def is_sent(buffer: pickle.PickleBuffer) -> bool:
        array = buffer.raw()
        last = spans[-1][1] if spans else 0
        start = -(-last // _ALIGNMENT) * _ALIGNMENT
        if start + array.nbytes > len(place):
            return True
        place[start : start + array.nbytes] = array
        spans.append((start, start + array.nbytes))
        return False

    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=is_sent).dump(value)
    return pickle.dumps((spans, stream.getvalue()))


class _Pickler(pickle.Pickler):
    """Writes tensors of the CPU as buffers."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            array: Any = value.contiguous().numpy()
            memory = pickle.PickleBuffer(array)
            return _tensor, (memory, value.dtype, *value.shape)
        return NotImplemented


def _tensor(memory: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
