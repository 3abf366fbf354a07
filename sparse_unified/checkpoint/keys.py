# SPDX-License-Identifier: Apache-2.0
"""The official BAGEL key names, as data: what a tensor is, from its name, and what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from sparse_unified._common import format_table
from sparse_unified.checkpoint.safetensors_io import TensorSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Component -> name of its FFN inside a decoder layer.
FFN_NAMES: Mapping[str, str] = {"und": "mlp", "gen": "mlp_moe_gen"}
COMPONENT_OF_FFN: Mapping[str, str] = {name: component for component, name in FFN_NAMES.items()}

# Component -> the end of the names of its modules in a decoder layer.
SUFFIXES: Mapping[str, str] = {"und": "", "gen": "_moe_gen"}
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_NORMS = ("q_norm", "k_norm")

# Component -> the field of llm_config.json that says which of its layers are sparse.
TRANSFORMED: Mapping[str, str] = {"und": "transformed_und", "gen": "transformed_gen"}

# One spelling of a number alone, and no more digits than counts of layers and experts have.
INDEX = r"(0|[1-9][0-9]{0,5})"
LAYER_KEY = re.compile(rf"language_model\.model\.layers\.{INDEX}\.(.+)")
FFN_KEY = re.compile(rf"language_model\.model\.layers\.{INDEX}\.(mlp|mlp_moe_gen)\.(.+)")
EXPERT_KEY = re.compile(rf"experts\.{INDEX}\.(gate_proj|up_proj|down_proj)\.weight")
ROUTER_KEY = re.compile(r"(gate|gate_shared|gate_img|gate_time)\.weight")


def layer_prefix(layer: int) -> str:
    """Returns the start of every key of decoder layer `layer`."""
    return f"language_model.model.layers.{layer}."


def ffn_prefix(component: str, layer: int) -> str:
    """Returns the start of every FFN key of one layer; `component` is "und" or "gen"."""
    return f"{layer_prefix(layer)}{FFN_NAMES[component]}."


def attention_modules(component: str) -> tuple[str, ...]:
    """Returns the modules of a decoder layer that only the attention of a component needs."""
    suffix = SUFFIXES[component]
    inner = (*ATTENTION_PROJECTIONS, *ATTENTION_NORMS)
    return (f"input_layernorm{suffix}", *(f"self_attn.{name}{suffix}" for name in inner))


def attention_module(component: str, layer: int, projection: str) -> str:
    """Returns the start of the keys of one projection of an attention, without the dot."""
    return f"{layer_prefix(layer)}self_attn.{projection}{SUFFIXES[component]}"


def ffn_modules(component: str) -> tuple[str, ...]:
    """Returns the modules of a decoder layer that only the FFN of a component needs."""
    return f"post_attention_layernorm{SUFFIXES[component]}", FFN_NAMES[component]


def component_of(name: str) -> str:
    """Returns the component of a key inside a decoder layer, as in `mlp_moe_gen.gate.weight`."""
    return "gen" if "_moe_gen." in name else "und"


def module_prefixes(layer: int, modules: Iterable[str]) -> tuple[str, ...]:
    """Returns the starts of all keys of modules of a decoder layer."""
    return tuple(f"{layer_prefix(layer)}{module}." for module in modules)


def ffn_key(component: str, layer: int, name: str) -> str:
    """Returns the key of a weight of an FFN: a projection of a dense one, or a router."""
    return f"{ffn_prefix(component, layer)}{name}.weight"


def router_names(component: str, time_router: bool) -> tuple[str, ...]:
    """Returns the router weights of a sparse FFN; und blocks have a second one for ViT tokens."""
    if component == "und":
        return "gate", "gate_shared", "gate_img"
    return ("gate", "gate_shared", "gate_time") if time_router else ("gate", "gate_shared")


def find_ffn_key(key: str) -> tuple[str, int, str] | None:
    """Splits an FFN key into (component, layer, rest), or returns None for any other key."""
    match = FFN_KEY.fullmatch(key)
    return (COMPONENT_OF_FFN[match[2]], int(match[1]), match[3]) if match else None


_TITLES = {
    "parameters": "parameters",
    "bytes": "bytes",
    "flops_per_token": "FLOPs per token",
    "flops_per_pair": "FLOPs of attention per pair",
    "kv_bytes_per_token": "cached bytes per token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The decoder layers of one component, or of several added up.

    Attributes:
        parameters, bytes: of all weights.
        flops_per_token: 2 per weight of the projections, FFNs and routers that a token runs
            through; idle experts do not count.
        flops_per_pair: 4 * query heads * head_dim of all layers: what attention takes per pair of
            a token and one it sees, beside the projections.
        kv_bytes_per_token: keys and values that a token leaves in a context.
    """

    parameters: int = 0
    bytes: int = 0
    flops_per_token: int = 0
    flops_per_pair: int = 0
    kv_bytes_per_token: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


def count_weight(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Counts:
    """Returns what one weight of a decoder layer costs; `name` is its module's, as in `q_proj`."""
    size = math.prod(shape)
    is_matrix = len(shape) == 2
    rows = shape[0] if is_matrix and name in ("q_proj", "k_proj", "v_proj") else 0
    return Counts(
        parameters=size,
        bytes=size * dtype.itemsize,
        # The two routers of und blocks take different tokens.
        flops_per_token=2 * size if is_matrix and name != "gate_img" else 0,
        flops_per_pair=4 * rows if name == "q_proj" else 0,
        kv_bytes_per_token=0 if name == "q_proj" else rows * dtype.itemsize,
    )


def count_tensors(
    specs: Mapping[str, TensorSpec],
    sizes: Mapping[str, Sequence[int]],
    component: str,
    top_k: int | None,
) -> Counts:
    """Returns what the decoder layers of a component cost with tensors of these sizes."""
    counts = Counts()
    for key, shape in sizes.items():
        match = LAYER_KEY.fullmatch(key)
        if match is None or component_of(match[2]) != component:
            continue
        module = match[2].rpartition(".")[0].rpartition(".")[2]
        own = count_weight(module.removesuffix(SUFFIXES["gen"]), specs[key].dtype, shape)
        expert = EXPERT_KEY.search(match[2])
        if expert is not None and top_k is not None and int(expert[1]) >= top_k:
            own = Counts(parameters=own.parameters, bytes=own.bytes)  # as many are idle
        counts += own
    return counts


def format_counts(before: Counts, after: Counts) -> str:
    """Lays out what was and what is left, side by side."""
    rows: list[Sequence[object]] = [("in the decoder layers", "before", "after", "left")]
    for name, title in _TITLES.items():
        old, new = getattr(before, name), getattr(after, name)
        left = f"{100 * new / old:.1f} %" if old else "-"
        rows.append((title, f"{old:,}", f"{new:,}", left))
    return format_table(rows, header=True)
