# SPDX-License-Identifier: Apache-2.0
"""Trains again and again in child processes that are killed; run by test_adapt_run.

Usage: adapt_kill.py MODEL DATA ROOT CALLS, where each child dies CALLS calls later than the one
before it. Prints one JSON object: the losses that the run which was
killed most often logged, and how many children died. Children are forked from a process that has
not run a torch op yet.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from adapt_models import logged
from disk_faults import die_at_call, fork

from sparse_unified._common import optional
from sparse_unified.adapt import RunConfig, TrainingConfig, adapt
from sparse_unified.adapt import run as adapt_run

FIRST_CALL = 9
CONFIG = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-3, seed=5)


def run(model: Path, data: Path, root: Path, calls: int) -> dict[str, object]:
    # Children need not import these each by itself.
    for module in ("transformers.models.auto.tokenization_auto", "PIL.Image", "PIL.PngImagePlugin"):
        optional(module)
    out, killed, wait = root / "out", 0, adapt_run.wait_for_all

    def train(number: int) -> str:
        torch.set_num_threads(1)
        # Reading the model is over by then.
        adapt_run.wait_for_all = lambda: (wait(), die_at_call(number))[0]
        adapt(
            model, out, data, CONFIG, RunConfig(checkpoint_every=1, keep=1, resume=True, workers=0)
        )
        return "done"

    # Of the calls that reach the disk, each child makes a few more than the one before it; those
    # that resume have fewer to make.
    while not out.exists():
        answer = fork(partial(train, FIRST_CALL + calls * killed))[1]()
        assert answer in ("done", "killed"), answer
        killed += answer == "killed"
    return {"killed": killed, "losses": logged(out)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(*map(Path, sys.argv[1:4]), int(sys.argv[4]))) + "\n")
