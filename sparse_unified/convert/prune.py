# SPDX-License-Identifier: Apache-2.0
"""Checkpoint -> smaller checkpoint: neurons, heads and layers are left out, nothing is computed.

What goes is planned by `surgery.cuts` from headers and scores alone, and cut from the files here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_unified._common import Progress, Report, StrPath, context, format_bytes
from sparse_unified.bagel.hub import CARD, write_card
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import check_target, json_text, list_files
from sparse_unified.checkpoint.keys import Counts, count_tensors, format_counts
from sparse_unified.checkpoint.model_dir import CONFIG, Checkpoint, LayerShape
from sparse_unified.checkpoint.modes import (
    RECIPE,
    Mode,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    Step,
    recipe_text,
)
from sparse_unified.checkpoint.rewrite import GONE as NOTHING
from sparse_unified.checkpoint.rewrite import Edit, gather, index_texts, rewrite
from sparse_unified.checkpoint.scores import Scores, rank_file
from sparse_unified.experts.keep import select_layers
from sparse_unified.surgery.cuts import GONE, Cuts, PruneConfig, plan, sizes_left, then

Shapes = dict[str, dict[int, LayerShape]]
Sizes = Mapping[str, tuple[int, ...]]


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

    def table(self) -> Sequence[Sequence[object]]:
        size = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_written)}"
        steps = [("step", line) for line in self.summary]
        return [("written", self.out), *steps, ("size", size), ("time", f"{self.seconds:.1f} s")]

    def notes(self) -> Sequence[str]:
        tables = [
            f"{component}\n{format_counts(before, self.after[component])}"
            for component, before in self.before.items()
        ]
        return "\n\n".join(tables).splitlines()


@context("prune")
def prune(
    model: StrPath,
    out: StrPath,
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

    Example:
        >>> config = PruneWidthConfig(component="gen", keep_ratio=0.5)  # doctest: +SKIP
        >>> prune("BAGEL-7B-MoT", "BAGEL-half", config)  # doctest: +SKIP
    """
    start = time.perf_counter()
    source = Checkpoint(model)
    check_target(out, source.directory, scores)
    listed = list(modes) if isinstance(modes, Sequence) else [modes]
    if not listed:
        raise ValueError("modes must name at least one, got none")
    cuts, after, steps = _plan(source, listed, scores, seed)
    sizes = {key: spec.shape for key, spec in source.specs.items()}
    left = sizes_left(sizes, cuts)
    edits = {}
    for key, cut in cuts.items():
        spec = source.spec(key)
        if cut is GONE:
            edits[key] = NOTHING
        elif left[key] != spec.shape:
            blocks = partial(gather, [spec], cut.dim, [cut.keep.numpy()])
            edits[key] = Edit(entries=((key, spec.dtype, left[key]),), blocks=blocks)
    texts = {RECIPE: recipe_text((*source.recipe, *steps))}
    fields: dict[str, Any] = {}
    for component, layers in source.experts.items():
        sparse = [layer for layer in layers if after[component][layer].width]
        if len(sparse) < len(layers):
            fields[keys.TRANSFORMED[component]] = sparse or False
    if fields:
        texts[CONFIG] = json_text(source.llm_config | fields)
    texts |= index_texts(source, edits)

    def finish(directory: Path) -> None:
        # The result must read as planned before it gets its name.
        written = Checkpoint(directory)
        if written.shapes != after or (not source.experts and written.experts):
            raise RuntimeError(f"{directory} must read as it was planned, got something else")
        if (directory / CARD).exists():  # of the source
            write_card(directory, name=Path(out).name, source_name=source.directory.name)

    rewrite(source, out, edits, texts, finish=finish, progress=progress)
    before, now = (
        {name: count_tensors(source.specs, own, name, source.top_k) for name in keys.FFN_NAMES}
        for own in (sizes, left)
    )
    return PrunedCheckpoint(
        out=str(out),
        steps=tuple(step.to_dict() for step in steps),
        before=before,
        after=now,
        bytes_before=sum(s.st_size for s in list_files(source.directory).values()),
        bytes_written=sum(s.st_size for s in list_files(Path(out)).values()),
        seconds=time.perf_counter() - start,
        summary=tuple(step.to_text() for step in steps),
    )


