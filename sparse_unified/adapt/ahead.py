# SPDX-License-Identifier: Apache-2.0
"""Batches of the steps to come, prepared by another process while this one computes.

What a step draws depends on the seed and its number alone, so it makes no difference which process
draws it. Tensors travel through a pipe, as arrays beside what holds them, and are read to where
they stay: of small ones, a copy costs less than the file that torch would share each by. What the
pipe holds is how far the other process is ahead.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from sparse_unified.bagel.segments import TrainingBatch

Prepare = Callable[[int], list[TrainingBatch]]
# Of 64 KiB, as pipes come, a batch would wait for its reader several times on its way. More than
# this takes privileges.
_PIPE_BYTES = 1 << 20
# A message: how many bytes hold the arrays, how many are the arrays, the arrays, what holds them.
_HEADER = struct.Struct("=QQ")
_ALIGNMENT = 64


@contextmanager
def prepared_ahead(prepare: Prepare, first: int, end: int) -> Iterator[Callable[[], Any]]:
    """Prepares the steps from `first` to `end` - 1 inside the block.

    Args:
        prepare: returns the batches of a step. It runs in a copy of this process, with one thread,
            and may touch no accelerator; where processes are not forked it has to be picklable.

    Yields:
        A function that returns the batches of the next step. It raises what `prepare` raised, and
        RuntimeError if the other process died.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else None)
    ours, theirs = context.Pipe(duplex=False)
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(theirs.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    process = context.Process(
        target=_serve, args=(prepare, first, end, ours, theirs), name="batches", daemon=True
    )
    with warnings.catch_warnings():
        # A forked process that computes with one thread needs none of those it lost.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        process.start()
    theirs.close()
    try:
        yield _Reader(ours).receive
    finally:
        ours.close()
        process.terminate()
        process.join()
        process.close()


class _Reader:
    """Reads messages from a pipe; the tensors of one are there until the next but one is read."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._memory = [bytearray(), bytearray()]

    def receive(self) -> Any:
        """Returns the next value, or raises it."""
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header))
        holder_bytes, array_bytes = _HEADER.unpack(header)
        self._memory.reverse()
        if len(self._memory[0]) < holder_bytes + array_bytes:
            self._memory[0] = bytearray(2 * (holder_bytes + array_bytes))
        message = memoryview(self._memory[0])[: holder_bytes + array_bytes]
        self._fill(message)
        sizes, holder = pickle.loads(message[array_bytes:])
        starts = _starts(sizes)
        arrays = [message[at : at + size] for at, size in zip(starts, sizes, strict=False)]
        found = pickle.loads(holder, buffers=arrays)
        if isinstance(found, Exception):
            raise found
        return found

    def _fill(self, memory: memoryview) -> None:
        while memory:
            count = os.readv(self._pipe.fileno(), [memory])
            if not count:
                raise RuntimeError(
                    "Trainer: the process that prepares batches must live until the last step, "
                    "got its end"
                )
            memory = memory[count:]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Returns where arrays of so many bytes start, and where the last one ends, aligned."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _serve(prepare: Prepare, first: int, end: int, ours: Connection, theirs: Connection) -> None:
    # Else this process would keep the pipe open, and wait for a reader that is gone.
    ours.close()
    torch.set_num_threads(1)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        for step in range(first, end):
            try:
                found: Any = prepare(step)
            except Exception as error:
                found = error
            _send(theirs, found)
            if isinstance(found, Exception):
                return


def _send(pipe: Connection, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    arrays = [buffer.raw() for buffer in buffers]
    sizes = [array.nbytes for array in arrays]
    starts = _starts(sizes)
    memory = bytearray(starts[-1])
    for at, array in zip(starts, arrays, strict=False):
        memory[at : at + array.nbytes] = array
    holder = pickle.dumps((sizes, stream.getvalue()))
    with os.fdopen(os.dup(pipe.fileno()), "wb") as file:
        file.write(_HEADER.pack(len(holder), len(memory)) + memory + holder)


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
