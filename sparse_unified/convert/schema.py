# SPDX-License-Identifier: Apache-2.0
"""What the model loader would refuse in a directory, found from headers and JSON files alone.

A file may hold a part of the model (FFNs alone, or no vision), so what is there decides what must
be there: keys are whole groups under official names, every layer holds what one layer holds,
llm_config.json gives the heads and the vocabulary that the tensors have, vit_config.json their
layers. ae.safetensors holds exactly the tensors of the module that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparse_unified._common import list_some
from sparse_unified.bagel import AutoEncoder
from sparse_unified.bagel.config import vae_config
from sparse_unified.bagel.loading import official_tensors
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import VAE_FILE, Checkpoint
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header
from sparse_unified.checkpoint.shapes import CONFIG, LayerShapes, absent_prefixes

VIT_CONFIG = "vit_config.json"
_VIT_LAYER = re.compile(rf"(vit_model\..*?\.layers)\.{keys.INDEX}\.(.+)")
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_EMBEDDINGS = "language_model.model.embed_tokens.weight"


def check_model(source: Checkpoint) -> list[str]:
    """Returns a sentence for each disagreement around the FFNs, unreadable files among them."""
    problems: list[str] = []
    for check in _CHECKS:
        try:
            problems += check(source)
        except ValueError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def require_model(source: Checkpoint) -> None:
    """Raises ValueError with the first disagreement around the FFNs, if there is one."""
    for check in _CHECKS:
        if problems := check(source):
            raise ValueError(f"{source.directory}: {problems[0]}")


def _check_keys(source: Checkpoint) -> list[str]:
    """Looks for unknown keys, and for gaps among those outside the FFNs."""
    present = set(source.keys())
    absent = absent_prefixes(source.left or {})
    problems = []
    unknown = sorted(
        key
        for key in present
        if not keys.is_official(key)
        or (key.startswith(keys.VIT_PREFIX) and ".layers." in key and not _VIT_LAYER.fullmatch(key))
    )
    if unknown:
        problems.append(
            "keys: names must be official BAGEL names (language_model.*, vit_model.*, "
            f"{', '.join(f'{group}.*' for group in keys.OTHER_GROUPS)}), got {list_some(unknown)}"
        )
    missing = sorted(key for key in _expected(present) - present if not key.startswith(absent))
    if missing:
        problems.append(
            "keys: a group of tensors must be whole in every layer, "
            f"got no {list_some(missing)} beside the rest of it"
        )
    return problems


def _expected(present: set[str]) -> set[str]:
    expected: set[str] = set()
    for group, names in keys.OTHER_GROUPS.items():
        members = {f"{group}.{name}" for name in names}
        if members & present:
            expected |= members

    # Decoder layers: what any layer holds beside its FFNs, all hold; with it comes the trunk.
    layers = set()
    kinds = set()
    for key in present:
        match = keys.LAYER_KEY.fullmatch(key)
        if match is not None:
            layers.add(int(match[1]))
            if match[2] in keys.ATTENTION_KEYS or match[2] in keys.NORM_KEYS:
                kinds.add(match[2])
    expected |= {keys.layer_prefix(layer) + kind for layer in layers for kind in kinds}
    if kinds:
        expected |= set(keys.LANGUAGE_KEYS)

    # Layers of the vision transformer, by the same rule.
    vision: dict[str, tuple[set[str], set[str]]] = {}
    for key in present:
        match = _VIT_LAYER.fullmatch(key)
        if match is not None:
            indices, parts = vision.setdefault(match[1], (set(), set()))
            indices.add(match[2])
            parts.add(match[3])
    for stem, (indices, parts) in vision.items():
        expected |= {f"{stem}.{index}.{name}" for index in indices for name in parts}
    return expected


def _check_heads(source: Checkpoint) -> list[str]:
    return _check_attention(source.left, source.specs, source.llm_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor of an attention: its key, and whose it is; `module` is as in `q_proj`."""

    key: str
    component: str
    layer: int
    module: str


