# SPDX-License-Identifier: Apache-2.0
"""The official BAGEL key names, as data: what a tensor is, told from its name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
FFN_KEY = re.compile(r"(mlp|mlp_moe_gen)\.(.+)")
EXPERT_KEY = re.compile(rf"experts\.{INDEX}\.(gate_proj|up_proj|down_proj)\.weight")
ROUTER_KEY = re.compile(r"(gate|gate_shared|gate_img)\.weight")


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


def ffn_modules(component: str) -> tuple[str, ...]:
    """Returns the modules of a decoder layer that only the FFN of a component needs."""
    return f"post_attention_layernorm{SUFFIXES[component]}", FFN_NAMES[component]


def component_of(name: str) -> str:
    """Returns the component of a key inside a decoder layer, as in `mlp_moe_gen.gate.weight`."""
    return "gen" if "_moe_gen." in name else "und"


def module_prefixes(layer: int, modules: Iterable[str]) -> tuple[str, ...]:
    """Returns the starts of all keys of modules of a decoder layer."""
    return tuple(f"{layer_prefix(layer)}{module}." for module in modules)


def dense_key(component: str, layer: int, projection: str) -> str:
    """Returns the key of one projection of a dense FFN."""
    return f"{ffn_prefix(component, layer)}{projection}.weight"


def router_names(component: str) -> tuple[str, ...]:
    """Returns the router weights of a sparse FFN; und blocks have a second one for ViT tokens."""
    return ("gate", "gate_shared", "gate_img") if component == "und" else ("gate", "gate_shared")


def router_key(component: str, layer: int, name: str) -> str:
    """Returns the key of router weight `name` of a sparse FFN."""
    return f"{ffn_prefix(component, layer)}{name}.weight"


def find_ffn_key(key: str) -> tuple[str, int, str] | None:
    """Splits an FFN key into (component, layer, rest), or returns None for any other key."""
    match = LAYER_KEY.fullmatch(key)
    ffn = FFN_KEY.fullmatch(match[2]) if match else None
    if match is None or ffn is None:
        return None
    return COMPONENT_OF_FFN[ffn[1]], int(match[1]), ffn[2]
