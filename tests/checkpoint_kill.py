# SPDX-License-Identifier: Apache-2.0
"""Writes again and again in child processes that are killed; run by test_checkpoint_atomic.

Usage: checkpoint_kill.py convert|prune DENSE ROOT STRIDE, to die at every STRIDE-th call. Prints
one JSON object: how many runs died, how many left the target absent, and how many left it complete.
Any other state is an error. Children are forked from a process that has not run a torch op yet,
which keeps a run at a few milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from checkpoint_files import snapshot

from sparse_unified.checkpoint import PruneWidthConfig, SkipLayersConfig, convert, prune

MODES = [PruneWidthConfig(block_size=16), SkipLayersConfig(layers=[1])]
OPERATIONS = {
    "convert": partial(convert, num_experts=4, top_k=2, seed=1),
    "prune": partial(prune, modes=MODES, seed=1),
}


def start(dense: Path, out: Path, prepare: Callable[[], None]) -> int:
    """Forks a process that converts or prunes, and returns its id."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            OPERATIONS[sys.argv[1]](dense, out)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return child


def die_at_call(number: int) -> None:
    """Makes the process kill itself at the n-th call that changes the file system."""
    left = [number]

    def wrap(holder: object, name: str) -> None:
        call = getattr(holder, name)

        def counted(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        setattr(holder, name, counted)

    for name in ("write", "copy_file_range", "fsync", "mkdir", "rename", "unlink", "rmdir"):
        wrap(os, name)
    for name in ("mkdir", "rename", "unlink", "open"):
        wrap(Path, name)


def run(dense: Path, root: Path, stride: int) -> dict[str, int]:
    out = root / "out"
    leftover = root / ".out.partial"
    before = snapshot(dense)
    counts = {"killed": 0, "absent": 0, "complete": 0, "leftovers": 0}

    assert os.waitstatus_to_exitcode(os.waitpid(start(dense, out, lambda: None), 0)[1]) == 0
    complete = snapshot(out)
    shutil.rmtree(out)

    def check(status: int) -> bool:
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
        counts["killed"] += code != 0
        counts["leftovers"] += leftover.exists()
        assert snapshot(dense) == before
        if out.exists():
            assert snapshot(out) == complete
            shutil.rmtree(out)
            counts["complete"] += 1
        else:
            assert code != 0
            counts["absent"] += 1
        return code == 0

    # At calls that touch the disk, until a run gets through.
    number = 0
    while not check(os.waitpid(start(dense, out, partial(die_at_call, number)), 0)[1]):
        number += stride
    assert number > 50, number

    # And from outside, at any moment.
    began = time.perf_counter()
    check(os.waitpid(start(dense, out, lambda: None), 0)[1])
    duration = time.perf_counter() - began
    generator = random.Random(0)
    for _ in range(40 // stride):
        child = start(dense, out, lambda: None)
        time.sleep(generator.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        check(os.waitpid(child, 0)[1])

    check(os.waitpid(start(dense, out, lambda: None), 0)[1])
    assert not leftover.exists()
    return counts


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))) + "\n")
