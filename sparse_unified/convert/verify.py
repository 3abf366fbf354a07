# SPDX-License-Identifier: Apache-2.0
"""Proof that a checkpoint is its dense one, reordered or pruned: from the weights, not the sidecar.

Which layers and heads are gone is what the recipe says and the keys confirm; which neurons are gone
is found out from the bytes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparse_unified._common import Progress, Report, format_layers, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.safetensors_io import read_words
from sparse_unified.checkpoint.shapes import LayerShape, ffn_parts
from sparse_unified.convert.compare import (
    ByteCounter,
    compare_configs,
    compare_files,
    compare_outputs,
    compare_specs,
    compare_tensors,
    find_bijection,
)
from sparse_unified.experts import ExpertLayout
from sparse_unified.surgery.cuts import Cut, spread

WHAT = "verify"
_SHOWN = 40  # characters of a list of removed units in a table


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVerdict:
    """What was found out about one sparse layer.

    Attributes:
        bijection: the neurons of the experts are the dense neurons, bit for bit, each once.
        max_error: largest difference to the dense FFN in fp64, with top_k = E and routers at zero;
            None when there is no bijection to run, or it is not finite.
        tolerance: the most it may be: twice the dense FFN's own error, and 1e-5.
        routers: "zero", or "set": by a conversion that was asked to, or by training.
        problems: what is wrong, naming expert and neuron; empty when all is well.
    """

    component: str
    layer: int
    ok: bool
    bijection: bool
    max_error: float | None
    tolerance: float | None
    routers: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedVerdict:
    """What was found out about one part that got smaller.

    Attributes:
        part: "ffn", "query heads" (in groups) or "key heads".
        kept, total: neurons, groups or heads.
        removed: which are gone, by their place in the checkpoint that is compared with.
        problems: what is wrong; empty when all that is left is there bit for bit.
    """

    component: str
    layer: int
    part: str
    kept: int
    total: int
    removed: tuple[int, ...]
    ok: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport(Report):
    """The verdict on a checkpoint, layer by layer and over all other tensors.

    Attributes:
        layers: sparse FFNs.
        pruned: parts that have become smaller or are skipped.
    """

    sparse: str
    against: str
    ok: bool
    layers: tuple[LayerVerdict, ...]
    pruned: tuple[PrunedVerdict, ...]
    tensors_compared: int
    problems: tuple[str, ...]
    seconds: float

    def to_text(self) -> str:
        rows: list[tuple[object, ...]] = [
            ("layer", "bijection", "max error", "tolerance", "routers", "verdict")
        ]
        for verdict in self.layers:
            error, tolerance = (
                "-" if value is None else f"{value:.2e}"
                for value in (verdict.max_error, verdict.tolerance)
            )
            rows.append(
                (
                    f"{verdict.component} {verdict.layer}",
                    "bit-exact" if verdict.bijection else "NO",
                    error,
                    tolerance,
                    verdict.routers,
                    "ok" if verdict.ok else "FAILED",
                )
            )
        lines = [format_table(rows, header=True), ""] if self.layers else []
        if self.pruned:
            lines += [_pruned_table(self.pruned), ""]
        for part in self.pruned:
            lines += [
                f"{part.component} layer {part.layer} {part.part}, {p}" for p in part.problems
            ]
        for verdict in self.layers:
            lines += [f"{verdict.component} layer {verdict.layer}, {p}" for p in verdict.problems]
        lines += self.problems
        lines.append(f"{self.tensors_compared} other tensors compared byte by byte")
        what = "a part" if self.pruned else "a reordering"
        lines.append(
            f"{self.sparse} {'is' if self.ok else 'IS NOT'} {what} of {self.against} "
            f"({self.seconds:.1f} s)"
        )
        return "\n".join(lines)


def verify(
    sparse: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a sparse or pruned checkpoint against the dense one it should come from.

    For each sparse layer: the neurons of the experts are a bijection of the dense ones, bit for
    bit, and with top_k = E and routers at zero the block computes what the dense FFN computes. Of
    a pruned layer, the neurons and heads that are left are dense ones bit for bit, each once, and
    those that are gone are listed. Every other tensor, `ae.safetensors`, `vit_config.json`,
    `config.json`, the tokenizer and the other fields of `llm_config.json` are the same, and neither
    directory has one of these files alone. The sidecar is not consulted.

    Args:
        sparse, against: the two model directories.
        seed: of the random tokens of the numeric check.
        progress: called with (bytes checked, bytes in all).

    Returns:
        a report; `ok` is False when anything differs.

    Raises:
        ValueError: a directory cannot be read as a checkpoint, or there is nothing to compare.
        RuntimeError: a file changed while it was read.
    """
    start = time.perf_counter()
    left, right = Checkpoint(sparse), Checkpoint(against)
    pairs = [
        (component, layer)
        for component, layers in left.experts.items()
        for layer in layers
        if (ffn := right.ffns.get(component, {}).get(layer)) is not None and ffn.layout is None
    ]
    changes = _find_changes(left, right)
    if not pairs and not changes:
        raise ValueError(
            f"{WHAT}: {sparse} must have sparse layers that are dense in {against}, or pruned "
            f"ones, got {'none that are dense there' if left.experts else 'a dense checkpoint'}"
        )
    prefixes = (
        *(keys.ffn_prefix(component, layer) for component, layer in pairs),
        *(prefix for change in changes for prefix in change.prefixes()),
    )
    kept, wanted = (
        {key: spec for key, spec in side.specs.items() if not key.startswith(prefixes)}
        for side in (left, right)
    )
    counter = ByteCounter(sum(spec.nbytes for spec in right.specs.values()), progress)

    verdicts = []
    pruned = []
    indices: dict[tuple[str, int], np.ndarray | None] = {}
    for component, layer in pairs:
        verdict, indices[component, layer] = _judge_experts(left, right, component, layer, seed)
        verdicts.append(verdict)
        for name in keys.PROJECTIONS:
            counter.advance(right.spec(keys.dense_key(component, layer, name)).nbytes)
    for change in changes:
        pruned.append(_judge_change(left, right, change, indices))
        if (change.component, change.layer) not in pairs:
            own = change.prefixes()
            counter.advance(
                sum(spec.nbytes for key, spec in right.specs.items() if key.startswith(own))
            )
    problems = [
        *compare_specs(kept, wanted),
        *compare_tensors(kept, wanted, counter),
        *compare_files(left, right),
        *compare_configs(left, right),
    ]
    left.refuse_change()
    right.refuse_change()
    return VerifyReport(
        sparse=str(sparse),
        against=str(against),
        ok=not problems and all(v.ok for v in verdicts) and all(v.ok for v in pruned),
        layers=tuple(verdicts),
        pruned=tuple(pruned),
        tensors_compared=len(kept.keys() & wanted.keys()),
        problems=tuple(problems),
        seconds=time.perf_counter() - start,
    )


