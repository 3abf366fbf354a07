# SPDX-License-Identifier: Apache-2.0
"""What training writes: states to resume from, and the trained checkpoint.

A state is a directory of safetensors files as torch.distributed.checkpoint writes them, each
process its own, and `training.json`. The tensors are fp32 master weights, moments and averages of
the trained parameters, in the rows that a process holds: `master.NAME`, `exp_avg.NAME`,
`exp_avg_sq.NAME`, `ema.NAME`. The JSON says which step they belong to, the checksums of the files,
and what they go on with. Directories appear complete or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified._common import Progress, StrPath, context, list_some
from sparse_unified.adapt.optimizer import (
    Optimizer,
    as_global,
    num_processes,
    of_all_processes,
    this_process,
    wait_for_all,
)
from sparse_unified.bagel.hub import CARD, write_card
from sparse_unified.checkpoint import AdaptConfig, Checkpoint, files, safetensors_io
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.modes import RECIPE, Step, recipe_text
from sparse_unified.checkpoint.rewrite import Blocks, Edit, rewrite
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS, expert_views
from sparse_unified.surgery.lora import read_lora

WHAT = "adapt"
ADAPTATION = "adaptation.json"  # in what a run writes: its options, and how it went
FACTS, _SUFFIX = "training.json", ".safetensors"
_FORMAT = {"format": "sparse_unified.training", "format_version": 2}
_FILE_BYTES = 1 << 26  # a process holds a file twice while it writes it
# What may change when a run goes on: how a step is computed, and how far it goes, so that a run
# which diverges can go on with smaller steps.
_FREE = ("config", "step", "checkpointing", "optimizer_device")
_STEP_SIZE = ("learning_rate", "min_learning_rate", "max_grad_norm")
_log = logging.getLogger(__name__)


def save_state(directory: StrPath, optimizer: Optimizer, facts: Mapping[str, Any]) -> None:
    """Writes the state of a run; every process writes its part.

    ValueError if the directory exists; RuntimeError if writing failed or a tensor is not finite.
    """
    import torch.distributed.checkpoint as dcp

    for key, shard in optimizer.state.items():
        _refuse_not_finite(shard, f"{WHAT}: {key}")
    parts, files_of, num_bytes = _parts(optimizer), {}, 0
    for key, shard in optimizer.state.items():
        files_of[key] = 1 + num_bytes // _FILE_BYTES
        num_bytes += shard.nbytes
    files_of = of_all_processes(files_of)[0]
    with ExitStack() as stack:
        if this_process() == 0:
            stack.enter_context(files.atomic_directory(directory))
        wait_for_all()
        unfinished = files.partial_path(directory) / Path(directory).name
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), files_of, save_distributed=True)
        with _of_its_process():
            dcp.save(parts, storage_writer=writer, no_dist=num_processes() == 1)
        own = unfinished.glob(f"shard-{this_process() + 1:05}-*{_SUFFIX}")
        checksums = of_all_processes({path.name: _checksum(path) for path in own})
        if this_process() == 0:
            crc32 = {name: value for part in checksums for name, value in sorted(part.items())}
            text = json.dumps({**_FORMAT, **facts, "crc32": crc32}, indent=2)
            files.write_text(unfinished / FACTS, text + "\n")
    wait_for_all()


def load_state(
    directory: StrPath, optimizer: Optimizer, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills the state of a run; each process reads its own part. Returns what else it says.

    ValueError if a file is missing or damaged, or of another run; then nothing is filled.
    """
    import torch.distributed.checkpoint as dcp

    directory = Path(directory)
    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        found = _read_facts(directory / FACTS)
        held = sorted(path.name for path in directory.glob(f"*{_SUFFIX}"))
        if held != (wanted := sorted(found["crc32"])):
            raise ValueError(
                f"{directory}: files must be those of {FACTS}, {list_some(wanted)}, "
                f"got {list_some(held)}"
            )
        for name in [*found["crc32"]][this_process() :: num_processes()]:
            if (crc32 := _checksum(directory / name)) != found["crc32"][name]:
                raise ValueError(
                    f"{directory / name}: tensors must have the checksum {found['crc32'][name]} "
                    f"of {FACTS}, got {crc32}"
                )
    except ValueError as error:
        states = list_states(directory.parent)
        if directory not in states[1:]:
            raise
        before = states[states.index(directory) - 1]
        raise ValueError(f"{error}; remove {directory} to go on from {before}") from error
    _refuse_other_run(directory / FACTS, found, facts)
    parts = _parts(optimizer)
    own = {key: (torch.float32, part.shape) for key, part in parts.items()}
    try:
        stored: Any = reader.read_metadata().state_dict_metadata
    except Exception as error:  # of many kinds, where another program wrote the files
        raise ValueError(f"{directory}: tensors must be readable, got {error!r:.200}") from error
    got = {key: (entry.properties.dtype, entry.size) for key, entry in stored.items()}
    if got != own:
        wrong = sorted(key for key in {*got, *own} if got.get(key) != own.get(key))
        raise ValueError(
            f"{directory}: tensors must be the state of the {len(optimizer.parameters)} trained "
            f"parameters, got another {list_some(wrong, 1)}"
        )
    with _of_its_process():
        dcp.load(parts, storage_reader=reader, no_dist=num_processes() == 1)
    optimizer.restored(found["step"])
    return found


