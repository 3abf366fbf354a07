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
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import Progress, StrPath, list_some
from sparse_unified.adapt.optimizer import Optimizer, gather, local_rows, this_process, wait_for_all
from sparse_unified.checkpoint import AdaptConfig, Checkpoint, files, safetensors_io
from sparse_unified.checkpoint.modes import RECIPE, Step, recipe_text
from sparse_unified.checkpoint.rewrite import Blocks, Edit, rewrite
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views

WHAT = "adapt"
TENSORS, FACTS = "training.safetensors", "training.json"
_FORMAT = {"format": "sparse_unified.training", "format_version": 1}
# What may change when a run goes on: how a step is computed, and how far it goes, so that a run
# which diverges can go on with smaller steps.
_FREE = ("config", "step", "checkpointing", "optimizer_device")
_STEP_SIZE = ("learning_rate", "min_learning_rate", "max_grad_norm")
_log = logging.getLogger(__name__)


def save_state(directory: StrPath, optimizer: Optimizer, facts: Mapping[str, Any]) -> None:
    """Writes the state of a run; every process takes part, the first one writes.

    ValueError if the directory exists; RuntimeError if writing failed or a tensor is not finite.
    """
    owners = {key: optimizer.parameters[key.partition(".")[2]] for key in optimizer.state}
    whole = ((key, gather(owners[key], shard)) for key, shard in optimizer.state.items())
    if this_process():
        for _ in whole:  # takes part in gathering it
            pass
    else:
        header = safetensors_io.build_header(
            [(k, torch.float32, tuple(p.shape)) for k, p in owners.items()]
        )
        checksum = 0
        with files.atomic_directory(directory) as unfinished:
            with files.create_file(unfinished / TENSORS) as target:
                files.write_all(target, safetensors_io.encode_header(header))
                for key, tensor in whole:
                    data = _finite_bytes(tensor, key)
                    checksum = zlib.crc32(data, checksum)
                    files.write_all(target, data)
            text = json.dumps({**_FORMAT, **facts, "crc32": checksum}, indent=2)
            files.write_text(unfinished / FACTS, text + "\n")
    wait_for_all()


def load_state(directory: StrPath, optimizer: Optimizer, facts: Mapping[str, Any]) -> int:
    """Fills the state of a run; each process reads its own part. Returns the step of the state.

    ValueError if a file is missing or damaged, or of another run; then nothing is filled.
    """
    directory = Path(directory)
    path = directory / TENSORS
    try:
        found = _read_facts(directory / FACTS)
        specs = safetensors_io.read_header(path).tensors
        checksum = found.get("crc32")  # states of earlier versions have none
        if checksum is not None and this_process() == 0:
            _check_bytes(path, min((spec.start for spec in specs.values()), default=0), checksum)
    except ValueError as error:
        states = list_states(directory.parent)
        if directory not in states[1:]:
            raise
        before = states[states.index(directory) - 1]
        raise ValueError(f"{error}; remove {directory} to go on from {before}") from error
    _refuse_other_run(directory / FACTS, found, facts)
    owners = {key: optimizer.parameters[key.partition(".")[2]] for key in optimizer.state}
    wanted = {key: (torch.float32, tuple(owner.shape)) for key, owner in owners.items()}
    held = {key: (spec.dtype, spec.shape) for key, spec in specs.items()}
    if held != wanted:
        wrong = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
        raise ValueError(
            f"{path}: tensors must be the state of the {len(optimizer.parameters)} trained "
            f"parameters, got another {list_some(wrong, 1)}"
        )
    for key, target in optimizer.state.items():
        rows = local_rows(owners[key])
        target.copy_(
            safetensors_io.read_tensor(specs[key] if rows is None else specs[key].rows(*rows))
        )
    step: int = found["step"]
    optimizer.restored(step)
    return step


