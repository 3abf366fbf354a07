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
DENSE_KEY = re.compile(r"(gate_proj|up_proj|down_proj)\.weight")
EXPERT_KEY = re.compile(rf"experts\.{INDEX}\.(gate_proj|up_proj|down_proj)\.weight")
SHARED_KEY = re.compile(r"shared_expert\.(gate_proj|up_proj|down_proj)\.weight")
ROUTER_KEY = re.compile(r"(gate|gate_shared|gate_img)\.weight")

# What a decoder layer holds besides its two FFNs.
ATTENTION_KEYS: tuple[str, ...] = tuple(
    f"self_attn.{name}{branch}.{kind}"
    for branch in ("", "_moe_gen")
    for name, kinds in (
        ("q_proj", ("weight", "bias")),
        ("k_proj", ("weight", "bias")),
        ("v_proj", ("weight", "bias")),
        ("o_proj", ("weight",)),
        ("q_norm", ("weight",)),
        ("k_norm", ("weight",)),
    )
    for kind in kinds
)
NORM_KEYS: tuple[str, ...] = tuple(
    f"{name}{branch}.weight"
    for branch in ("", "_moe_gen")
    for name in ("input_layernorm", "post_attention_layernorm")
)
LANGUAGE_KEYS: tuple[str, ...] = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.model.norm_moe_gen.weight",
    "language_model.lm_head.weight",
)
# Everything outside the language model. A group is there as a whole or not at all.
OTHER_GROUPS: Mapping[str, tuple[str, ...]] = {
    "connector": ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
    "vit_pos_embed": ("pos_embed",),
    "time_embedder": ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"),
    "vae2llm": ("weight", "bias"),
    "llm2vae": ("weight", "bias"),
    "latent_pos_embed": ("pos_embed",),
}
VIT_PREFIX = "vit_model."


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


def expert_key(component: str, layer: int, expert: int | None, projection: str) -> str:
    """Returns the key of one projection of routed expert `expert`, or of the shared one (None)."""
    part = "shared_expert" if expert is None else f"experts.{expert}"
    return f"{ffn_prefix(component, layer)}{part}.{projection}.weight"


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


def is_official(key: str) -> bool:
    """Tells whether the key is one that a dense or sparse BAGEL checkpoint may hold."""
    match = LAYER_KEY.fullmatch(key)
    if match is None:
        group, _, rest = key.partition(".")
        return (
            key in LANGUAGE_KEYS
            or key.startswith(VIT_PREFIX)
            or rest in OTHER_GROUPS.get(group, ())
        )
    ffn = FFN_KEY.fullmatch(match[2])
    if ffn is None:
        return match[2] in ATTENTION_KEYS or match[2] in NORM_KEYS
    patterns = (DENSE_KEY, EXPERT_KEY, SHARED_KEY, ROUTER_KEY)
    return any(pattern.fullmatch(ffn[2]) for pattern in patterns)
