# SPDX-License-Identifier: Apache-2.0
"""Which parts of a checkpoint are smaller than in another one, and whether they are parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_unified._common import format_layers, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.held import Held, Layers, kept_channels, whole_layers
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.safetensors_io import read_words
from sparse_unified.convert.matching import expert_ranges, find_bijection
from sparse_unified.experts import ExpertLayout

_SHOWN = 40  # characters of a list of removed units in a table


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
class Change:
    """One part of one layer that differs: what the layer holds of it here, and there."""

    component: str
    layer: int
    part: str
    here: Held
    there: Held

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

    def nbytes(self, source: Checkpoint) -> int:
        """Returns the bytes of the part in a checkpoint."""
        prefixes = self.prefixes()
        return sum(spec.nbytes for key, spec in source.specs.items() if key.startswith(prefixes))


def find_changes(here: Checkpoint, there: Checkpoint) -> list[Change]:
    """Returns the parts of which `here` holds less than `there`, in the order of layers."""
    if here.held is None:
        return []
    base: Layers = there.held if there.held is not None else whole_layers(there.llm_config)
    changes = []
    for component, layers in here.held.items():
        for layer, held in layers.items():
            old = base.get(component, {}).get(layer)
            if old is None:
                continue
            parts = {
                "ffn": held.width < old.width,
                "query heads": set(held.reads) < set(old.reads),
                "key heads": set(held.keys) < set(old.keys),
            }
            if not held.has_attention:
                parts["key heads"] = False  # one entry says that all of the attention is skipped
            changes += [
                Change(component=component, layer=layer, part=part, here=held, there=old)
                for part, differs in parts.items()
                if differs and _is_there(there, component, layer, part)
            ]
    return changes


def judge_change(
    here: Checkpoint,
    there: Checkpoint,
    change: Change,
    indices: Mapping[tuple[str, int], np.ndarray | None],
) -> PrunedVerdict:
    """Checks that what is left of a part is there in the other checkpoint, bit for bit.

    Args:
        indices: neuron_index of the layers whose experts were compared already.
    """
    problems: list[str] = []
    if change.part == "ffn":
        total = change.there.width
        removed: Sequence[int] = range(total)
        at = (change.component, change.layer)
        if change.here.width and at in indices:
            index = indices[at]
        elif change.here.width:
            index, problems = _match_neurons(here, there, *at)
        else:
            index = np.empty(0, dtype=np.int64)
        kept = change.here.width
        removed = () if index is None else sorted(set(range(total)) - set(index.tolist()))
    else:
        groups = change.part == "query heads"
        old, new = ((held.reads if groups else held.keys) for held in (change.there, change.here))
        total, kept = len(old), len(new)
        removed = [place for place, head in enumerate(old) if head not in new]
        problems = _compare_heads(here, there, change) if kept else []
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


def pruned_table(verdicts: Sequence[PrunedVerdict]) -> str:
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


def _is_there(there: Checkpoint, component: str, layer: int, part: str) -> bool:
    """Tells whether the file holds the part at all; one may hold FFNs alone."""
    if part == "ffn":
        return layer in there.ffns.get(component, {})
    prefix = keys.module_prefixes(layer, keys.attention_modules(component))[1]
    return f"{prefix}weight" in there.specs


def _match_neurons(
    here: Checkpoint, there: Checkpoint, component: str, layer: int
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs the neurons of a FFN that is dense on both sides or sparse on both."""
    layouts: list[ExpertLayout | None] = []
    for side in (here, there):
        sparse = side.moe is not None and layer in side.moe.layers.get(component, {})
        layouts.append(side.moe.expert_layout(component, layer) if sparse and side.moe else None)
    own, other = layouts
    if (own is None) != (other is None):
        kinds = ["dense" if layout is None else "sparse" for layout in layouts]
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
    ranges = expert_ranges(layout)
    numbers = [-1 if expert is None else expert for expert, _, _ in ranges]
    return np.repeat(numbers, [stop - start for _, start, stop in ranges])


def _compare_heads(here: Checkpoint, there: Checkpoint, change: Change) -> list[str]:
    problems = []
    found = here.specs
    for key, spec in there.specs.items():
        if not key.startswith(change.prefixes()):
            continue
        name = key.removeprefix(keys.layer_prefix(change.layer)).split(".")[1]
        name = name.removesuffix(keys.SUFFIXES[change.component])
        own = found.get(key)
        kept = kept_channels(change.there, change.here, name, spec.shape)
        assert not isinstance(kept, bool)
        dim, index = kept
        shape = (*spec.shape[:dim], len(index), *spec.shape[dim + 1 :])
        if own is None or (own.dtype, own.shape) != (spec.dtype, shape):
            got = "nothing" if own is None else f"{own.dtype} {list(own.shape)}"
            problems.append(f"{key}: must be {spec.dtype} {list(shape)}, got {got}")
            continue
        differs = np.take(read_words(spec), index, axis=dim) != read_words(own)
        if differs.any():
            channel = int(np.argwhere(differs)[0][dim])
            problems.append(f"{key}: must be equal, got another value in channel {channel}")
    return problems
