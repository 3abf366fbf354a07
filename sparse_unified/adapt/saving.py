# SPDX-License-Identifier: Apache-2.0
"""What training writes: states to resume from, and the trained checkpoint.

A state is a directory of `training.safetensors` and `training.json`. The tensors are fp32 master
weights, moments and averages of the trained parameters, whole whatever they were sharded into:
`master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `ema.NAME`. The JSON says which step they belong
to, their checksum, and what they go on with. Directories appear complete or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import Progress
from sparse_unified.adapt.optimizer import (
    Optimizer,
    gather,
    local_rows,
    this_process,
    wait_for_all,
)
from sparse_unified.checkpoint import AdaptConfig, Checkpoint
from sparse_unified.checkpoint.files import (
    atomic_directory,
    create_file,
    read_json,
    write_all,
    write_text,
)
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.rewrite import Blocks, Edit, rewrite
from sparse_unified.checkpoint.safetensors_io import (
    TensorSpec,
    as_bytes,
    build_header,
    encode_header,
    read_header,
    read_tensor,
)
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views

WHAT = "adapt"
TENSORS, FACTS = "training.safetensors", "training.json"
_FORMAT, _FORMAT_VERSION = "sparse_unified.training", 1
# What may change when a run goes on: how a step is computed, and how far it goes, so that a run
# which diverges can go on with smaller steps.
_FREE = ("checkpointing", "optimizer_device")
_STEP_SIZE = ("learning_rate", "min_learning_rate", "max_grad_norm")
_CHUNK_BYTES = 8 << 20
_log = logging.getLogger(__name__)


def save_state(
    directory: str | os.PathLike[str], optimizer: Optimizer, facts: Mapping[str, Any]
) -> None:
    """Writes the state of a run; every process takes part, the first one writes.

    Args:
        directory: to make; it must not exist.
        optimizer: whose state it is. facts: what the JSON says beside format and checksum.

    Raises:
        ValueError: the directory exists. RuntimeError: writing failed, or a tensor is not finite;
            nothing is left.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, shard in optimizer.state().items():
            yield key, gather(optimizer.parameters[_parameter(key)], shard).cpu().contiguous()

    if this_process():
        for _ in tensors():  # takes part in gathering them
            pass
    else:
        entries = [
            (key, torch.float32, tuple(optimizer.parameters[_parameter(key)].shape))
            for key in optimizer.state()
        ]
        checksum = 0
        with atomic_directory(directory, what=WHAT) as partial:
            with create_file(partial / TENSORS) as target:
                write_all(target, encode_header(build_header(entries)))
                for key, tensor in tensors():
                    data = _finite_bytes(tensor, key)
                    checksum = zlib.crc32(data, checksum)
                    write_all(target, data)
            header = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
            content = {**header, **facts, "crc32": checksum}
            write_text(partial / FACTS, json.dumps(content, indent=2) + "\n")
    wait_for_all()


def load_state(
    directory: str | os.PathLike[str], optimizer: Optimizer, facts: Mapping[str, Any]
) -> int:
    """Fills the state of a run from what `save_state` wrote; each process reads its own part.

    Args:
        facts: of the run that goes on; all but step and step size must be as in the file.

    Returns:
        The step of the state.

    Raises:
        ValueError: a file is missing or damaged, or of another run; nothing is filled.
    """
    found = read_facts(directory)
    _refuse_other_run(Path(directory) / FACTS, found, facts)
    path = Path(directory) / TENSORS
    specs = read_header(path).tensors
    targets = optimizer.state()
    wanted = {key: tuple(optimizer.parameters[_parameter(key)].shape) for key in targets}
    held = {key: spec.shape for key, spec in specs.items() if spec.dtype == torch.float32}
    if held != wanted:
        wrong = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
        raise ValueError(
            f"{path}: tensors must be the state of the {len(optimizer.parameters)} trained "
            f"parameters, got another {wrong[0]}"
            + (f" and {len(wrong) - 1} more" * (len(wrong) > 1))
        )
    checksum = found.get("crc32")  # states of earlier versions have none
    if checksum is not None and this_process() == 0:
        _check_bytes(path, min((spec.start for spec in specs.values()), default=0), checksum)
    for key, target in targets.items():
        rows = local_rows(optimizer.parameters[_parameter(key)])
        spec = specs[key] if rows is None else specs[key].rows(*rows)
        target.copy_(read_tensor(spec, what=f"{path}: {key}"))
    step: int = found["step"]
    optimizer.restored(step)
    return step


