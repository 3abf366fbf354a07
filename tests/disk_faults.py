# SPDX-License-Identifier: Apache-2.0
"""Writes model directories in child processes that are killed, or whose disk fails, or that race.

Usage: disk_faults.py DENSE ROOT STRIDE JOB..., where every STRIDE-th call that changes the disk
goes wrong and a JOB is `kill-OPERATION`, `fail-OPERATION` or `race`. Prints one JSON object with
the counts of each; any state that must not be is an error. Children are forked from a process that
has not run a torch op yet, which keeps one at a few milliseconds.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoint_files import snapshot

from sparse_unified.checkpoint import PruneWidthConfig, SkipLayersConfig, convert, invert, prune

MODES = [PruneWidthConfig(block_size=16), SkipLayersConfig(layers=[1])]
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_WRITE, _EXIT = os.write, os._exit  # for answers, which do not go to the disk

Operation = Callable[[Path, Path], object]
OPERATIONS: dict[str, Operation] = {
    "convert": partial(convert, num_experts=4, top_k=2, seed=1),
    "prune": partial(prune, modes=MODES, seed=1),
    "invert": invert,
}


def at_call(number: int, fault: Callable[[], object], *, short: bool = False) -> list[int]:
    """Does something in place of the n-th call that changes the disk; returns the calls left.

    Args:
        short: every write before takes only half of what it is given, as it may.
    """
    left = [number]

    def wrap(holder: object, name: str) -> None:
        call = getattr(holder, name)

        def counted(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                fault()
            if short and name == "write" and len(args[1]) > 1:  # type: ignore[arg-type]
                args = (args[0], memoryview(args[1])[: len(args[1]) // 2])  # type: ignore[arg-type]
            return call(*args, **options)

        setattr(holder, name, counted)

    for name in ("write", "sendfile", "fsync", "mkdir", "rename", "ftruncate"):
        wrap(os, name)
    for name in ("mkdir", "rename"):
        wrap(Path, name)
    return left


def die_at_call(number: int) -> None:
    """Makes the process kill itself at the n-th call that changes the disk."""
    at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fork(run: Callable[[], str]) -> tuple[int, Callable[[], str]]:
    """Forks a process that runs `run`; returns its id, and what waits for its answer or death."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = run()
        except BaseException as error:
            answer = f"error {error!r}"
        _WRITE(writer, answer.encode())
        _EXIT(0)
    os.close(writer)

    def answer() -> str:
        with os.fdopen(reader, "rb") as stream:
            text = stream.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        return text if code == 0 else "killed"

    return child, answer


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def attempt(operation: Operation, source: Path, out: Path, number: int, code: int | None) -> str:
    """Runs an operation that is killed, or whose disk fails, at one call; tells how it went."""
    if code is None:
        die_at_call(number)
        operation(source, out)
        return "done"

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    message, opened = "", num_open()
    left = at_call(number, fail, short=number % 2 == 1)
    try:
        operation(source, out)
    except RuntimeError as error:
        message = str(error)
    assert num_open() == opened, "a file was left open"
    if not message:
        return "done" if left[0] >= 0 else "survived"
    assert left[0] < 0, message
    assert re.search(f" must .* got {os.strerror(code)}", message), message
    return "refused"


def strike(kind: str, name: str, dense: Path, root: Path, stride: int) -> Counter[str]:
    """Lets calls go wrong until a run gets through: the target is absent or complete."""
    source, operation = dense, OPERATIONS[name]
    if name == "invert":
        source = root / "sparse"
        assert fork(lambda: str(OPERATIONS["convert"](dense, source)))[1]()
    out, partial_out, before = root / "out", root / ".out.partial", snapshot(source)
    assert fork(lambda: attempt(operation, source, out, 1 << 40, None))[1]() == "done"
    complete, counts = snapshot(out), Counter[str]()
    shutil.rmtree(out)

    def check(result: str) -> None:
        counts[result] += 1
        counts["leftovers"] += partial_out.exists()
        # The last sync comes after the rename: then the target is there, and whole.
        assert out.exists() or result in ("killed", "refused"), result
        assert snapshot(source) == before
        assert kind == "kill" or not partial_out.exists()
        if out.exists():
            assert snapshot(out) == complete
            shutil.rmtree(out)

    number, result = 0, ""
    while result != "done":
        code = CODES[number % len(CODES)] if kind == "fail" else None
        result = fork(partial(attempt, operation, source, out, number, code))[1]()
        check(result)
        number += stride
    if kind == "kill":  # and from outside, at any moment
        generator, began = random.Random(0), time.perf_counter()
        check(fork(lambda: attempt(operation, source, out, 1 << 40, None))[1]())
        duration = time.perf_counter() - began
        for _ in range(40 // stride):
            child, wait = fork(lambda: attempt(operation, source, out, 1 << 40, None))
            time.sleep(generator.uniform(0, 1.1 * duration))
            os.kill(child, signal.SIGKILL)
            check(wait())
        check(fork(lambda: attempt(operation, source, out, 1 << 40, None))[1]())
        assert not partial_out.exists()
    return counts


def race(dense: Path, root: Path, rounds: int) -> Counter[str]:
    """Starts all operations to one target at once; one wins, and its files are unmixed."""
    convert(dense, root / "sparse", num_experts=4, top_k=2, seed=1)
    sources = {name: root / "sparse" if name == "invert" else dense for name in OPERATIONS}
    whole, counts, out = {}, Counter[str](), root / "out"
    for name, operation in OPERATIONS.items():
        operation(sources[name], root / name)
        whole[name] = snapshot(root / name)

    def compete(start: int, name: str) -> str:
        os.read(start, 1)
        try:
            OPERATIONS[name](sources[name], out)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return "done"

    for _ in range(rounds):
        reader, writer = os.pipe()
        runs = {name: fork(partial(compete, reader, name))[1] for name in OPERATIONS}
        _WRITE(writer, b"go!")
        answers = {name: run() for name, run in runs.items()}
        os.close(reader)
        os.close(writer)
        (winner,) = [name for name, answer in answers.items() if answer == "done"]
        assert snapshot(out) == whole[winner]
        assert not (root / ".out.partial").exists()
        for answer in answers.values():
            told = "one run at a time" in answer or "target must not exist" in answer
            assert told or answer == "done", answer
            counts["done" if answer == "done" else "refused"] += 1
        shutil.rmtree(out)
    return counts


if __name__ == "__main__":
    counted = {}
    for job in sys.argv[4:]:
        with TemporaryDirectory(dir=sys.argv[2]) as folder:
            kind, _, operation = job.partition("-")
            stride = int(sys.argv[3])
            own = Path(shutil.copytree(sys.argv[1], Path(folder) / "dense"))
            counted[job] = (
                race(own, Path(folder), max(3, 40 // stride))
                if kind == "race"
                else strike(kind, operation, own, Path(folder), stride)
            )
    sys.stdout.write(json.dumps(counted) + "\n")
