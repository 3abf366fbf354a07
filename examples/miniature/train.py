# SPDX-License-Identifier: Apache-2.0
"""The dense training of the miniature, from nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniature.data import MiniDataset
from miniature.vision import train_vision_
from sparse_unified.adapt import Trainer, TrainingConfig
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.mini.model import new_model

LOG_EVERY, WRITE_EVERY = 100, 500


# How the dense models that are shipped were trained, but for their seeds.
DENSE = TrainingConfig(
    steps=12000, batch_size=64, learning_rate=1.5e-3, warmup_steps=200, ema_decay=0.998
)


def train_dense(
    out: str | os.PathLike[str],
    training: TrainingConfig = DENSE,
    progress: Callable[[StepRecord], object] | None = None,
) -> Path:
    """Trains a dense model, its eyes first, and writes its average weights in bf16.

    Args:
        out: folder of `ema.safetensors`, `log.jsonl` (losses of every 100th step) and
            `training.json` (configuration, versions). The weights are also written every 500 steps,
            with a state that an interrupted run goes on from, exactly.
        training: how; its seed is that of the initial weights, too.
        progress: called after each step.

    Returns:
        `out`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = new_model(training.seed)
    seen = train_vision_(model, seed=training.seed)
    trainer = Trainer(model, MiniDataset(), training)
    log = out / "log.jsonl"
    if (states := sorted(out.glob("state-*"))) and states[-1].is_dir():
        trainer.load(states[-1])
        lines = log.read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= trainer.steps_done]
        log.write_text("".join(f"{line}\n" for line in kept))
    else:
        log.write_text("")

    def on_step(record: StepRecord) -> None:
        if record.step % LOG_EVERY == 0 or record.step == 1:
            line = {
                name: round(value, 5) if isinstance(value, float) else value
                for name, value in record.to_dict().items()
                if name not in ("balance_loss", "router_z_loss")
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if record.step % WRITE_EVERY == 0:
            _write_weights(trainer, out)
            before = sorted(out.glob("state-*"))
            trainer.save(out / f"state-{record.step:06d}")
            for old in before:
                shutil.rmtree(old)
        if progress is not None:
            progress(record)

    trainer.run(on_step)
    _write_weights(trainer, out)
    about = {
        "command": f"python examples/miniature train OUT --seed {training.seed}",
        "training": asdict(training),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cells_seen_right_before": seen,
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
