# SPDX-License-Identifier: Apache-2.0
"""Small models and data for the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_cases import GOLDEN
from safetensors.torch import load_file

from sparse_unified.adapt import SequenceConfig, Trainer, TrainingConfig, freeze
from sparse_unified.adapt.data import generation_sequence, understanding_sequence
from sparse_unified.adapt.run import read_log
from sparse_unified.bagel import Bagel
from sparse_unified.bagel.packing import Segment
from sparse_unified.testing import build_model, read_case

CONFIG: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "ema_decay": 0.9,
}


def bagel(case: str = "t2i_moe", dtype: torch.dtype = torch.float32) -> Bagel:
    return build_model(read_case(GOLDEN / case)).to(dtype)


class Mixed:
    """Five sequences, pictures to generate and pictures to answer about in turn."""

    def __init__(self, model: Bagel) -> None:
        self.config = model.config

    def __len__(self) -> int:
        return 5

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        own = torch.Generator().manual_seed(index)
        special = self.config.special_tokens
        patch, pixels = self.config.latent_patch_size, self.config.vision.patch_size
        if index % 2:
            image = torch.randn(3, 2 * pixels, pixels, generator=own)
            return understanding_sequence(special, [image], [20 + index, 21], [30, 31 + index])
        channels = self.config.token_channels // patch**2
        latent = torch.randn(channels, 2 * patch, 2 * patch, generator=own)
        config = SequenceConfig(text_dropout=0.5)
        return generation_sequence(special, [11 + index, 12], latent, generator, config)


# Of a run whose routers start as conversion leaves them: zeros, so that all experts tie.
FRESH: dict[str, Any] = {
    **{"steps": 8, "learning_rate": 1e-4},
    **{"balance_weight": 0.1, "z_weight": 0.1, "distill_weight": 0.5},
}


def trainer(
    stage: str = "expert_frozen",
    dtype: torch.dtype = torch.float32,
    *,
    is_fresh: bool = False,
    **changes: Any,
) -> Trainer:
    model = bagel(dtype=dtype)
    freeze(model, stage)
    for name, parameter in model.named_parameters():
        if is_fresh and ".gate" in name and "proj" not in name:
            torch.nn.init.zeros_(parameter)
    return Trainer(model, Mixed(model), TrainingConfig(**(CONFIG | changes)))


def losses(trainer: Trainer, steps: int | None = None) -> list[float]:
    left = trainer.config.steps - trainer.steps_done if steps is None else steps
    return [trainer.step().loss for _ in range(left)]


def logged(out: Path) -> list[float]:
    """Returns the losses that the run to a directory logged."""
    return [line["loss"] for line in read_log(Path(f"{out}.training") / "log.jsonl")]


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of the state that one process wrote."""
    files = [load_file(path) for path in directory.glob("*.safetensors")]
    return {key: tensor for tensors in files for key, tensor in tensors.items()}


def picture(seed: int, height: int = 32, width: int = 40) -> bytes:
    """Returns the bytes of a PNG of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def records() -> list[dict[str, Any]]:
    """Returns six records, pictures as bytes: captions, three questions, one edit."""
    found: list[dict[str, Any]] = []
    for number in range(6):
        record: dict[str, Any] = {"image": picture(number), "text": f"picture {number}"}
        if number % 2:
            record |= {"question": "which number?", "answer": str(number)}
        if number == 4:
            record["source"] = picture(0)
        found.append(record)
    return found


def write_folder(folder: Path) -> Path:
    """Writes the records as files and a .jsonl file."""
    folder.mkdir()
    lines = []
    for number, record in enumerate(records()):
        for name in ("image", "source"):
            if name in record:
                path = folder / f"{number}-{name}.png"
                path.write_bytes(record[name])
                record[name] = path.name
        lines.append(json.dumps(record))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path) -> Path:
    import datasets

    folder.mkdir()
    kinds = dict.fromkeys(("text", "question", "answer"), datasets.Value("string"))
    kinds |= dict.fromkeys(("image", "source"), datasets.Image())
    rows = {name: [record.get(name) for record in records()] for name in kinds}
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    for number in range(2):
        whole.shard(2, number, contiguous=True).to_parquet(folder / f"{number}.parquet")
    return folder
