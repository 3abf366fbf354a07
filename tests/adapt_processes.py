# SPDX-License-Identifier: Apache-2.0
"""Two processes that train together, as torchrun starts them; `run_both` starts this file twice.

Usage: python adapt_processes.py train DIRECTORY DTYPE..., or command ARGUMENT... With FAULT=
"RANK WHAT WHEN" one of them is killed, stopped, or out of disk space in the middle of its second
step, of the state after it, or of the trained checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapt_models import FRESH, losses, trainer
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from sparse_unified.adapt import run
from sparse_unified.adapt import trainer as training
from sparse_unified.adapt.optimizer import Optimizer
from sparse_unified.cli import main as command

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_both(*arguments: str, fault: str = "", timeout: float = 600) -> list[tuple[int, str]]:
    """Returns status and output of both; when one has ended, a stopped one is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | place | {"RANK": str(rank), "FAULT": fault, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + timeout
        stopped = int(fault[0]) if " stop " in fault else None
        for rank, process in enumerate(runs):
            if rank != stopped:
                process.wait(deadline - time.monotonic())
    finally:
        for process in runs:
            if process.poll() is None:
                process.kill()
    return [(process.wait(), process.communicate()[0]) for process in runs]


def train(directory: Path, names: list[str]) -> None:
    """Goes on from states of one process, and leaves states of two; rank 0 writes the losses."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        dtype = DTYPES[name]
        sharded = trainer(dtype=dtype)
        found[name] = losses(sharded, 2)
        sharded.save(directory / f"two-{name}")
        found[name] += losses(sharded)
        for saved in ("one", "two"):
            resumed = trainer(dtype=dtype)
            resumed.load(directory / f"{saved}-{name}")
            found[f"{name} from {saved}"] = losses(resumed)
        found[f"{name} norm"] = sharded.step().grad_norm
        found[f"{name} state"] = sum(t.nbytes for t in sharded.optimizer.state.values())
    found["fresh"] = losses(trainer(is_fresh=True, micro_batch_size=1, **FRESH))
    found["evened out"] = losses(trainer(is_fresh=True, balance_rate=0.01, **FRESH))
    if dist.get_rank() == 0:
        (directory / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def plant(what: str, when: str) -> None:
    """Lets this process come to grief later."""

    def strike() -> None:
        if what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)

    def later(owner: Any, name: str, count: int, act: Any) -> None:
        original = getattr(owner, name)

        def counted(*given: Any, **options: Any) -> Any:
            nonlocal count
            count -= 1
            if count == 0:
                act()
            return original(*given, **options)

        setattr(owner, name, counted)

    def while_writing() -> None:
        later(HuggingFaceStorageWriter, "write_data", 1, strike)

    def while_gathering() -> None:
        later(Optimizer, "whole", 3, strike)

    if when == "step" and what == "full":
        later(training.StepRecord, "to_dict", 2, strike)
    elif when == "step":
        later(training.Trainer, "_update", 2, strike)
    elif when == "state":
        later(training, "save_state", 2, while_writing)
    else:
        later(run, "write_adapted", 1, while_gathering)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, *fault = os.environ["FAULT"].split() or [""]
    if rank == os.environ["RANK"]:
        plant(*fault)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(command(sys.argv[2:]))
