# SPDX-License-Identifier: Apache-2.0
"""The state of a run in a directory: `training.safetensors` and `training.json`.

The tensors are fp32 masters, moments and averages of the trained parameters, whole whatever they
were sharded into: `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `ema.NAME`. The JSON says
which step they belong to and what they go on with. The directory appears complete or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_unified.adapt.masters import Masters
from sparse_unified.adapt.sharding import gather, local_rows, num_processes, this_process
from sparse_unified.checkpoint.atomic import atomic_directory
from sparse_unified.checkpoint.reader import read_json
from sparse_unified.checkpoint.safetensors_file import as_bytes, read_header, read_tensor
from sparse_unified.checkpoint.writer import FileWriter, build_header, write_text

TENSORS, FACTS = "training.safetensors", "training.json"
FORMAT, FORMAT_VERSION = "sparse_unified.training", 1
# What may change when a run goes on: how a step is computed, and how far it goes, so that a run
# which diverges can go on with smaller steps.
_FREE = ("checkpointing", "optimizer_device")
_STEP_SIZE = ("learning_rate", "min_learning_rate", "max_grad_norm")
_log = logging.getLogger(__name__)


def save_state(
    directory: str | os.PathLike[str], masters: Masters, facts: Mapping[str, Any]
) -> None:
    """Writes the state of a run; every process takes part, the first one writes.

    Args:
        directory: to make; it must not exist.
        masters: the tensors. facts: what the JSON says beside the format.

    Raises:
        ValueError: the directory exists. RuntimeError: writing failed, or a tensor is not finite;
            nothing is left.
    """
    if this_process():
        for key in masters.state():
            _whole(masters, key)
        dist.barrier()
        return
    entries = [
        (key, torch.float32, tuple(masters.parameters[_parameter(key)].shape))
        for key in masters.state()
    ]
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts}
    with atomic_directory(directory, what="adapt") as partial:
        with FileWriter(partial / TENSORS, build_header(entries), lambda _: None) as writer:
            for key, _, _ in entries:
                whole = _whole(masters, key)
                require_finite(whole, f"adapt: {key}")
                writer.write(as_bytes(whole))
        write_text(partial / FACTS, json.dumps(content, indent=2) + "\n")
    if num_processes() > 1:
        dist.barrier()


def load_state(
    directory: str | os.PathLike[str], masters: Masters, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills the state of a run from what `save_state` wrote; each process reads its own part.

    Args:
        facts: of the run that goes on; all but its step must be as in the file.

    Returns:
        The facts of the file.

    Raises:
        ValueError: a file is missing or damaged, or of another run; nothing is filled.
    """
    found = read_facts(directory)
    _refuse_other_run(Path(directory) / FACTS, found, facts)
    path = Path(directory) / TENSORS
    specs = read_header(path).tensors
    targets = masters.state()
    wanted = {key: tuple(masters.parameters[_parameter(key)].shape) for key in targets}
    held = {key: spec.shape for key, spec in specs.items() if spec.dtype == torch.float32}
    if held != wanted:
        wrong = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
        raise ValueError(
            f"{path}: tensors must be the state of the {len(masters.parameters)} trained "
            f"parameters, got another {wrong[0]}"
            + (f" and {len(wrong) - 1} more" * (len(wrong) > 1))
        )
    for key, target in targets.items():
        rows = local_rows(masters.parameters[_parameter(key)])
        spec = specs[key] if rows is None else specs[key].rows(*rows)
        target.copy_(read_tensor(spec, what=f"{path}: {key}"))
    masters.restored(found["step"])
    return found


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raises RuntimeError if a tensor that is to be written holds NaN or infinity."""
    # A sum reads the tensor once and keeps NaN and infinity; it can also overflow.
    if not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise RuntimeError(f"{what} must be finite to be written, got NaN or infinity")


def read_facts(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what the JSON of a saved state says.

    Raises:
        ValueError: there is none, or of another format.
    """
    path = Path(directory) / FACTS
    found = read_json(path)
    form = found.get("format"), found.get("format_version")
    if form != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path}: format must be {FORMAT} {FORMAT_VERSION}, got {form!r:.120}")
    if type(found.get("step")) is not int or found["step"] < 0:
        raise ValueError(
            f"{path}: step must be an integer of at least 0, got {found.get('step')!r:.120}"
        )
    return found


def _refuse_other_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
        config = facts.get("config")
        own = config if isinstance(config, Mapping) else {}
        return {
            key: value
            for key, value in {**facts, **own}.items()
            if key not in ("config", "step", "format", "format_version", *_FREE)
        }

    before, now = flat(found), flat(json.loads(json.dumps(wanted)))
    if now.get("schedule") == "constant":
        before.pop("steps", None)
        now.pop("steps", None)
    for name in now:
        if before.get(name) != now[name]:
            if name in _STEP_SIZE:
                _log.warning("adapt: %s is now %s, was %s", name, now[name], before.get(name))
                continue
            raise ValueError(
                f"{path}: {name} must be that of the run that goes on, {now[name]!r}, "
                f"got {before.get(name)!r:.120}"
            )


def _parameter(key: str) -> str:
    """Returns the name of the parameter that a tensor of the state belongs to."""
    return key.partition(".")[2]


def _whole(masters: Masters, key: str) -> torch.Tensor:
    whole = gather(masters.parameters[_parameter(key)], masters.state()[key])
    return whole.detach().cpu().contiguous()