def read_facts(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what the JSON of a saved state says.

    Raises:
        ValueError: there is none, or of another format.
    """
    path = Path(directory) / FACTS
    found = read_json(path)
    form = found.get("format"), found.get("format_version")
    if form != (_FORMAT, _FORMAT_VERSION):
        raise ValueError(f"{path}: format must be {_FORMAT} {_FORMAT_VERSION}, got {form!r:.120}")
    if type(found.get("step")) is not int or found["step"] < 0:
        raise ValueError(
            f"{path}: step must be an integer of at least 0, got {found.get('step')!r:.120}"
        )
    return found


def _refuse_other_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
        config = facts.get("config")
        values = {**facts, **(config if isinstance(config, Mapping) else {})}
        return {name: v for name, v in values.items() if name not in ("config", "step", *_FREE)}

    before, now = flat(found), flat(json.loads(json.dumps(wanted)))
    if now.get("schedule") == "constant":
        before.pop("steps", None)
        now.pop("steps", None)
    for name, value in now.items():
        if before.get(name) == value:
            continue
        if name not in _STEP_SIZE:
            raise ValueError(
                f"{path}: {name} must be that of the run that goes on, {value!r}, "
                f"got {before.get(name)!r:.120}"
            )
        _log.warning("%s: %s is now %s, was %s", WHAT, name, value, before.get(name))


def _check_bytes(path: Path, start: int, checksum: object) -> None:
    found = 0
    with path.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    if found != checksum:
        raise ValueError(
            f"{path}: tensors must have the checksum {checksum!r:.80} of {FACTS}, got {found}; "
            "the file is damaged, and can be removed with its directory to go on from an "
            "earlier state"
        )


def _parameter(key: str) -> str:
    """Returns the name of the parameter that a tensor of the state belongs to."""
    return key.partition(".")[2]


def _finite_bytes(tensor: Tensor, key: str) -> Any:
    """Returns the bytes of a tensor that is to be written; refuses NaN and infinity."""
    # A sum reads the tensor once and keeps NaN and infinity; it can also overflow.
    if not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise RuntimeError(f"{WHAT}: {key} must be finite to be written, got NaN or infinity")
    return as_bytes(tensor)


def write_adapted(
    source: Checkpoint,
    out: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    config: AdaptConfig,
    *,
    texts: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint with the trained weights, their averages where such are kept.

    Tensors keep names, shapes, dtypes and files. The recipe gains a step. Every process takes part;
    the first one writes. The directory appears complete or not at all.

    Args:
        source: the checkpoint that the model was loaded from.
        out: the directory to make; it must not exist.
        model: the trained model, sharded or not. optimizer: that trained it.
        config: what the recipe says.
        texts: further files, by name.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: the target exists. RuntimeError: writing failed, or a trained weight is not
            finite; nothing is left under `out`.
    """
    trained = _TrainedTensors(model, optimizer)
    headers = source.headers
    if this_process():
        for header in headers.values():
            for key in header.tensors:
                if key in trained:
                    trained.read(key)  # takes part in gathering it
        wait_for_all()
        return
    recipe = (source.recipe or Recipe()).then(Step(config=config, scores=None, tool=tool_version()))

    def edit(key: str, spec: TensorSpec) -> Edit:
        def blocks() -> Blocks:
            yield _finite_bytes(trained.read(key).to(spec.dtype).contiguous(), key)

        return Edit(entries=((key, spec.dtype, spec.shape),), blocks=blocks)

    rewrite(
        source,
        out,
        {key: edit(key, spec) for key, spec in source.specs.items() if key in trained},
        {RECIPE: recipe.to_json(), **texts},
        what=WHAT,
        headers=headers,
        # A last look through the reader's eyes.
        finish=lambda partial: Checkpoint(partial).experts,
        progress=progress,
    )
    wait_for_all()


class _TrainedTensors:
    """The trained weights of a model under their official keys; of a sparse FFN, by expert.

    All processes must read the same keys in the same order.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        weights = optimizer.weights if optimizer.ema is None else optimizer.ema
        parameters = optimizer.parameters
        self._blocks = {
            name: block
            for name, block in model.named_modules()
            if isinstance(block, SparseMoE) and f"{name}.{PROJECTIONS[0]}" in parameters
        }
        fused = {f"{name}.{part}" for name in self._blocks for part in PROJECTIONS}
        self._plain = set(parameters) - fused

        def whole(name: str) -> Tensor:
            return gather(parameters[name], weights[name]).detach().cpu()

        # The weights of one FFN are held whole while its experts are written.
        @lru_cache(maxsize=1)
        def experts(name: str) -> dict[str, Tensor]:
            gate, up, down = (whole(f"{name}.{part}") for part in PROJECTIONS)
            return expert_views(self._blocks[name].layout, gate, up, down)

        self._whole, self._experts = whole, experts

    def __contains__(self, key: str) -> bool:
        return key in self._plain or self._block_of(key) is not None

    def read(self, key: str) -> Tensor:
        """Returns the tensor of a trained key, on the CPU."""
        name = self._block_of(key)
        return self._whole(key) if name is None else self._experts(name)[key[len(name) + 1 :]]

    def _block_of(self, key: str) -> str | None:
        for part in (".experts.", ".shared_expert."):
            name, found, _ = key.partition(part)
            if found and name in self._blocks:
                return name
        return None