def _parts(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state as torch.distributed.checkpoint takes it: what this process has of it."""
    owners = {key: optimizer.parameters[key.partition(".")[2]] for key in optimizer.state}
    return {key: as_global(owners[key], shard) for key, shard in optimizer.state.items()}


@contextmanager
def _of_its_process() -> Iterator[None]:
    """Raises what failed in this process as it was, and DistError for what failed in another."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in a single process", UserWarning)
            yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        if this_process() in failures:
            raise failures[this_process()] from None
        rank, failure = next(iter(failures.items()))
        raise dist.DistError(f"process {rank} failed: {failure}") from None


def _checksum(path: Path) -> int:
    crc32 = 0
    with files.open_source(path) as stream:
        while chunk := stream.read(1 << 20):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def list_states(running: Path) -> list[Path]:
    """Returns the directories `step-N` of a run, oldest first."""
    found = [path for path in running.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_facts(path: Path) -> dict[str, Any]:
    """Returns what the JSON of a state says; ValueError if it is of another format or step."""
    found = files.read_json(path)
    form = {name: found.get(name) for name in _FORMAT}
    if form != _FORMAT or not files.has_form(found.get("crc32"), {str: (int,)}):
        raise ValueError(
            f"{path}: format must be {_FORMAT}, got {form!r:.120}; a run of an earlier version is "
            "finished by that version, or begun again without --resume"
        )
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


def _refuse_not_finite(tensor: Tensor, key: str) -> None:
    # A sum reads the tensor once and keeps NaN and infinity; it can also overflow.
    if not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise RuntimeError(f"{key} must be finite to be written, got NaN or infinity")


def write_adapted(
    source: Checkpoint,
    out: StrPath,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    texts: Mapping[str, str],
    progress: Progress | None = None,
    **step: Any,
) -> None:
    """Writes a checkpoint with the trained weights; every process takes part.

    See `_write_tuned`; a card of the source is written anew.
    """
    trained = _trained_tensors(model, optimizer)
    keys = [k for header in source.headers.values() for k in header.tensors if k in trained]

    def finish(written: Path) -> None:
        if (written / CARD).exists():
            write_card(written, name=Path(out).name, source_name=source.directory.name)

    if this_process() == 0:
        tuned = {key: trained[key] for key in keys}
        _write_tuned(source, out, tuned, texts=texts, finish=finish, progress=progress, **step)
    else:
        for key in keys:
            trained[key]()  # takes part in gathering it
    wait_for_all()


@context("merge_lora")
def merge_lora(
    model: StrPath, lora: StrPath, out: StrPath, *, progress: Progress | None = None
) -> list[str]:
    """Writes a checkpoint with adapters merged into its weights.

    W + s B A is computed in fp32 and rounded to the dtype of W; all else is copied, and the recipe
    gains a step.

    Args:
        model: a model directory, dense, sparse or pruned, or a hub id.
        lora: what `adapt` with a LoRA rank wrote, or peft for the official code.
        out: the directory to make; it must not exist.
        progress: called with (bytes written, bytes in all).

    Returns:
        the official keys of the weights that were changed.

    Raises:
        ValueError: model or adapters are damaged or do not fit; nothing is written.
        RuntimeError: writing failed, or a merged weight is not finite; nothing is left under `out`.
    """
    source = Checkpoint(find_model(model))
    files.check_target(out, source.directory, lora)
    adapters = read_lora(lora, {key: spec.shape for key, spec in source.specs.items()})
    path = Path(lora) / ADAPTATION
    config = files.read_json(path).get("config", {}) if path.exists() else {}
    known = {name: config[name] for name in ("component", "steps", "seed") if name in config}
    step = {"stage": "lora", "steps": None, **known}

    def merged(key: str) -> Tensor:
        return adapters[key].merged(safetensors_io.read_tensor(source.spec(key)))

    tuned = {key: partial(merged, key) for key in adapters}
    _write_tuned(source, out, tuned, texts={}, progress=progress, **step)
    return list(adapters)


def _write_tuned(
    source: Checkpoint,
    out: StrPath,
    tuned: Mapping[str, Callable[[], Tensor]],
    *,
    texts: Mapping[str, str],
    finish: Callable[[Path], object] = lambda written: None,
    progress: Progress | None,
    **step: Any,
) -> None:
    """Writes a checkpoint with other values of some tensors, by official key, or nothing.

    Tensors keep names, shapes, dtypes and files. The recipe gains a `step`, an `AdaptConfig`.
    RuntimeError if writing failed or a value is not finite.
    """

    def blocks(spec: safetensors_io.TensorSpec, key: str) -> Blocks:
        tensor = tuned[key]().to(spec.dtype)
        _refuse_not_finite(tensor, key)
        yield safetensors_io.as_bytes(tensor.contiguous())

    def look(written: Path) -> None:
        Checkpoint(written).experts  # noqa: B018  a last look through the reader's eyes
        finish(written)

    edits = {}
    for key in tuned:
        spec = source.spec(key)
        entries = ((key, spec.dtype, spec.shape),)
        edits[key] = Edit(entries=entries, blocks=partial(blocks, spec, key))
    config = AdaptConfig(layers=tuple(range(source.num_layers)), **step)
    recipe = recipe_text((*source.recipe, Step(config=config, scores=None)))
    written = {RECIPE: recipe, **texts}
    headers = source.headers
    rewrite(source, out, edits, written, headers=headers, finish=look, progress=progress)


def _trained_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Callable[[], Tensor]]:
    """Returns what reads each trained tensor, by official key; of a sparse FFN, by expert.

    All processes must read the same keys in the same order.
    """
    # The weights of one FFN are held whole while its experts are written.
    of_ffn = lru_cache(maxsize=len(PROJECTIONS))(optimizer.whole)

    def expert(parts: Sequence[str], layout: ExpertLayout, key: str) -> Tensor:
        return expert_views(layout, *map(of_ffn, parts))[key]

    parameters = optimizer.parameters
    found: dict[str, Callable[[], Tensor]] = {n: partial(optimizer.whole, n) for n in parameters}
    for block, module in model.named_modules():
        parts = [f"{block}.{part}" for part in PROJECTIONS]
        if isinstance(module, SparseMoE) and parts[0] in found:
            like = [torch.empty(parameters[part].shape, device="meta") for part in parts]
            for part in parts:
                del found[part]
            for key in expert_views(module.layout, *like):
                found[f"{block}.{key}"] = partial(expert, parts, module.layout, key)
    return found