def _plan(
    source: Checkpoint, modes: Sequence[Mode], scores: Scores | None, seed: int | None
) -> tuple[Cuts, Shapes, list[Step]]:
    """Plans modes one after the other; returns all cuts, what they leave, and the steps."""
    shapes: Shapes = {component: dict(own) for component, own in source.shapes.items()}
    sizes: Sizes = {key: spec.shape for key, spec in source.specs.items()}
    cuts: Cuts = {}
    steps: list[Step] = []
    ranked: set[str] = set()
    for config in modes:
        if not isinstance(config, PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig):
            raise TypeError(
                "modes must be PruneWidthConfig, PruneHeadsConfig or SkipLayersConfig, "
                f"got {type(config).__name__}"
            )
        is_heads = isinstance(config, PruneHeadsConfig)
        layers = _select(source, shapes, config)
        own = {component: {n: by[n] for n in layers} for component, by in shapes.items()}
        values: dict[tuple[str, int], Tensor] = {}
        origin = None
        for component in () if isinstance(config, SkipLayersConfig) else config.components:
            # Scores are those of the file, so that each part of it is ranked once.
            name = f"{config.mode} of {component}"
            if name in ranked:
                raise ValueError(
                    f"modes must name the {name} once; prune the result again, got it twice"
                )
            ranked.add(name)
            if is_heads:
                _check_heads(source, component, layers)
            scores_of, origin = rank_file(
                source, component, layers, heads=is_heads, scores=scores, seed=seed
            )
            values |= {(component, layer): scores_of(layer) for layer in layers}
        more, left = plan(config, own, sizes, lambda *at, values=values: values[at])
        for component, by_layer in left.items():
            shapes[component] |= by_layer
        sizes, cuts = sizes_left(sizes, more), then(cuts, more)
        step = Step(config=replace(config, layers=layers), scores=origin)
        if isinstance(config, PruneWidthConfig):
            widths = {n: shape.width for n, shape in left[config.component].items()}
            step = replace(step, widths=widths)
        elif is_heads:
            step = replace(step, heads={n: _heads(left, n) for n in layers})
        steps.append(step)
    return cuts, shapes, steps


def _select(source: Checkpoint, shapes: Shapes, config: PruneConfig) -> tuple[int, ...]:
    """Returns the layers of a mode; "all" and "middle" pass over those that lack what is cut."""
    parts: tuple[str, ...] = ("ffn",)
    name = "FFN"
    if isinstance(config, PruneHeadsConfig):
        parts, name = ("attention",), "attention"
    elif isinstance(config, SkipLayersConfig):
        parts, name = config.parts, f"{config.part.value} left"

    def has(layer: int) -> bool:
        found = []
        for component in config.components:
            shape = shapes[component][layer]
            query = f"{keys.layer_prefix(layer)}{keys.attention_modules(component)[1]}.weight"
            held = {"ffn": shape.width > 0}
            held["attention"] = shape.has_attention and query in source.specs
            found += [held[part] for part in parts]
        return any(found) if isinstance(config, SkipLayersConfig) else all(found)

    what = f"{' and '.join(config.components)} {name}"
    return select_layers(config.layers, source.num_layers, has, what)


def _check_heads(source: Checkpoint, component: str, layers: Sequence[int]) -> None:
    """Raises ValueError unless projections have the heads that config and recipe count."""
    for layer in layers:
        shape = source.shapes[component][layer]
        query, key, _, _, norm = (
            source.spec(f"{keys.layer_prefix(layer)}{module}.weight").shape[0]
            for module in keys.attention_modules(component)[1:6]
        )
        if key != len(shape.kv_heads) * norm or query % (len(shape.query_groups) * norm):
            raise ValueError(
                f"{CONFIG}: num_key_value_heads must be what the attention of {component} layer "
                f"{layer} has, {len(shape.kv_heads)} of {norm} channels, got {key} channels"
            )


def _heads(shapes: Shapes, layer: int) -> dict[str, tuple[int, ...]]:
    own = {component: by_layer[layer] for component, by_layer in shapes.items()}
    kv_heads = max((shape.kv_heads for shape in own.values()), key=len)
    return {"keys": kv_heads} | {name: shape.query_groups for name, shape in own.items()}