def list_states(running: Path) -> list[Path]:
    """Returns the directories `step-N` of a run, oldest first."""
    found = [path for path in running.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_facts(path: Path) -> dict[str, Any]:
    """Returns what the JSON of a state says; ValueError if it is of another format or step."""
    found = files.read_json(path)
    form = {name: found.get(name) for name in _FORMAT}
    if form != _FORMAT:
        raise ValueError(f"{path}: format must be {_FORMAT}, got {form!r:.120}")
    step, name = found.get("step"), path.parent.name
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(f"{path}: step must be an integer of at least 0, got {step!r:.120}")
    if name.startswith("step-") and name != f"step-{step}":
        raise ValueError(f"{path}: step must be that of {name}, got {step}")
    return found


def _refuse_other_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    config = found.get("config")
    before = {**found, **(config if isinstance(config, Mapping) else {})}
    now = json.loads(json.dumps({**wanted, **wanted.get("config", {})}))
    free = (*_FREE, "steps") if now.get("schedule") == "constant" else _FREE
    for name, value in now.items():
        if name in free or before.get(name, value) == value:  # earlier versions lack some
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
        while chunk := stream.read(1 << 20):
            found = zlib.crc32(chunk, found)
    if found != checksum:
        raise ValueError(
            f"{path}: tensors must have the checksum {checksum!r:.80} of {FACTS}, got {found}"
        )


def _finite_bytes(tensor: Tensor, key: str) -> Any:
    """Returns the bytes of a tensor that is to be written; refuses NaN and infinity."""
    # A sum reads the tensor once and keeps NaN and infinity; it can also overflow.
    if not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise RuntimeError(f"{WHAT}: {key} must be finite to be written, got NaN or infinity")
    return safetensors_io.as_bytes(tensor.cpu().contiguous())


def write_adapted(
    source: Checkpoint,
    out: StrPath,
    model: nn.Module,
    optimizer: Optimizer,
    config: AdaptConfig,
    *,
    texts: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint with the trained weights, their averages where such are kept.

    Tensors keep names, shapes, dtypes and files. The recipe gains a step. Every process takes part;
    the first one writes. The directory appears complete or not at all; RuntimeError if writing
    failed or a trained weight is not finite.
    """
    trained = _trained_tensors(model, optimizer)
    keys = [k for header in source.headers.values() for k in header.tensors if k in trained]
    if this_process():
        for key in keys:
            trained[key]()  # takes part in gathering it
    else:

        def blocks(key: str, spec: safetensors_io.TensorSpec) -> Blocks:
            yield _finite_bytes(trained[key]().to(spec.dtype), key)

        edits = {}
        for key in keys:
            spec = source.spec(key)
            entries = ((key, spec.dtype, spec.shape),)
            edits[key] = Edit(entries=entries, blocks=partial(blocks, key, spec))
        step = Step(config=config, scores=None)
        rewrite(
            source,
            out,
            edits,
            {RECIPE: recipe_text((*source.recipe, step)), **texts},
            headers=source.headers,
            # A last look through the reader's eyes.
            finish=lambda unfinished: Checkpoint(unfinished).experts,
            progress=progress,
        )
    wait_for_all()


def _trained_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Callable[[], Tensor]]:
    """Returns what reads each trained tensor, by official key; of a sparse FFN, by expert.

    All processes must read the same keys in the same order.
    """
    weights = optimizer.weights if optimizer.ema is None else optimizer.ema
    parameters = optimizer.parameters

    def whole(name: str) -> Tensor:
        return gather(parameters[name], weights[name]).detach().cpu()

    # The weights of one FFN are held whole while its experts are written.
    of_ffn = lru_cache(maxsize=len(PROJECTIONS))(whole)

    def expert(parts: Sequence[str], layout: ExpertLayout, key: str) -> Tensor:
        return expert_views(layout, *map(of_ffn, parts))[key]

    found: dict[str, Callable[[], Tensor]] = {name: partial(whole, name) for name in parameters}
    for block, module in model.named_modules():
        parts = [f"{block}.{part}" for part in PROJECTIONS]
        if isinstance(module, SparseMoE) and parts[0] in found:
            like = [torch.empty(parameters[part].shape, device="meta") for part in parts]
            for part in parts:
                del found[part]
            for key in expert_views(module.layout, *like):
                found[f"{block}.{key}"] = partial(expert, parts, module.layout, key)
    return found
