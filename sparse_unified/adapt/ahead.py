# SPDX-License-Identifier: Apache-2.0
"""Batches of the steps to come, prepared by another process while this one computes.

What a step draws depends on the seed and its number alone, so it makes no difference which process
draws it. Tensors travel through a pipe as arrays: of small ones, a copy costs less than the file
that torch would share each by. What the pipe holds is how far the other process is ahead.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
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
        yield lambda: _receive(ours)
    finally:
        ours.close()
        process.terminate()
        process.join()
        process.close()


def _receive(pipe: Connection) -> Any:
    try:
        found = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(
            "Trainer: the process that prepares batches must live until the last step, got its end"
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


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
            theirs.send_bytes(_pickled(found))
            if isinstance(found, Exception):
                return


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Writes tensors of the CPU as arrays."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
