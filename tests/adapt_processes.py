# SPDX-License-Identifier: Apache-2.0
"""What the tests of sharded training run in each of two processes.

Usage: python adapt_processes.py RANK PORT DIRECTORY; the first process writes `result.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapt_models import losses, trainer, write_folder

from sparse_unified.adapt import RunConfig, TrainingConfig, adapt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(rank: int, port: str, directory: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
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
        local = sum(t.nbytes for t in sharded.masters.state().values())
        found[f"{name} state"] = local
    data = directory / "data"
    if rank == 0:
        write_folder(data)
    dist.barrier()
    config = TrainingConfig(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
    report = adapt(
        directory / "model", directory / "sharded", data, config, RunConfig(checkpoint_every=1)
    )
    found["adapt"] = report.last_loss
    if rank == 0:
        (directory / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
