# SPDX-License-Identifier: Apache-2.0
"""Moving neurons between the dense and the per-expert layout, bit for bit.

One projection is in memory at a time, as words of its element size: no value is ever interpreted.
Neurons are rows of gate_proj and up_proj [I, D] and columns of down_proj [D, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.safetensors_file import TensorSpec, read_bytes
from sparse_unified.experts import ExpertLayout

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Rows of down_proj handled at once: enough to amortise a read, few enough to stay in cache.
_BLOCK_BYTES = 4 << 20

Read = Callable[[str], TensorSpec]


def read_words(spec: TensorSpec) -> np.ndarray:
    """Returns a 2-D tensor as words of its element size."""
    data = np.empty(spec.shape, dtype=_WORDS[spec.dtype.itemsize])
    with spec.file.open("rb", buffering=0) as stream:
        read_bytes(stream, spec.start, data, what=str(spec.file))
    return data


def row_blocks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yields consecutive row ranges of about 4 MB each."""
    rows, columns = spec.shape
    step = max(1, _BLOCK_BYTES // max(1, columns * spec.dtype.itemsize))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def expert_ranges(layout: ExpertLayout) -> list[tuple[int | None, int, int]]:
    """Returns (expert, start, stop) in expert order; the shared expert is None and comes first."""
    ranges: list[tuple[int | None, int, int]] = []
    if layout.shared_width:
        ranges.append((None, *layout.shared_range()))
    ranges += [(expert, *layout.expert_range(expert)) for expert in range(layout.num_experts)]
    return ranges


def to_experts(
    spec: TensorSpec, projection: str, neuron_index: np.ndarray, layout: ExpertLayout
) -> Iterator[np.ndarray]:
    """Yields the pieces of one dense projection, one for each expert, in expert order.

    Args:
        spec: the dense projection, [I, D] or [D, I] for down_proj.
        projection: its name.
        neuron_index: [I], position in expert order -> dense neuron.
        layout: the ranges of the experts.
    """
    ranges = expert_ranges(layout)
    if projection != "down_proj":
        rows = read_words(spec)  # [I, D]
        for _, start, stop in ranges:
            yield rows[neuron_index[start:stop]]
        return
    # Columns are gathered from a few rows at a time, and each expert's part put where it goes.
    dtype = _WORDS[spec.dtype.itemsize]
    parts = [np.empty((spec.shape[0], stop - start), dtype=dtype) for _, start, stop in ranges]
    for top, bottom in row_blocks(spec):
        block = np.take(read_words(spec.rows(top, bottom)), neuron_index, axis=1)
        for part, (_, start, stop) in zip(parts, ranges, strict=True):
            part[top:bottom] = block[:, start:stop]
    yield from parts


def to_dense(
    find: Read,
    component: str,
    layer: int,
    projection: str,
    neuron_index: np.ndarray,
    layout: ExpertLayout,
) -> Iterator[np.ndarray]:
    """Yields the rows of one dense projection, put together from its experts, in blocks.

    Args:
        find: key -> spec in the sparse checkpoint.
        neuron_index: [I], position in expert order -> dense neuron.
    """
    ranges = expert_ranges(layout)
    specs = [find(keys.expert_key(component, layer, expert, projection)) for expert, _, _ in ranges]
    if projection != "down_proj":
        dense = np.empty(
            (layout.intermediate_size, specs[0].shape[1]), dtype=_WORDS[specs[0].dtype.itemsize]
        )
        for spec, (_, start, stop) in zip(specs, ranges, strict=True):
            dense[neuron_index[start:stop]] = read_words(spec)
        yield dense
        return
    position = np.empty_like(neuron_index)
    position[neuron_index] = np.arange(len(neuron_index))  # dense neuron -> position
    for top, bottom in row_blocks(specs[0]):
        block = np.concatenate([read_words(spec.rows(top, bottom)) for spec in specs], axis=1)
        yield np.take(block, position, axis=1)
