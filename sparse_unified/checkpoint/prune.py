# SPDX-License-Identifier: Apache-2.0
"""Checkpoint -> smaller checkpoint: neurons, heads and layers are left out, nothing is computed.

As in `convert`, files are written front to back and appear together; of a tensor that gets smaller
a few megabytes at a time are in memory.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_unified._common import Progress, Report, format_bytes, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.atomic import atomic_directory, refuse_overlap
from sparse_unified.checkpoint.counts import Counts, count_tensors, format_counts
from sparse_unified.checkpoint.files import copy_files, list_files, require_room
from sparse_unified.checkpoint.held import kept_channels
from sparse_unified.checkpoint.index import rewrite_indices
from sparse_unified.checkpoint.layout import CONFIG
from sparse_unified.checkpoint.modes import Mode
from sparse_unified.checkpoint.moves import read_words, row_blocks
from sparse_unified.checkpoint.prune_plan import WHAT, PrunePlan, plan_pruning
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.recipe import RECIPE, Recipe
from sparse_unified.checkpoint.safetensors_file import TensorSpec
from sparse_unified.checkpoint.scores import Scores
from sparse_unified.checkpoint.surroundings import require_surroundings
from sparse_unified.checkpoint.writer import ByteCounter, FileWriter, build_header, write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCheckpoint(Report):
    """What `prune` wrote.

    Attributes:
        steps: what the recipe gained, as in `sparse_unified.json`.
        before, after: `{component: Counts}` of the decoder layers.
        bytes_before, bytes_written: of the whole directory.
    """

    out: str
    steps: tuple[dict[str, Any], ...]
    before: dict[str, Counts]
    after: dict[str, Counts]
    bytes_before: int
    bytes_written: int
    seconds: float
    summary: tuple[str, ...]

    def to_text(self) -> str:
        size = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_written)}"
        rows = [("written", self.out), *(("step", line) for line in self.summary)]
        rows += [("size", size), ("time", f"{self.seconds:.1f} s")]
        tables = [
            f"{component}\n{format_counts(self.before[component], self.after[component])}"
            for component in self.before
        ]
        return "\n\n".join([format_table(rows), *tables])


def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    modes: Mode | Sequence[Mode],
    *,
    scores: Scores | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> PrunedCheckpoint:
    """Writes a smaller version of a checkpoint directory.

    What stays, stays bit for bit and keeps its order; layers keep their numbers, and a part that is
    skipped has no keys. The steps are added to the recipe, `sparse_unified.json`, which
    `from_pretrained`, `info`, `verify` and later steps read. The result computes what the live
    transforms of the same configs compute, bit for bit. The directory appears complete or not at
    all.

    Args:
        model: the model directory, dense, sparse or pruned already.
        out: the directory to make; it must not exist.
        modes: PruneWidthConfig, PruneHeadsConfig or SkipLayersConfig, one or several in order. Of a
            sparse FFN every expert becomes as narrow as the others.
        scores: importance of neurons [I] (of a sparse FFN in expert order) or groups of heads [G]:
            `{layer: scores}`, a tensor [num_layers, I], a mapping of "gen", "und", "gen.heads",
            "und.heads" to either, or a safetensors file (see `sparse_unified.checkpoint.scores`).
            Without scores and seed, both are ranked by weight magnitude.
        seed: rank at random instead.
        progress: called with (bytes written, bytes in all).

    Returns:
        a report of what was written, with what each component costs before and after.

    Raises:
        ValueError: an argument or the checkpoint is not as described; nothing is written.
        TypeError: a mode is none that prunes.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(model)
    refuse_overlap(out, source.directory, scores, what=WHAT)
    listed = list(modes) if isinstance(modes, Sequence) else [modes]
    if not listed:
        raise ValueError(f"{WHAT}: modes must name at least one, got none")
    moe = source.moe  # refuses whatever disagrees
    require_surroundings(source)
    plan = plan_pruning(source, listed, scores=scores, seed=seed)
    kept = _kept(source, plan)
    shapes = {
        key: _shape(source.spec(key), part) for key, part in kept.items() if part is not False
    }
    headers = {
        name: build_header(
            [(key, source.spec(key).dtype, shapes[key]) for key in header.tensors if key in shapes],
            header.metadata,
        )
        for name, header in source.headers.items()
        if any(key in shapes for key in header.tensors)
    }
    specs = source.specs
    data_bytes = sum(math.prod(shape) * specs[key].dtype.itemsize for key, shape in shapes.items())
    recipe = (source.recipe or Recipe()).then(*plan.steps)
    texts = {RECIPE: recipe.to_json()} | _config_text(source, plan)
    removed = sum(spec.nbytes for spec in specs.values()) - data_bytes
    indices = rewrite_indices(
        source, {key: [key] if key in shapes else [] for key in specs}, -removed
    )
    texts |= {name: new for name, (_, new) in indices.items()}
    others = list_files(source.directory, skip={*source.headers, *texts}, what=WHAT)
    total = data_bytes + sum(8 + len(header.encode()) for header in headers.values())
    total += sum(file.nbytes for file in others)
    counter = ByteCounter(total, progress)

    with atomic_directory(out, what=WHAT) as partial:
        require_room(partial, total, what=WHAT)
        copy_files(others, partial, rename={}, advance=counter.advance)
        for name, text in headers.items():
            with FileWriter(partial / name, text, counter.advance) as writer:
                for key, spec in source.headers[name].tensors.items():
                    _write(writer, spec, kept[key])
        for name, text in texts.items():
            write_text(partial / name, text)
        # A last look through the reader's eyes, before the directory gets its name.
        written = Checkpoint(partial)
        if written.held != plan.after or (moe is None and written.moe is not None):
            raise RuntimeError(f"{WHAT}: {partial} must read as it was planned, got something else")
    top_k = None if moe is None else moe.top_k
    sizes = [file.nbytes for file in list_files(source.directory, skip=(), what=WHAT)]
    return PrunedCheckpoint(
        out=str(out),
        steps=tuple(step.to_dict() for step in plan.steps),
        before={
            name: count_tensors(
                {key: (spec.dtype, spec.shape) for key, spec in specs.items()}, name, top_k=top_k
            )
            for name in keys.FFN_NAMES
        },
        after={
            name: count_tensors(
                {key: (specs[key].dtype, shape) for key, shape in shapes.items()},
                name,
                top_k=top_k,
            )
            for name in keys.FFN_NAMES
        },
        bytes_before=sum(sizes),
        bytes_written=counter.done + sum(len(text.encode()) for text in texts.values()),
        seconds=time.perf_counter() - start,
        summary=tuple(step.to_text() for step in plan.steps),
    )


