# SPDX-License-Identifier: Apache-2.0
"""Proof from the bytes alone that the neurons of a layer are those of a dense one.

They may be reordered into experts, and fewer where the layer was pruned.

The bytes of each neuron (gate row, up row, down column) are hashed on both sides, neurons with the
same hashes are paired, and every pair is then compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.rewrite import row_blocks
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_words
from sparse_unified.experts import ExpertLayout

_COLUMNS = 512
_MAX_PROBLEMS = 3

# One list per projection, one digest per neuron.
Digests = tuple[list[bytes], ...]


def expert_ranges(layout: ExpertLayout) -> list[tuple[int | None, int, int]]:
    """Returns (expert, start, stop) in expert order; the shared expert is None and comes first."""
    ranges: list[tuple[int | None, int, int]] = []
    if layout.shared_width:
        ranges.append((None, *layout.shared_range()))
    ranges += [(expert, *layout.expert_range(expert)) for expert in range(layout.num_experts)]
    return ranges


def find_bijection(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout | None,
    *,
    dense_layout: ExpertLayout | None = None,
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs every neuron of a layer with a dense neuron of its own that has the same bytes.

    Args:
        layout: of the experts; None where the layer is dense, as one that was made narrower.
        dense_layout: the same of the other side, whose neurons are then counted in expert order.

    Returns:
        neuron_index [I] int64 (None when there is no such pairing), and a sentence for the first
        few neurons that differ, which names expert and neuron.
    """
    here, there = (
        tuple(_part_digests(side, component, layer, name, own) for name in keys.PROJECTIONS)
        for side, own in ((sparse, layout), (dense, dense_layout))
    )
    index, problems = _pair(there, here, layout)
    if index is None:
        return None, problems
    problems = list(_compare(sparse, dense, component, layer, (layout, dense_layout), index))
    return (None, problems) if problems else (index, [])


def _parts(
    sparse: Checkpoint, component: str, layer: int, projection: str, layout: ExpertLayout | None
) -> list[tuple[TensorSpec, int, int]]:
    """Returns (tensor, first neuron, end) of each tensor that a projection is made of."""
    if layout is None:
        spec = sparse.spec(keys.dense_key(component, layer, projection))
        return [(spec, 0, spec.shape[1 if projection == "down_proj" else 0])]
    return [
        (sparse.spec(keys.expert_key(component, layer, expert, projection)), start, stop)
        for expert, start, stop in expert_ranges(layout)
    ]


def _part_digests(
    sparse: Checkpoint, component: str, layer: int, projection: str, layout: ExpertLayout | None
) -> list[bytes]:
    digests: list[bytes] = []
    for spec, _, _ in _parts(sparse, component, layer, projection, layout):
        digests += _digests(read_words(spec), projection)
    return digests


def _digests(words: np.ndarray, projection: str) -> Iterator[bytes]:
    """Yields the hash of each neuron: of each row, or of each column of down_proj."""
    if projection != "down_proj":
        yield from (blake2b(row.data, digest_size=16).digest() for row in words)
        return
    for start in range(0, words.shape[1], _COLUMNS):
        columns = np.ascontiguousarray(words[:, start : start + _COLUMNS].T)
        yield from (blake2b(column.data, digest_size=16).digest() for column in columns)


def _pair(
    dense: Digests, sparse: Digests, layout: ExpertLayout | None
) -> tuple[np.ndarray | None, list[str]]:
    free: dict[tuple[bytes, ...], list[int]] = {}
    for neuron, key in enumerate(zip(*dense, strict=True)):
        free.setdefault(key, []).append(neuron)
    for neurons in free.values():
        neurons.reverse()  # so that pop() gives equal neurons out in dense order

    index = np.full(len(sparse[0]), -1, dtype=np.int64)
    holders: dict[tuple[bytes, ...], str] = {}
    problems: list[str] = []
    num_wrong = 0
    for position, key in enumerate(zip(*sparse, strict=True)):
        name = _name(layout, position)
        if free.get(key):
            index[position] = free[key].pop()
            holders[key] = name
            continue
        num_wrong += 1
        if len(problems) < _MAX_PROBLEMS:
            reason = (
                f"its dense neuron is held by {holders[key]} already"
                if key in holders
                else _explain(dense, key)
            )
            problems.append(f"{name}: must be a dense neuron of its own, but {reason}")
    if not num_wrong:
        return index, []
    unused = [neuron for neurons in free.values() for neuron in neurons]
    problems.append(
        f"{num_wrong} of {len(index)} neurons differ; dense neuron {min(unused)} is the first of "
        f"{len(unused)} that no expert holds"
    )
    return None, problems


def _explain(dense: Digests, key: tuple[bytes, ...]) -> str:
    """Says which dense neuron each projection of an unmatched neuron comes from, if any."""
    parts = []
    for name, digests, digest in zip(keys.PROJECTIONS, dense, key, strict=True):
        origin = f"of dense neuron {digests.index(digest)}" if digest in digests else "unknown"
        parts.append(f"{name} is {origin}")
    return ", ".join(parts)


def _name(layout: ExpertLayout | None, position: int) -> str:
    if layout is None:
        return f"neuron {position}"
    if position < layout.shared_width:
        return f"shared expert, neuron {position}"
    expert, neuron = divmod(position - layout.shared_width, layout.expert_width)
    return f"expert {expert}, neuron {neuron}"


def _compare(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layouts: tuple[ExpertLayout | None, ExpertLayout | None],
    index: np.ndarray,
) -> Iterator[str]:
    """Yields a sentence for each pair of equal hashes whose bytes differ after all."""
    layout, dense_layout = layouts
    for projection in keys.PROJECTIONS:
        wanted = [spec for spec, _, _ in _parts(dense, component, layer, projection, dense_layout)]
        parts = _parts(sparse, component, layer, projection, layout)
        if projection == "down_proj":
            for top, bottom in row_blocks(parts[0][0]):
                rows = [read_words(spec.rows(top, bottom)) for spec in wanted]
                block = np.take(np.concatenate(rows, axis=1), index, axis=1)
                for part, start, stop in parts:
                    differs = (block[:, start:stop] != read_words(part.rows(top, bottom))).any(
                        axis=0
                    )
                    for neuron in np.flatnonzero(differs):
                        yield f"{_name(layout, start + int(neuron))}: {projection} must be equal"
            continue
        words = np.concatenate([read_words(spec) for spec in wanted])
        for part, start, stop in parts:
            differs = (words[index[start:stop]] != read_words(part)).any(axis=1)
            for neuron in np.flatnonzero(differs):
                yield f"{_name(layout, start + int(neuron))}: {projection} must be equal"
