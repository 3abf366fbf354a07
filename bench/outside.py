# SPDX-License-Identifier: Apache-2.0
"""What of a program's time is spent outside of torch and of our kernels: owners of stacks.

A moment belongs to the innermost frame that is one of these:

    torch     a file of torch, Python or C++ (MKL is inside; so is what torch asks of libc)
    kernels   our compiled library
    outside   Python of this project

so the interpreter, builtins and the standard library belong to whoever called them.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import sparse_unified

TORCH, KERNELS, OUTSIDE = "torch", "kernels", "outside"
_TORCH_FILES = f"{Path(torch.__file__).parent}/"
_OUR_FILES = (f"{Path(sparse_unified.__file__).parent}/", f"{Path(__file__).parent}/")
_LIBRARY = "_C.abi3.so"
# The threads of torch wait and work in this library, which torch may load from anywhere.
_THREADS = "libgomp"
_FRAME = re.compile(r"(?P<name>.*) \((?P<file>.+?)(?::\d+)?\)")


def owner_of_file(file: str) -> str | None:
    """Returns whose a file is, None where it works for its caller."""
    if file.endswith(_LIBRARY):
        return KERNELS
    if file.startswith(_TORCH_FILES) or Path(file).name.startswith(_THREADS):
        return TORCH
    return OUTSIDE if file.startswith(_OUR_FILES) else None


@dataclass(slots=True)
class Shares:
    """Samples of a part of a program.

    Attributes:
        owners: samples of each owner.
        functions: samples that are outside, by the innermost function of this project.
        inside: samples of each of the functions that were asked for, and of what they called.
    """

    owners: Counter[str] = field(default_factory=Counter)
    functions: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)

    @property
    def samples(self) -> int:
        return sum(self.owners.values())

    @property
    def outside(self) -> float:
        """The share of the samples that is outside."""
        return self.owners[OUTSIDE] / self.samples


def read_stacks(
    lines: Iterable[str], within: str, phases: Sequence[str] = (), *, apart: str | None = None
) -> Shares:
    """Counts sampled stacks by owner.

    Args:
        lines: `NAME (FILE:LINE);NAME (FILE:LINE);... COUNT`, outermost frame first, with whole
            paths, as py-spy writes them.
        within: function that a stack must hold to count; apart: one that it must not hold.
        phases: functions to count beside it.
    """
    shares = Shares()
    for line in lines:
        text, _, number = line.rpartition(" ")
        found = [_FRAME.fullmatch(frame) for frame in text.split(";")]
        frames = [(match["name"], match["file"]) for match in found if match]
        names = {name for name, _ in frames}
        if within not in names or apart in names:
            continue
        count = int(number)
        shares.inside.update({name: count for name in phases if name in names})
        owned = ((owner_of_file(file), name, file) for name, file in reversed(frames))
        owner, name, file = next(frame for frame in owned if frame[0])
        assert owner is not None
        shares.owners[owner] += count
        if owner == OUTSIDE:
            shares.functions[f"{Path(file).name}: {name}"] += count
    return shares


def count_instructions(run: Callable[[], object]) -> int:
    """Counts the instructions of the interpreter that `run` makes it execute outside of torch.

    The number depends on the code and on Python's version, not on the machine or its load.
    """
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        if _owner_of_frame(frame) != OUTSIDE:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before = sys.gettrace()
    sys.settrace(called)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def _owner_of_frame(frame: FrameType | None) -> str | None:
    while frame is not None:
        owner = owner_of_file(frame.f_code.co_filename)
        if owner is not None:
            return owner
        frame = frame.f_back
    return None