def _judge_experts(
    sparse: Checkpoint, dense: Checkpoint, component: str, layer: int, seed: int
) -> tuple[LayerVerdict, np.ndarray | None]:
    """Judges a layer that is sparse here and dense there; returns its neuron_index as well."""
    layout = sparse.experts[component][layer]
    ffns = sparse.ffns[component][layer], dense.ffns[component][layer]
    narrower = sparse.left is not None and ffns[0].intermediate_size < ffns[1].intermediate_size
    sizes = [(0 if narrower else f.intermediate_size, f.hidden_size, f.dtype) for f in ffns]
    routers = [
        sparse.read(keys.router_key(component, layer, name))
        for name in keys.router_names(component)
    ]
    index, problems = None, []
    error = tolerance = None
    if sizes[0] != sizes[1]:
        problems = [f"width, hidden size and dtype must be {sizes[1]}, got {sizes[0]}"]
    else:
        index, problems = find_bijection(sparse, dense, component, layer, layout)
    if not all(bool(router.float().isfinite().all()) for router in routers):
        problems.append("routers must be finite, got NaN or infinity")
    if index is not None:
        kept = np.sort(index) if narrower else None
        error, tolerance = compare_outputs(
            sparse, dense, component, layer, layout, seed=seed, kept=kept
        )
        if not error <= tolerance:
            problems.append(
                f"output with top_k = {layout.num_experts} must be within {tolerance:.2e} of the "
                f"dense FFN, got {error:.2e}"
            )
    verdict = LayerVerdict(
        component=component,
        layer=layer,
        ok=not problems,
        bijection=index is not None,
        max_error=error if error is None or math.isfinite(error) else None,
        tolerance=tolerance if tolerance is None or math.isfinite(tolerance) else None,
        routers="set" if any(bool(router.any()) for router in routers) else "zero",
        problems=tuple(problems),
    )
    return verdict, index


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """One part of one layer that is smaller: what the layer has of it here, and there."""

    component: str
    layer: int
    part: str
    here: LayerShape
    there: LayerShape

    def heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the query groups or KV heads there and here."""
        there, here = self.there, self.here
        if self.part == "query heads":
            return there.query_groups, here.query_groups
        return there.kv_heads, here.kv_heads

    def prefixes(self) -> tuple[str, ...]:
        """Returns the starts of the keys that cannot be compared as they are."""
        if self.part == "ffn":
            gone = not self.here.width
            own = keys.ffn_modules(self.component)
            return keys.module_prefixes(self.layer, own if gone else own[1:])
        if not self.here.has_attention:
            return keys.module_prefixes(self.layer, keys.attention_modules(self.component))
        names = ("q_proj", "o_proj") if self.part == "query heads" else ("k_proj", "v_proj")
        suffix = keys.SUFFIXES[self.component]
        return keys.module_prefixes(self.layer, [f"self_attn.{name}{suffix}" for name in names])


def _find_changes(here: Checkpoint, there: Checkpoint) -> list[_Change]:
    """Returns the parts of which `here` has less than `there`, in the order of layers."""
    changes: list[_Change] = []
    for component, layers in here.shapes.items() if here.left is not None else ():
        attention = keys.attention_modules(component)[1]
        for layer, own in layers.items():
            old = there.shapes.get(component, {}).get(layer)
            if old is None:
                continue
            has_attention = f"{keys.layer_prefix(layer)}{attention}.weight" in there.specs
            parts = {
                "ffn": own.width < old.width,
                "query heads": has_attention and set(own.query_groups) < set(old.query_groups),
                # Where all of the attention is skipped, one entry says so.
                "key heads": has_attention
                and own.has_attention
                and set(own.kv_heads) < set(old.kv_heads),
            }
            changes += [
                _Change(component=component, layer=layer, part=part, here=own, there=old)
                for part, is_smaller in parts.items()
                if is_smaller
            ]
    return changes


def _judge_change(
    here: Checkpoint,
    there: Checkpoint,
    change: _Change,
    indices: Mapping[tuple[str, int], np.ndarray | None],
) -> PrunedVerdict:
    """Checks that what is left of a part is there in the other checkpoint, bit for bit.

    Args:
        indices: neuron_index of the layers with experts that were compared already.
    """
    problems: list[str] = []
    if change.part == "ffn":
        at = (change.component, change.layer)
        kept, total = change.here.width, change.there.width
        index: np.ndarray | None = np.empty(0, dtype=np.int64)
        if kept and at in indices:
            index = indices[at]
        elif kept:
            index, problems = _match_neurons(here, there, *at)
        removed = [] if index is None else sorted(set(range(total)) - set(index.tolist()))
    else:
        old, new = change.heads()
        kept, total = len(new), len(old)
        removed = [place for place, head in enumerate(old) if head not in new]
        problems = _compare_heads(here, there, change) if kept else []
    if not kept:
        over = [key for key in here.specs if key.startswith(change.prefixes())]
        problems = [f"{key}: must not be there, as {RECIPE} says it is skipped" for key in over[:1]]
    return PrunedVerdict(
        component=change.component,
        layer=change.layer,
        part=change.part,
        kept=kept,
        total=total,
        removed=tuple(removed),
        ok=not problems,
        problems=tuple(problems),
    )


def _match_neurons(
    here: Checkpoint, there: Checkpoint, component: str, layer: int
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs the neurons of an FFN that is dense on both sides or sparse on both."""
    own, other = (side.experts.get(component, {}).get(layer) for side in (here, there))
    if (own is None) != (other is None):
        kinds = ["dense" if layout is None else "sparse" for layout in (own, other)]
        return None, [f"must be {kinds[1]} as there, got a {kinds[0]} FFN"]
    index, problems = find_bijection(here, there, component, layer, own, dense_layout=other)
    if index is None or own is None or other is None:
        return index, problems
    holders, origins = _holders(own), _holders(other)[index]
    moved = np.flatnonzero(holders != origins)
    if len(moved):
        problems = [
            f"{len(moved)} neurons must stay in their expert, got one of {origins[moved[0]]} "
            f"in {holders[moved[0]]}"
        ]
    for name in keys.router_names(component):
        specs = [side.spec(keys.router_key(component, layer, name)) for side in (here, there)]
        if specs[0].shape != specs[1].shape or (read_words(specs[0]) != read_words(specs[1])).any():
            problems.append(f"{name}.weight must be equal, got another")
    return index, problems


