# SPDX-License-Identifier: Apache-2.0
"""What users give for each layer of a checkpoint: importance of neurons and heads, and inputs.

A scores file is a safetensors file that holds one tensor `scores` [num_layers, I], or one tensor
[I] per layer, named by its index (`"1"`, `"2"`, ...), or by component and index (`"gen.1"`), beside
which `"gen.1.heads"` may give a tensor [G] for the groups of heads; any float dtype.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from sparse_unified._common import list_some, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor
from sparse_unified.checkpoint.shapes import ffn_parts
from sparse_unified.experts import (
    Partition,
    RouterInit,
    as_scores,
    check_inputs,
    check_scores,
    head_magnitude_scores,
    magnitude_scores,
    random_scores,
)

_BLOCK_NEURONS = 1024

LayerScores = Mapping[int, Tensor] | Tensor
Scores = Mapping[str, LayerScores] | LayerScores | str | os.PathLike[str]

LayerInputs = Mapping[int, Tensor]
Inputs = Mapping[str, LayerInputs] | LayerInputs

HEADS = ".heads"
_LAYER = re.compile(keys.INDEX)
_NAME = re.compile(rf"({'|'.join(keys.FFN_NAMES)})\.{keys.INDEX}({re.escape(HEADS)})?")


def resolve_scores(
    source: Checkpoint,
    component: str,
    layers: Sequence[int],
    *,
    scores: Scores | None,
    seed: int | None,
    what: str,
) -> tuple[Callable[[int], Tensor], str]:
    """Returns a function from layer to scores [I], and how the report calls their origin.

    Given scores are checked at once for every layer in `layers`; magnitudes are computed when
    asked for, with one projection of that layer in memory.

    Args:
        what: the operation, for messages.

    Raises:
        ValueError: scores and seed are both given, or scores lack a layer, name something else,
            have another shape or are not finite.
        TypeError: scores are no tensors.
    """
    ffns = source.ffns[component]
    sizes = {layer: ffns[layer].intermediate_size for layer in layers}
    given, name = _given(scores, component, sizes, source.num_layers, seed=seed, what=what)
    if given is not None:
        return given.__getitem__, name
    if seed is not None:
        return lambda layer: random_scores(sizes[layer], seed=seed, layer=layer), name
    return lambda layer: _magnitudes(source, component, layer, what), "weight magnitude"


def resolve_head_scores(
    source: Checkpoint,
    component: str,
    reads: Mapping[int, Sequence[int]],
    *,
    scores: Scores | None,
    seed: int | None,
    what: str,
) -> tuple[dict[int, Tensor], str]:
    """Returns the scores [G] of the groups of heads of each layer, and how their origin is called.

    Args:
        reads: `{layer: the key head, of those in the file, that each group reads}`.

    Raises:
        ValueError, TypeError: as in `resolve_scores`.
    """
    sizes = {layer: len(heads) for layer, heads in reads.items()}
    given, name = _given(scores, component + HEADS, sizes, source.num_layers, seed=seed, what=what)
    if given is not None:
        return {layer: given[layer] for layer in reads}, name
    if seed is not None:
        random = {n: random_scores(size, seed=seed, layer=n) for n, size in sizes.items()}
        return random, name
    magnitudes = {n: _head_magnitudes(source, component, n, reads[n], what) for n in reads}
    return magnitudes, "weight magnitude"


def _given(
    scores: Scores | None,
    component: str,
    sizes: Mapping[int, int],
    num_layers: int,
    *,
    seed: int | None,
    what: str,
) -> tuple[Mapping[int, Tensor] | None, str]:
    """Returns checked scores, None where there are none, and what they are called."""
    if scores is not None and seed is not None:
        raise ValueError(f"{what}: scores and seed must not both be given, got seed {seed}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"{what}: seed must be an integer, got {seed!r:.120}")
    if scores is None:
        return None, f"random, seed {seed}"
    name = "given"
    if isinstance(scores, (str, os.PathLike)):
        name = f"file {Path(scores).name}"
        scores = read_scores(scores)
    given = _by_layer(_of_component(scores, component, what), num_layers, what)
    missing = [layer for layer in sizes if layer not in given]
    if missing:
        raise ValueError(
            f"{what}: scores must have layers {list_some(sizes)}, got no {list_some(missing)}"
        )
    for layer, size in sizes.items():
        with naming(f"{what}: layer {layer}"):
            check_scores(given[layer], size)
    return given, name


def _of_component(
    scores: Mapping[str, LayerScores] | LayerScores, component: str, what: str
) -> LayerScores:
    by_name: Mapping[Any, Any] = scores if isinstance(scores, Mapping) else {}
    legal = [name + end for name in keys.FFN_NAMES for end in ("", HEADS)]
    if not any(name in by_name for name in legal):
        return scores  # type: ignore[return-value]
    if component not in by_name:
        raise ValueError(f"{what}: scores must hold {component}, got {list_some(by_name)}")
    found: LayerScores = by_name[component]
    return found


def resolve_inputs(
    inputs: Inputs | None, config: MoEConfig, sizes: Mapping[int, int], *, what: str
) -> LayerInputs:
    """Returns the calibration inputs of each layer, checked; {} where none are needed.

    Args:
        inputs: `{layer: [N, D]}`, or `{component: {layer: [N, D]}}`.
        config: what is done with them; they must be given exactly where it needs them.
        sizes: layer -> hidden size D, of the layers that must be there.
        what: start of messages.

    Raises:
        ValueError: they are missing, not needed, lack the component or a layer, or do not fit.
        TypeError: they are no tensors by layer.
    """
    asked = [] if config.partition is not Partition.COACTIVATION else ["partition 'coactivation'"]
    if config.router_init is RouterInit.ACTIVATION:
        asked.append("router_init 'activation'")
    if inputs is None and asked:
        raise ValueError(
            f"{what}: inputs must be given for {' and '.join(asked)}, got none; statistics that "
            "calibrate gathers with --inputs hold them"
        )
    if inputs is None:
        return {}
    if not asked:
        raise ValueError(
            f"{what}: inputs must come with partition 'coactivation' or router_init 'activation', "
            f"got {config.partition.value!r:.120} and {config.router_init.value!r:.120}"
        )
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{what}: inputs must map layers to tensors, got {type(inputs).__name__}")
    own: Mapping[object, object] = inputs  # type: ignore[assignment]
    if any(name in own for name in keys.FFN_NAMES):
        by_layer = own.get(config.component)
        if not isinstance(by_layer, Mapping):
            raise ValueError(
                f"{what}: inputs must hold {config.component}, got {list_some(sorted(own))}"  # type: ignore[type-var]
            )
        own = by_layer
    found = {}
    for layer, hidden_size in sizes.items():
        value = own.get(layer)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{what}: inputs must hold a tensor for layers {list_some(sizes)}, "
                f"got {type(value).__name__} for layer {layer}"
            )
        with naming(f"{what}: layer {layer}"):
            check_inputs(value, hidden_size)
        found[layer] = value
    return found


def read_scores(path: str | os.PathLike[str]) -> Mapping[str, LayerScores] | LayerScores:
    """Reads a scores file; raises ValueError when it is not laid out as this module says."""
    header = read_header(path)
    if set(header.tensors) == {"scores"}:
        return read_tensor(header.tensors["scores"], what=str(path))
    named = {key: _NAME.fullmatch(key) for key in header.tensors}
    if named and all(named.values()):
        components: dict[str, dict[int, Tensor]] = {}
        for key, match in named.items():
            assert match is not None
            own = components.setdefault(match[1] + (match[3] or ""), {})
            own[int(match[2])] = read_tensor(header.tensors[key], what=str(path))
        return components
    wrong = [key for key in header.tensors if not _LAYER.fullmatch(key)]
    if wrong or not header.tensors:
        raise ValueError(
            f"{path}: scores file must hold one tensor 'scores' [num_layers, I], or tensors named "
            f"by layer index or as gen.1 or gen.1.heads, got {list_some(sorted(header.tensors))}"
        )
    return {int(key): read_tensor(spec, what=str(path)) for key, spec in header.tensors.items()}


def _by_layer(scores: LayerScores, num_layers: int, what: str) -> dict[int, Tensor]:
    if isinstance(scores, Mapping):
        found = {}
        for layer, value in scores.items():
            with naming(f"{what}: layer {layer}"):
                tensor = as_scores(value)
            found[_layer_index(layer, what)] = tensor
        return found
    with naming(what):
        scores = as_scores(scores)
    if scores.ndim != 2 or scores.shape[0] != num_layers:
        raise ValueError(
            f"{what}: scores must have shape [{num_layers} layers, intermediate_size], "
            f"got {list(scores.shape)}"
        )
    return dict(enumerate(scores))


def _layer_index(layer: object, what: str) -> int:
    """Takes any integer, and its digits as a scores file has them."""
    if isinstance(layer, str) and _LAYER.fullmatch(layer):
        return int(layer)
    if isinstance(layer, SupportsIndex) and not isinstance(layer, bool):
        return operator.index(layer)
    raise ValueError(f"{what}: scores must be named by layer index, got {layer!r:.120}")


def _magnitudes(source: Checkpoint, component: str, layer: int, what: str) -> Tensor:
    # Parts get the bits that the whole layer would: every neuron is summed by itself.
    what = f"{what}: {component} layer {layer} of the weights"
    parts = []
    for prefix in ffn_parts(source.ffns[component][layer].ffn):
        gate_proj, up_proj, down_proj = (
            source.spec(f"{keys.ffn_prefix(component, layer)}{prefix}{name}.weight")
            for name in keys.PROJECTIONS
        )
        columns = read_tensor(down_proj, what=what)
        for start in range(0, columns.shape[1], _BLOCK_NEURONS):
            stop = min(columns.shape[1], start + _BLOCK_NEURONS)
            rows = [read_tensor(spec.rows(start, stop), what=what) for spec in (gate_proj, up_proj)]
            parts.append(magnitude_scores(rows[0], rows[1], columns[:, start:stop].contiguous()))
    scores = torch.cat(parts)
    with naming(what):
        check_scores(scores, scores.shape[0])
    return scores


def _head_magnitudes(
    source: Checkpoint, component: str, layer: int, heads: Sequence[int], what: str
) -> Tensor:
    at = f"{what}: {component} layer {layer} of the attention weights"
    stem, suffix = f"{keys.layer_prefix(layer)}self_attn.", keys.SUFFIXES[component]
    values = source.read(f"{stem}v_proj{suffix}.weight")
    output = source.read(f"{stem}o_proj{suffix}.weight")
    channels = source.spec(f"{stem}q_norm{suffix}.weight").shape[0]
    scores = head_magnitude_scores(
        values.unflatten(0, (-1, channels))[list(heads)], output.unflatten(1, (len(heads), -1))
    )
    with naming(at):
        check_scores(scores, len(heads))
    return scores
