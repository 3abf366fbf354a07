# SPDX-License-Identifier: Apache-2.0
"""Trains again and again in child processes that are killed; run by test_adapt_run.

Usage: adapt_kill.py MODEL DATA ROOT CALLS, where each child dies CALLS calls later than the one
before it. Prints one JSON object: the losses that the run which was
killed most often logged, and how many children died. Children are forked from a process that has
not run a torch op yet.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from adapt_models import logged
from disk_faults import die_at_call

from sparse_unified._common import optional
from sparse_unified.adapt import RunConfig, TrainingConfig, adapt
from sparse_unified.adapt import run as adapt_run

FIRST_CALL = 9
CONFIG = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-3, seed=5)


def start(model: Path, out: Path, data: Path, prepare: Callable[[], None]) -> int:
    """Forks a process that trains or goes on training, and returns its id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            wait = adapt_run.wait_for_all
            # Reading the model is over by then.
            adapt_run.wait_for_all = lambda: (wait(), prepare())[0]
            run = RunConfig(checkpoint_every=1, keep=1, resume=True)
            adapt(model, out, data, CONFIG, run)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return child


def run(model: Path, data: Path, root: Path, calls: int) -> dict[str, object]:
    # Children need not import these each by itself.
    for module in ("transformers.models.auto.tokenization_auto", "PIL.Image", "PIL.PngImagePlugin"):
        optional(module)
    out = root / "out"
    killed = 0
    # Of the calls that reach the disk, each child makes a few more than the one before it; those
    # that resume have fewer to make.
    while not out.exists():
        number = FIRST_CALL + calls * killed
        status = os.waitpid(start(model, out, data, partial(die_at_call, number)), 0)[1]
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
    return {"killed": killed, "losses": logged(out)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(*map(Path, sys.argv[1:4]), int(sys.argv[4]))) + "\n")
