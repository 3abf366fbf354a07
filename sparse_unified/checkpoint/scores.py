# SPDX-License-Identifier: Apache-2.0
"""What users give for each layer: importance of neurons and heads, and calibration inputs.

A scores file is a safetensors file that holds one tensor `scores` [num_layers, I], or one tensor
[I] per layer, named by its index (`"1"`, `"2"`, ...), or by component and index (`"gen.1"`), beside
which `"gen.1.heads"` may give a tensor [G] for the groups of heads; any float dtype. What decides
between neurons, or groups of heads, is what was given, or a seed, or the weights: `rank`. A file
that `calibrate` wrote says in its metadata what it holds and of which model; see `read_origin`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import StrPath, list_some, naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import has_form, loads_strict, open_source
from sparse_unified.checkpoint.model_dir import Checkpoint, LayerShape, ffn_parts
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.safetensors_io import (
    TensorSpec,
    as_bytes,
    read_bytes,
    read_header,
    read_tensor,
)
from sparse_unified.experts.keep import (
    as_scores,
    check_scores,
    head_magnitude_scores,
    magnitude_scores,
    random_scores,
)
from sparse_unified.experts.router import check_inputs

LayerScores = Mapping[int, Tensor] | Tensor
Scores = Mapping[str, LayerScores] | LayerScores | StrPath

LayerInputs = Mapping[int, Tensor]
Inputs = Mapping[str, LayerInputs] | LayerInputs

ORIGIN = "sparse_unified.scores"  # key of the metadata
_ORIGIN = {
    "criterion": (str,),
    "samples": {str: (int,)},  # how many of each task
    "model_hashes": {str: (str,)},  # of the FFNs of each component
    "similarity": [{str: (str, int, float)}],  # the entries of `Similarity` of the layers
}
HEADS = ".heads"
_COMPONENTS = {name + end for name in keys.FFN_NAMES for end in ("", HEADS)}
_NAME = re.compile(rf"(?:({'|'.join(keys.FFN_NAMES)})\.)?{keys.INDEX}({re.escape(HEADS)})?")


def given_scores(
    scores: Scores | None, name: str, sizes: Mapping[int, int], num_layers: int
) -> dict[int, Tensor] | None:
    """Returns the scores of chosen layers, checked; None where none are given.

    Args:
        scores: of users: `{layer: scores}`, a tensor [num_layers, I], a mapping of components to
            either, or the path of a scores file.
        name: a component, or "gen.heads" or "und.heads" for groups of heads.
        sizes: `{layer: neurons or groups}` of the chosen layers.
        num_layers: of the model.
    """
    if scores is None:
        return None
    given: Any = read_scores(scores) if isinstance(scores, str | os.PathLike) else scores
    if isinstance(given, Mapping) and not _COMPONENTS.isdisjoint(given):
        if name not in given:
            raise ValueError(f"scores must hold {name}, got {list_some(given)}")
        given = given[name]
    if not isinstance(given, Mapping):
        stacked = as_scores(given)
        if stacked.ndim != 2 or stacked.shape[0] != num_layers:
            raise ValueError(
                f"scores must have shape [{num_layers} layers, intermediate_size], "
                f"got {list(stacked.shape)}"
            )
        given = dict(enumerate(stacked))
    if missing := [layer for layer in sizes if layer not in given]:
        raise ValueError(f"scores must have layers {list_some(sizes)}, got no {list_some(missing)}")
    found = {}
    for layer, size in sizes.items():
        with naming(f"layer {layer}"):
            found[layer] = as_scores(given[layer])
            check_scores(found[layer], size)
    return found


def read_origin(path: StrPath) -> dict[str, Any] | None:
    """Returns what a scores file says of itself, as `_ORIGIN`; None where other tools wrote it."""
    stated = read_header(path).metadata.get(ORIGIN)
    if stated is None:
        return None
    with naming(f"{path}: {ORIGIN}"):
        found: Any = loads_strict(stated)
        if not has_form(found, _ORIGIN):
            raise ValueError(f"metadata must be as calibrate writes it, got {stated!r:.240}")
    return found


def describe_scores(path: StrPath, component: str, own_hash: Callable[[], str]) -> str:
    """Returns the name of a scores file and what it holds; ValueError if it is of another model:
    `own_hash` returns the hash of the component's FFNs in the model that they are for."""
    origin, name = read_origin(path), f"file {Path(path).name}"
    if origin is None:
        return name
    known = origin["model_hashes"].get(component)
    if known and (own := own_hash()) != known:
        raise ValueError(
            f"scores: {path} must be of this model, whose {component} FFNs have the hash {own}, "
            f"got scores of {known}; calibrate this model, or prune before converting, which "
            "puts neurons in another order"
        )
    samples = "".join(f", {count} of {task}" for task, count in origin["samples"].items())
    of = f", {component} FFNs {known}" if known else ""
    return f"{name} ({origin['criterion']}{samples}{of})"


