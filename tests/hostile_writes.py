# SPDX-License-Identifier: Apache-2.0
"""Fails at every call that changes the disk, and races for one target; run by test_hostile_writes.

Usage: hostile_writes.py fail DENSE ROOT, or hostile_writes.py race DENSE ROOT. Prints one JSON
object with counts; any state that must not be is an error. As in checkpoint_kill, children are
forked from a process that has not run a torch op yet.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from checkpoint_files import snapshot

from sparse_unified.checkpoint import PruneWidthConfig, SkipLayersConfig, convert, invert, prune

MODES = [PruneWidthConfig(block_size=16), SkipLayersConfig(layers=[1])]
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
# Every call with which a file or a name appears, changes or goes.
CALLS = ("write", "copy_file_range", "fsync", "mkdir", "rename", "ftruncate")

_WRITE = os.write  # for answers, which do not go to the disk

Operation = Callable[[Path, Path], object]
OPERATIONS: dict[str, Operation] = {
    "convert": partial(convert, num_experts=4, top_k=2, seed=1),
    "prune": partial(prune, modes=MODES, seed=1),
    "invert": invert,
}


def in_child(run: Callable[[], str]) -> Callable[[], str]:
    """Forks a process that runs `run`, and returns a function that waits for its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = run()
        except BaseException as error:
            answer = f"error {error!r}"
        _WRITE(writer, answer.encode())
        os._exit(0)
    os.close(writer)

    def answer() -> str:
        with os.fdopen(reader, "rb") as stream:
            text = stream.read().decode()
        assert os.waitpid(child, 0)[1] == 0, "a child died"
        return text

    return answer


def fail_at(number: int, code: int, short: bool) -> list[int]:
    """Makes the n-th call fail, as a full or broken disk does; returns a box that counts down.

    Args:
        short: every os.write before takes only half of what it is given, as it may.
    """
    left = [number]

    def wrap(holder: object, name: str) -> None:
        call = getattr(holder, name)

        def failing(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(code, os.strerror(code))
            if short and name == "write" and len(args[1]) > 1:  # type: ignore[arg-type]
                args = (args[0], memoryview(args[1])[: len(args[1]) // 2])  # type: ignore[arg-type]
            return call(*args, **options)

        setattr(holder, name, failing)

    for name in CALLS:
        wrap(os, name)
    for name in ("mkdir", "rename"):
        wrap(Path, name)
    return left


def attempt(operation: Operation, source: Path, out: Path, number: int, code: int) -> str:
    """Runs an operation on a disk that fails once; says "done" or what the refusal was."""
    left = fail_at(number, code, short=number % 2 == 1)
    try:
        operation(source, out)
    except RuntimeError as error:
        message = str(error)
        assert left[0] < 0, message
        assert os.strerror(code) in message, message
        assert " must " in message, message
        return "refused"
    return "done" if left[0] >= 0 else "survived"


def fail(dense: Path, root: Path) -> dict[str, int]:
    """Lets every call of every operation fail once; the target must be absent or complete."""
    counts: Counter[str] = Counter()
    convert(dense, root / "sparse", num_experts=4, top_k=2, seed=1)
    for name, operation in OPERATIONS.items():
        source = root / "sparse" if name == "invert" else dense
        before = snapshot(source)
        out = root / "out"
        assert in_child(partial(attempt, operation, source, out, 1 << 40, 0))() == "done"
        complete = snapshot(out)
        shutil.rmtree(out)
        number, result = 0, ""
        while result != "done":
            code = CODES[number % len(CODES)]
            result = in_child(partial(attempt, operation, source, out, number, code))()
            counts[f"{name} {result}"] += 1
            # The last sync comes after the rename: then the target is there, and whole.
            if out.exists():
                assert snapshot(out) == complete, f"{name} {number}"
                shutil.rmtree(out)
            else:
                assert result == "refused", f"{name} {number}: {result}"
            assert {path.name for path in root.iterdir()} == {"dense", "sparse"}, f"{name} {number}"
            assert snapshot(source) == before
            number += 1
    return dict(counts)


def compete(dense: Path, out: Path, start: int, **options: int) -> str:
    """Converts when the pipe closes, as all competitors do at once."""
    os.read(start, 1)
    try:
        convert(dense, out, **options)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "done"


def race(dense: Path, root: Path) -> dict[str, int]:
    """Starts three conversions to one target at once; one wins, and its files are unmixed."""
    counts: Counter[str] = Counter()
    variants = [{"num_experts": e, "top_k": 1, "seed": e} for e in (2, 4, 8)]
    whole = []
    for number, options in enumerate(variants):
        convert(dense, root / f"alone{number}", **options)  # type: ignore[arg-type]
        whole.append(snapshot(root / f"alone{number}"))
    for _ in range(40):
        reader, writer = os.pipe()
        runs = [in_child(partial(compete, dense, root / "out", reader, **o)) for o in variants]
        os.write(writer, b"go!")
        answers = [run() for run in runs]
        os.close(reader)
        os.close(writer)
        winners = [number for number, answer in enumerate(answers) if answer == "done"]
        assert len(winners) == 1, answers
        assert snapshot(root / "out") == whole[winners[0]]
        assert not (root / ".out.partial").exists()
        for answer in answers:
            told = "one run at a time" in answer or "target must not exist" in answer
            assert told or answer == "done", answer
            counts["done" if answer == "done" else "refused"] += 1
        shutil.rmtree(root / "out")
    return dict(counts)


if __name__ == "__main__":
    function = {"fail": fail, "race": race}[sys.argv[1]]
    sys.stdout.write(json.dumps(function(Path(sys.argv[2]), Path(sys.argv[3]))) + "\n")
