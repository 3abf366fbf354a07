# SPDX-License-Identifier: Apache-2.0
"""Where the importance of each neuron comes from when a checkpoint is converted.

A scores file is a safetensors file that holds either one tensor `scores` [num_layers, I], or one
tensor [I] per layer, named by its index (`"1"`, `"2"`, ...); any float dtype.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.ffn import list_some
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.safetensors_file import read_header, read_tensor
from sparse_unified.partition import as_scores, check_scores, magnitude_scores, random_scores

_BLOCK_NEURONS = 1024

Scores = Mapping[int, Tensor] | Tensor | str | os.PathLike[str]


def resolve_scores(
    source: Checkpoint,
    component: str,
    layers: Sequence[int],
    *,
    scores: Scores | None,
    seed: int | None,
) -> tuple[Callable[[int], Tensor], str]:
    """Returns a function from layer to scores [I], and how the report calls their origin.

    Given scores are checked at once for every layer in `layers`; magnitudes are computed when
    asked for, with one projection of that layer in memory.

    Raises:
        ValueError: scores and seed are both given, or scores lack a layer, name something else,
            have another shape or are not finite.
        TypeError: scores are no tensors.
    """
    ffns = source.ffns[component]
    if scores is not None and seed is not None:
        raise ValueError(f"convert: scores and seed must not both be given, got seed {seed}")
    if seed is not None:
        if type(seed) is not int:
            raise ValueError(f"convert: seed must be an integer, got {seed!r}")
        return (
            lambda layer: random_scores(ffns[layer].intermediate_size, seed=seed, layer=layer),
            f"random, seed {seed}",
        )
    if scores is None:
        return lambda layer: _magnitudes(source, component, layer), "weight magnitude"

    name = "given"
    if isinstance(scores, (str, os.PathLike)):
        name = f"file {Path(scores).name}"
        scores = read_scores(scores)
    given = _by_layer(scores, len(ffns))
    missing = [layer for layer in layers if layer not in given]
    if missing:
        raise ValueError(
            f"convert: scores must have layers {list_some(layers)}, got no {list_some(missing)}"
        )
    for layer in layers:
        check_scores(given[layer], ffns[layer].intermediate_size, where=f"convert: layer {layer}")
    return given.__getitem__, name


def read_scores(path: str | os.PathLike[str]) -> Mapping[int, Tensor] | Tensor:
    """Reads a scores file; raises ValueError when it is not laid out as this module says."""
    header = read_header(path)
    if set(header.tensors) == {"scores"}:
        return read_tensor(header.tensors["scores"], what=str(path))
    wrong = [key for key in header.tensors if not key.isascii() or not key.isdigit()]
    if wrong or not header.tensors:
        raise ValueError(
            f"{path}: scores file must hold one tensor 'scores' [num_layers, I] or tensors named "
            f"by layer index, got {list_some(sorted(header.tensors))}"
        )
    return {int(key): read_tensor(spec, what=str(path)) for key, spec in header.tensors.items()}


def _by_layer(scores: Mapping[int, Tensor] | Tensor, num_layers: int) -> dict[int, Tensor]:
    if isinstance(scores, Mapping):
        return {
            _layer_index(layer): as_scores(value, where=f"convert: layer {layer}")
            for layer, value in scores.items()
        }
    scores = as_scores(scores, where="convert")
    if scores.ndim != 2 or scores.shape[0] != num_layers:
        raise ValueError(
            f"convert: scores must have shape [{num_layers} layers, intermediate_size], "
            f"got {list(scores.shape)}"
        )
    return dict(enumerate(scores))


def _layer_index(layer: object) -> int:
    """Takes any integer, and its digits as a scores file has them."""
    if isinstance(layer, str) and layer.isascii() and layer.isdigit():
        return int(layer)
    if isinstance(layer, SupportsIndex) and not isinstance(layer, bool):
        return operator.index(layer)
    raise ValueError(f"convert: scores must be named by layer index, got {layer!r}")


def _magnitudes(source: Checkpoint, component: str, layer: int) -> Tensor:
    # Blocks of neurons get the bits that the whole layer would: every neuron is summed by itself.
    gate_proj, up_proj, down_proj = (
        source.spec(keys.dense_key(component, layer, name)) for name in keys.PROJECTIONS
    )
    what = f"convert: {component} layer {layer} of the weights"
    columns = read_tensor(down_proj, what=what)
    parts = []
    for start in range(0, columns.shape[1], _BLOCK_NEURONS):
        stop = min(columns.shape[1], start + _BLOCK_NEURONS)
        rows = [read_tensor(spec.rows(start, stop), what=what) for spec in (gate_proj, up_proj)]
        parts.append(magnitude_scores(rows[0], rows[1], columns[:, start:stop].contiguous()))
    scores = torch.cat(parts)
    check_scores(scores, scores.shape[0], where=what)
    return scores