def read_scores(path: StrPath) -> Mapping[str, LayerScores] | LayerScores:
    """Reads a scores file; raises ValueError when it is not laid out as this module says."""
    found = {key: read_tensor(spec) for key, spec in read_header(path).tensors.items()}
    if set(found) == {"scores"}:
        return found["scores"]
    components: dict[str, Any] = {}
    for key, tensor in found.items():
        match = _NAME.fullmatch(key)
        name = key if match is None else (match[1] or "") + (match[3] or "")
        components.setdefault(name, {})[int(match[2]) if match else key] = tensor
    if set(components) != {""} and (not components or components.keys() - _COMPONENTS):
        raise ValueError(
            f"{path}: scores file must hold one tensor 'scores' [num_layers, I], or tensors named "
            f"by layer index or as gen.1 or gen.1.heads, got {list_some(sorted(found))}"
        )
    return components.get("", components)


def resolve_inputs(
    inputs: Inputs | None, config: MoEConfig, sizes: Mapping[int, int]
) -> dict[int, Tensor]:
    """Returns the calibration inputs of each layer, checked; {} where none are needed.

    Args:
        inputs: `{layer: [N, D]}`, or `{component: {layer: [N, D]}}`, given exactly where needed.
        config: what is done with them.
        sizes: layer -> hidden size D, of the layers that must be there.
    """
    if config.needs_inputs != (inputs is not None):
        got = "none; statistics that calibrate gathers with --inputs hold them"
        if inputs is not None:
            got = f"{config.partition.value!r} and {config.router_init.value!r}"
        raise ValueError(
            "inputs must be given for partition 'coactivation' and router_init 'activation', and "
            f"for these alone, got {got}"
        )
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must map layers to tensors, got {type(inputs).__name__}")
    own: Any = inputs
    if any(name in own for name in keys.FFN_NAMES):
        own = own.get(config.component, {})
    for layer, hidden_size in sizes.items():
        if not isinstance(own.get(layer), Tensor):
            raise ValueError(
                f"inputs must hold a tensor for layers {list_some(sizes)} of {config.component}, "
                f"got {type(own.get(layer)).__name__} for layer {layer}"
            )
        with naming(f"layer {layer}"):
            check_inputs(own[layer], hidden_size)
    return {layer: own[layer] for layer in sizes}


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rank(
    scores: Scores | None,
    name: str,
    sizes: Mapping[int, int],
    num_layers: int,
    magnitudes: Callable[[int], Tensor],
    own_hash: Callable[[], str],
    *,
    seed: int | None = None,
) -> tuple[Callable[[int], Tensor], str]:
    """Returns a function from layer to checked scores, and where these come from, in words.

    Given scores are checked at once; those by the magnitude of weights, where nothing is given, are
    computed when they are asked for. `seed` is of random scores, in the place of these; other
    arguments are as of `given_scores` and `describe_scores`.
    """
    if scores is not None and seed is not None:
        raise ValueError(f"scores and seed must not both be given, got seed {seed}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed must be an integer, got {seed!r:.120}")
    described = "given"
    if isinstance(scores, str | os.PathLike):
        described = describe_scores(scores, name.removesuffix(HEADS), own_hash)
    given = given_scores(scores, name, sizes, num_layers)
    if given is not None:
        return given.__getitem__, described
    if seed is not None:
        return lambda n: random_scores(sizes[n], seed=seed, layer=n), f"random, seed {seed}"

    def by_magnitude(layer: int) -> Tensor:
        values = magnitudes(layer)
        with naming(f"layer {layer}"):
            if values.is_meta:
                raise ValueError("scores must be given for weights without data, got meta")
            with naming("magnitude of its weights"):
                check_scores(values, sizes[layer])
        return values

    return by_magnitude, "weight magnitude"


