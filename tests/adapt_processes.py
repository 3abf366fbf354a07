# SPDX-License-Identifier: Apache-2.0
"""What the tests of sharded training run in each of two processes.

Usage: python adapt_processes.py RANK PORT PORT DIRECTORY DTYPE...; the first process writes
`result.json`.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapt_models import losses, trainer, write_folder

from sparse_unified.cli import main as command

COMMAND = {"--steps": "2", "--batch-size": "4", "--micro-batch-size": "2", "--lr": "1e-3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(rank: int, ports: list[str], directory: Path, names: list[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in names:
        dtype = DTYPES[name]
        # A state of one process, from before, goes on in two; and theirs goes on in one.
        sharded = trainer(dtype=dtype)
        found[name] = losses(sharded, 2)
        sharded.save(directory / f"two-{name}")
        found[name] += losses(sharded)
        resumed = trainer(dtype=dtype)
        resumed.load(directory / f"one-{name}")
        found[f"{name} from one"] = losses(resumed)
        resumed = trainer(dtype=dtype)
        resumed.load(directory / f"two-{name}")
        found[f"{name} from two"] = losses(resumed)
        found[f"{name} norm"] = sharded.step().grad_norm
        local = sum(t.nbytes for t in sharded.optimizer.state().values())
        found[f"{name} state"] = local
    if rank == 0:
        (directory / "result.json").write_text(json.dumps(found))
        write_folder(directory / "data")
    dist.barrier()
    dist.destroy_process_group()

    # As torchrun starts the command.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": ports[1]}
    arguments = [
        "adapt",
        str(directory / "model"),
        str(directory / "sharded"),
        *chain(*COMMAND.items()),
    ]
    status = command([*arguments, "--checkpoint-every", "1", "--data", str(directory / "data")])
    assert status == 0, status


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:4], Path(sys.argv[4]), sys.argv[5:])