def _check_attention(
    layers: LayerShapes | None, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> list[str]:
    """Returns a sentence for each attention whose keys or shapes are not what the files say.

    Args:
        layers: what pruning has left; None where nothing was pruned.
        specs: of all tensors, by key.
        config: contents of llm_config.json, whose numbers of heads are those of the dense model.
    """
    absent = absent_prefixes(layers or {})
    present = sorted(key for key in specs if key.startswith(absent)) if absent else []
    problems = [f"{key}: must not be there, as {RECIPE} says it is skipped" for key in present[:1]]
    tensors = list(_attention_tensors(specs))
    if not tensors:
        return problems
    norms = {specs[tensor.key].shape for tensor in tensors if tensor.module == "q_norm"}
    wrong = _check_counts(config, norms)
    if wrong:
        return problems + wrong

    hidden, queries, key_heads = (config[name] for name in _SIZES)
    width = hidden // queries
    misfits = []
    for tensor in tensors:
        num_reads = num_keys = key_heads
        if layers is not None:
            held = layers[tensor.component].get(tensor.layer)
            if held is None or not held.has_attention:
                continue
            num_reads, num_keys = len(held.query_groups), len(held.kv_heads)
        heads = {"q_proj": num_reads * (queries // key_heads), "k_proj": num_keys}
        heads |= {"o_proj": heads["q_proj"], "v_proj": num_keys}
        channels = heads.get(tensor.module, 1) * width
        shape: tuple[int, ...] = (channels,)
        if tensor.module in keys.ATTENTION_PROJECTIONS and tensor.key.endswith(".weight"):
            shape = (hidden, channels) if tensor.module == "o_proj" else (channels, hidden)
        if specs[tensor.key].shape != shape:
            misfits.append((tensor.key, channels, shape))
    if layers is not None:
        return problems + [
            f"{key}: must have {channels} channels for the heads in {RECIPE}, "
            f"got shape {list(specs[key].shape)}"
            for key, channels, _ in misfits
        ]
    if misfits:
        listed = [f"{key} {list(specs[key].shape)}, not {list(shape)}" for key, _, shape in misfits]
        problems.append(
            f"{CONFIG}: num_attention_heads = {queries} and num_key_value_heads = {key_heads} of "
            f"{width} channels must give the shapes of every attention, got {list_some(listed)}"
        )
    return problems


def _attention_tensors(specs: Iterable[str]) -> Iterator[_Tensor]:
    for key in specs:
        match = keys.LAYER_KEY.fullmatch(key)
        if match is not None and match[2] in keys.ATTENTION_KEYS:
            component = keys.component_of(match[2])
            module = match[2].split(".")[1].removesuffix(keys.SUFFIXES[component])
            yield _Tensor(key=key, component=component, layer=int(match[1]), module=module)


def _check_counts(config: Mapping[str, Any], norms: set[tuple[int, ...]]) -> list[str]:
    """Returns a sentence if the numbers of heads are illegal, or disagree with the norms.

    Args:
        norms: shapes of the norms of the queries, which have the channels of one head.
    """
    for name in _SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            return [f"{CONFIG}: {name} must be a positive integer, got {config.get(name)!r:.120}"]
    for name, divisor in pairwise(_SIZES):
        if config[name] % config[divisor]:
            return [
                f"{CONFIG}: {name} must be a multiple of {divisor} = {config[divisor]}, "
                f"got {config[name]}"
            ]
    width = config["hidden_size"] // config["num_attention_heads"]
    if len(norms) == 1 and norms != {(width,)}:
        (found,) = norms
        return [
            f"{CONFIG}: hidden_size / num_attention_heads must be {list_some(found)} as the "
            f"tensors say, got {width}"
        ]
    return []


def _check_vocabulary(source: Checkpoint) -> list[str]:
    if _EMBEDDINGS not in source.specs:
        return []
    rows, stated = source.spec(_EMBEDDINGS).shape[:1], source.llm_config.get("vocab_size")
    if stated in (None, *rows):
        return []
    return [
        f"{CONFIG}: vocab_size must be {list_some(rows)} as the tensors say, got {stated!r:.120}"
    ]


def _check_vision(source: Checkpoint) -> list[str]:
    matches = map(_VIT_LAYER.fullmatch, source.keys())
    layers = sorted({int(match[2]) for match in matches if match is not None})
    if not layers:
        return []
    for index, layer in enumerate(layers):
        if layer != index:
            return [
                f"keys: layers of the vision transformer must be 0 to {layers[-1]} as the highest "
                f"says, got no {index}"
            ]
    # Official configs count one layer more than the keys hold: BAGEL drops the last one.
    stated = source.vit_config.get("num_hidden_layers", len(layers))
    if stated in (len(layers), len(layers) + 1):
        return []
    return [
        f"{VIT_CONFIG}: num_hidden_layers must be {len(layers)} or {len(layers) + 1} for weights "
        f"of {len(layers)} layers, got {stated!r:.120}"
    ]


def _check_autoencoder(source: Checkpoint) -> list[str]:
    if not source.vae_file.exists():
        return []
    found = {key: spec.shape for key, spec in read_header(source.vae_file).tensors.items()}
    module = AutoEncoder(vae_config(found, where=VAE_FILE), device="meta")
    wanted = {key: tuple(tensor.shape) for key, tensor in official_tensors(module).items()}
    rule = f"{VAE_FILE}: tensors must be those of the model"
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"{rule}, got no {list_some(missing)}")
    if extra := sorted(found.keys() - wanted.keys()):
        problems.append(f"{rule}, got {list_some(extra)} too")
    problems += [
        f"{VAE_FILE}: {key} must have shape {list(shape)}, got {list(found[key])}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    return problems


_CHECKS = (_check_keys, _check_heads, _check_vocabulary, _check_vision, _check_autoencoder)