def rank_file(
    source: Checkpoint,
    component: str,
    layers: Sequence[int],
    *,
    heads: bool = False,
    scores: Scores | None,
    seed: int | None,
) -> tuple[Callable[[int], Tensor], str]:
    """Ranks the neurons, or with `heads` the groups of heads, of a model directory; see `rank`."""
    shapes = source.shapes[component]
    sizes = {n: len(shapes[n].query_groups) if heads else shapes[n].width for n in layers}

    def read(key: str) -> Tensor:
        tensor = source.read(key)
        return tensor if tensor.dtype in _DTYPES else tensor.float()

    def magnitudes(layer: int) -> Tensor:
        if heads:
            return head_magnitudes(read, component, layer, shapes[layer])
        # Of experts part by part: every neuron is summed by itself, so the bits are the same.
        prefix = keys.ffn_prefix(component, layer)
        parts = [
            magnitude_scores(*(read(f"{prefix}{part}{name}.weight") for name in keys.PROJECTIONS))
            for part in ffn_parts(shapes[layer].ffn)
        ]
        return torch.cat(parts)

    name, own_hash = component + HEADS * heads, partial(hash_stored_ffns, source, component)
    return rank(scores, name, sizes, source.num_layers, magnitudes, own_hash, seed=seed)


def head_magnitudes(
    read: Callable[[str], Tensor], component: str, layer: int, shape: LayerShape
) -> Tensor:
    """Ranks the groups of query heads of an attention by weight magnitude, [groups] fp32."""
    values, output = (
        read(f"{keys.attention_module(component, layer, name)}.weight")
        for name in ("v_proj", "o_proj")
    )
    return head_magnitude_scores(
        values.unflatten(0, (len(shape.kv_heads), -1))[list(shape.query_places)],
        output.unflatten(1, (len(shape.query_groups), -1)),
    )


# Hashes of weights: shapes, and evenly spaced values


_HASHED = 256  # values of each weight that its hash looks at
Spaced = tuple[list[int], Tensor]  # the shape of a weight, and its spaced values


def hash_weights(ffns: Iterable[tuple[object, Iterable[Spaced]]]) -> str:
    """Returns a hash of spaced values of weights under keys, rounded to bf16; 16 hex digits."""
    digest = hashlib.sha256()
    for key, weights in ffns:
        digest.update(f"{key!r}".encode())
        for shape, values in weights:
            if values.is_meta:
                raise ValueError("weights must hold data to tell a model by its hash, got meta")
            digest.update(f" {shape}".encode())
            rounded = values.bfloat16().cpu().view(torch.int16)
            digest.update(rounded.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def spaced(weight: Tensor) -> Spaced:
    """Returns the shape and evenly spaced values of a weight."""
    return list(weight.shape), weight.reshape(-1)[:: max(1, weight.numel() // _HASHED)]


def _read_spaced(spec: TensorSpec) -> Spaced:
    """Reads the spaced values from a file, one by one."""
    count, size = math.prod(spec.shape), spec.dtype.itemsize
    places = range(0, count, max(1, count // _HASHED))
    values = torch.empty(len(places), dtype=spec.dtype)
    with open_source(spec.file, spec.stamp) as stream:
        for value, place in zip(values, places, strict=True):
            read_bytes(stream, spec.start + place * size, as_bytes(value))
    return list(spec.shape), values


def hash_stored_ffns(checkpoint: Checkpoint, component: str) -> str:
    """Returns the hash of the FFNs of a component in a model directory, as of a live one."""

    def weights(start: str) -> Iterator[Spaced]:
        for projection in keys.PROJECTIONS:
            yield _read_spaced(checkpoint.spec(f"{start}{projection}.weight"))

    return hash_weights(
        ((n, part[:-1]) if part else n, weights(keys.ffn_prefix(component, n) + part))
        for n, found in checkpoint.ffns.get(component, {}).items()
        for part in ffn_parts(found.ffn)
    )


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """Returns a hash of all weights of a model directory."""
    return hash_weights((key, [_read_spaced(spec)]) for key, spec in checkpoint.specs.items())