Kept = tuple[int, np.ndarray] | bool


def _kept(source: Checkpoint, plan: PrunePlan) -> dict[str, Kept]:
    return {key: _kept_index(source, plan, key, spec.shape) for key, spec in source.specs.items()}


def _kept_index(source: Checkpoint, plan: PrunePlan, key: str, shape: Sequence[int]) -> Kept:
    """Says what stays of one tensor.

    Returns:
        True when all of it does, False when nothing does, else (dimension, kept indices).
    """
    match = keys.LAYER_KEY.fullmatch(key)
    if match is None:
        return True
    layer, component = int(match[1]), keys.component_of(match[2])
    old, new = plan.before[component].get(layer), plan.after[component].get(layer)
    if old is None or new is None:
        return True
    module = match[2].rpartition(".")[0]
    modules = [(keys.attention_modules, new.has_attention), (keys.ffn_modules, new.width > 0)]
    for names, stays in modules:
        if match[2].startswith(tuple(f"{name}." for name in names(component))) and not stays:
            return False
    ffn = keys.find_ffn_key(key)
    if ffn is not None:
        neurons = plan.neurons.get((component, layer))
        if neurons is None:
            return True
        start, stop = _neurons_of(source, *ffn)
        if start == stop:
            return True
        own = neurons[(neurons >= start) & (neurons < stop)] - start
        return (1 if "down_proj" in ffn[2] else 0), own
    if not module.startswith("self_attn."):
        return True
    name = module.removeprefix("self_attn.").removesuffix(keys.SUFFIXES["gen"])
    if name not in keys.ATTENTION_PROJECTIONS:
        return True
    return kept_channels(old, new, name, shape)


def _neurons_of(source: Checkpoint, component: str, layer: int, rest: str) -> tuple[int, int]:
    """Returns which neurons of a FFN a tensor holds, a half-open range; routers hold none."""
    width = source.ffns[component][layer].intermediate_size
    if keys.DENSE_KEY.fullmatch(rest):
        return 0, width
    assert source.moe is not None
    layout = source.moe.expert_layout(component, layer)
    if keys.SHARED_KEY.fullmatch(rest):
        return layout.shared_range()
    expert = keys.EXPERT_KEY.fullmatch(rest)
    return (0, 0) if expert is None else layout.expert_range(int(expert[1]))


def _shape(spec: TensorSpec, kept: Kept) -> tuple[int, ...]:
    if isinstance(kept, bool):
        return spec.shape
    dim, index = kept
    return (*spec.shape[:dim], len(index), *spec.shape[dim + 1 :])


def _write(writer: FileWriter, spec: TensorSpec, kept: Kept) -> None:
    if kept is False:
        return
    if kept is True:
        writer.copy(spec)
        return
    dim, index = kept
    for block in _blocks(spec, dim, index):
        writer.write(block)


def _blocks(spec: TensorSpec, dim: int, index: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the kept rows or columns of a tensor, a few megabytes of it at a time."""
    if len(spec.shape) == 1:
        yield read_words(spec)[index]
        return
    for top, bottom in row_blocks(spec):
        words = read_words(spec.rows(top, bottom))
        if dim == 1:
            yield np.take(words, index, axis=1)
            continue
        inside = index[(index >= top) & (index < bottom)]
        if len(inside):
            yield words[inside - top]


def _config_text(source: Checkpoint, plan: PrunePlan) -> dict[str, str]:
    """Returns llm_config.json where sparse layers went and it has to say so."""
    fields: dict[str, Any] = {}
    moe = source.moe
    for component, layers in (moe.layers if moe is not None else {}).items():
        left = [layer for layer in layers if plan.after[component][layer].width]
        if len(left) < len(layers):
            fields[keys.TRANSFORMED[component]] = left or False
    if not fields:
        return {}
    return {CONFIG: json.dumps(source.llm_config | fields, indent=2, ensure_ascii=False) + "\n"}
