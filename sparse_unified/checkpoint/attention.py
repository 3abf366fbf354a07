# SPDX-License-Identifier: Apache-2.0
"""Whether the attentions of a file have the heads that llm_config.json and the recipe say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparse_unified._common import list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.safetensors_io import TensorSpec
from sparse_unified.checkpoint.shapes import CONFIG, LayerShapes, absent_prefixes

_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor of an attention: its key, and whose it is; `module` is as in `q_proj`."""

    key: str
    component: str
    layer: int
    module: str


def check_attention(
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
