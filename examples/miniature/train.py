# SPDX-License-Identifier: Apache-2.0
"""The dense training of the miniature, from nothing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniature.data import training_data
from sparse_unified.adapt import Trainer, TrainingConfig
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.mini.model import MiniTask, new_model

LOG_EVERY, WRITE_EVERY = 20, 200


def _training(steps: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, batch_size=32, learning_rate=2e-3, warmup_steps=50, ema_decay=0.995
    )


# How the dense model of each task was trained that is shipped.
DENSE = {MiniTask.DIGITS: _training(1200), MiniTask.SCENES: _training(12000)}


def train_dense(
    task: MiniTask,
    out: str | os.PathLike[str],
    training: TrainingConfig | None = None,
    progress: Callable[[StepRecord], object] | None = None,
) -> Path:
    """Trains the dense model of a task and writes its average weights in bf16.

    Args:
        out: folder of `ema.safetensors`, `log.jsonl` (losses of every 20th step) and
            `training.json` (configuration, versions, seconds). The weights are also written on the
            way, every 200 steps.
        training: how; None is what the shipped weights were made by.
        progress: called after each step.

    Returns:
        `out`.
    """
    training = training or DENSE[task]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = new_model(task, training.seed)
    trainer = Trainer(model, training_data(task), training)
    start = time.perf_counter()
    with (out / "log.jsonl").open("w", encoding="utf-8") as log:

        def on_step(record: StepRecord) -> None:
            if record.step % LOG_EVERY == 0 or record.step == 1:
                line = {
                    name: round(value, 5) if isinstance(value, float) else value
                    for name, value in record.to_dict().items()
                    if name not in ("balance_loss", "router_z_loss")
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
            if record.step % WRITE_EVERY == 0:
                _write_weights(trainer, out)
            if progress is not None:
                progress(record)

        trainer.run(on_step)
    _write_weights(trainer, out)
    about = {
        "task": task.value,
        "command": f"python examples/miniature train {task.value} OUT",
        "training": asdict(training),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "sparse_unified": version("sparse_unified"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return out


def _write_weights(trainer: Trainer, out: Path) -> None:
    averages = trainer.model.state_dict() | (trainer.optimizer.ema or {})  # of a dense model
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in averages.items()}
    temporary = out / "ema.safetensors.part"
    save_file(tensors, temporary)
    temporary.replace(out / "ema.safetensors")
