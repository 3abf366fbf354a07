# SPDX-License-Identifier: Apache-2.0
"""doctor and tune: which kernels are right on this machine, and which are fastest."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from sparse_unified import doctor
from sparse_unified._common import Report
from sparse_unified.cli.console import Output, show_progress
from sparse_unified.cli.options import Flags

_FLAGS = """
--device NAME   cpu, cuda or cuda:N (default: cuda where torch finds one)
--stall N       seconds that a check, or a size to tune, may take
"""


def _given(options: argparse.Namespace) -> dict[str, Any]:
    stall = {} if options.stall is None else {"stall": float(options.stall)}
    return {"device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"), **stall}


def add_doctor(flags: Flags) -> None:
    flags.table(_FLAGS)
    flags.table("--reset  forget what was found out about the device, and end")


def run_doctor(options: argparse.Namespace) -> Report:
    """Runs every kernel family of a device against the references, and times it beside dense.

    Forward and backward, compiled and captured, in child processes: a fault there harms nothing.
    A family that fails is left out from then on, and the next one runs. Exit status 1 when one
    failed. Ends with the sentence to quote in an issue.
    """
    given = _given(options)
    if options.reset:
        forgotten = doctor.reset(given["device"])
        text = "\n".join(f"forgot {entry}" for entry in forgotten) or "nothing was kept"
        return Output(text=text, document={"forgot": forgotten})
    with show_progress(options, "doctor", "family") as progress:
        return doctor.examine(**given, progress=progress)


def add_tune(flags: Flags) -> None:
    flags.table("MODEL  a model directory with sparse FFNs")
    flags.table(_FLAGS)
    flags.table("--tokens N,N  numbers of tokens (default: 256,1024,4096)")


def run_tune(options: argparse.Namespace) -> Report:
    """Times the variants of the expert kernels for the sizes of MODEL, and keeps the winners.

    Forward and backward, each in a child process, for a few numbers of tokens; the kernels' own
    choice stays where no variant is 2 % faster. `doctor --reset` forgets the winners.
    """
    with show_progress(options, "tune", "size") as progress:
        tokens = {"tokens": options.tokens} if options.tokens else {}
        return doctor.tune(options.model, **_given(options), **tokens, progress=progress)