def _holders(layout: ExpertLayout) -> np.ndarray:
    """Returns the number of the expert that holds each neuron [I]; -1 is the shared one."""
    numbers = [*([-1] * bool(layout.shared_width)), *range(layout.num_experts)]
    widths = [stop - start for start, stop in ffn_parts(layout).values()]
    return np.repeat(numbers, widths)


def _compare_heads(here: Checkpoint, there: Checkpoint, change: _Change) -> list[str]:
    problems = []
    old, new = change.heads()
    places = torch.tensor([*map(old.index, new)])
    for key, spec in there.specs.items():
        if not key.startswith(change.prefixes()):
            continue
        dim = 1 if ".o_proj" in key else 0
        cut, own = Cut(dim, spread(places, spec.shape[dim] // len(old))), here.specs.get(key)
        shape = (*spec.shape[: cut.dim], len(cut.keep), *spec.shape[cut.dim + 1 :])
        if own is None or (own.dtype, own.shape) != (spec.dtype, shape):
            got = "nothing" if own is None else f"{own.dtype} {list(own.shape)}"
            problems.append(f"{key}: must be {spec.dtype} {list(shape)}, got {got}")
            continue
        differs = np.take(read_words(spec), cut.keep.numpy(), axis=cut.dim) != read_words(own)
        if differs.any():
            channel = int(np.argwhere(differs)[0][cut.dim])
            problems.append(f"{key}: must be equal, got another value in channel {channel}")
    return problems


def _pruned_table(verdicts: Sequence[PrunedVerdict]) -> str:
    """Lays out verdicts in a table; long lists of what is gone are cut."""
    rows: list[Sequence[object]] = [("layer", "part", "left", "of", "removed", "verdict")]
    for verdict in verdicts:
        removed = format_layers(verdict.removed) if verdict.kept else "all"
        if len(removed) > _SHOWN:
            removed = removed[:_SHOWN].rpartition(",")[0] + ", ..."
        rows.append(
            (
                f"{verdict.component} {verdict.layer}",
                verdict.part,
                verdict.kept,
                verdict.total,
                removed,
                "ok" if verdict.ok else "FAILED",
            )
        )
    return format_table(rows, header=True)
