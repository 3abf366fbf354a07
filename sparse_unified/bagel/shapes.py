# SPDX-License-Identifier: Apache-2.0
"""Reads a model's description off the names and shapes of its tensors.

The JSON files of a checkpoint can be wrong without any key being missing, so shapes decide wherever
they can, and a JSON field that contradicts them is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sparse_unified.bagel.config import (
    BagelConfig,
    LLMConfig,
    SpecialTokens,
    VAEConfig,
    VisionConfig,
)
from sparse_unified.bagel.layer_config import ExpertConfig, PrunedLayer
from sparse_unified.checkpoint.autoencoder import Shapes, read_sizes, require_shape
from sparse_unified.checkpoint.held import Held
from sparse_unified.checkpoint.structure import check_vision_layers, vision_layers

_QUERY_NORM = r"language_model\.model\.layers\.\d+\.self_attn\.q_norm(_moe_gen)?\.weight"


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns one more than the largest number that `pattern` captures in a key; 0 without one."""
    matches = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _square_side(rows: int, key: str, where: str) -> int:
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"{where}: {key} must have a square number of rows, got {rows}")
    return side


def _agree(where: str, name: str, stated: Any, found: Any) -> None:
    if stated is not None and stated != found:
        raise ValueError(f"{where}: {name} must be {found} as the tensors say, got {stated}")


def sparse_layers(
    shapes: Shapes, component: str, *, top_k: int | None, num_shared_experts: int, where: str
) -> dict[int, ExpertConfig]:
    """Returns the sparse FFNs among the keys of a component, by layer.

    Args:
        shapes: shape of every tensor, by official key.
        component: "gen" or "und".
        top_k: active experts, which no key tells.
        num_shared_experts: how many expert widths the shared expert is made of.
        where: name of the file, for messages.

    Raises:
        ValueError: there are experts, but no top_k, or a gate_proj that decides is missing.
    """
    ffn = {"gen": "mlp_moe_gen", "und": "mlp"}[component]
    found: dict[int, ExpertConfig] = {}
    for layer in range(_count(shapes, r"language_model\.model\.layers\.(\d{1,6})\.")):
        prefix = f"language_model.model.layers.{layer}.{ffn}"
        num_experts = _count(shapes, re.escape(prefix) + r"\.experts\.(\d{1,6})\.")
        if num_experts == 0:
            continue
        if top_k is None:
            raise ValueError(
                f"{where}: top_k must be given for the {num_experts} experts of layer {layer}, "
                "got none"
            )
        shared = f"{prefix}.shared_expert.gate_proj.weight"
        found[layer] = ExpertConfig(
            num_experts=num_experts,
            top_k=top_k,
            expert_width=require_shape(shapes, f"{prefix}.experts.0.gate_proj.weight", 2, where)[0],
            num_shared_experts=num_shared_experts,
            shared_width=require_shape(shapes, shared, 2, where)[0] if shared in shapes else 0,
        )
    return found


def _pruned_layers(whole: LLMConfig, layers: Mapping[int, Held]) -> dict[int, PrunedLayer]:
    """Returns the description of each layer that lost something."""
    per_key = whole.num_attention_heads // whole.num_key_value_heads
    pruned = {
        layer: PrunedLayer(
            intermediate_size=held.width,
            num_attention_heads=per_key * len(held.reads),
            num_key_value_heads=len(held.keys),
            key_heads=tuple(map(held.keys.index, held.reads))
            if len(held.reads) < len(held.keys)
            else None,
        )
        for layer, held in layers.items()
    }
    return {n: left for n, left in pruned.items() if left != whole.held(n, gen=True)}


def vae_config(shapes: Shapes, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder with these tensors.

    Args:
        factors: `scale_factor` and `shift_factor`, which no shape shows.
    """
    return VAEConfig(**(asdict(read_sizes(shapes, where=where)) | factors))


def bagel_config(
    shapes: Shapes,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    *,
    latent_channels: int,
    vae_downsample: int,
    special_tokens: SpecialTokens,
    top_k: int | None = None,
    num_shared_experts: int = 0,
    pruned: Mapping[str, Mapping[int, Held]] | None = None,
    stated: Mapping[str, Any] | None = None,
    where: str = "ema.safetensors",
) -> BagelConfig:
    """Returns the description of the model with these tensors.

    Args:
        shapes: shape of every tensor of the model, by official key.
        llm, vit: contents of llm_config.json and vit_config.json.
        latent_channels, vae_downsample: what the autoencoder says.
        top_k, num_shared_experts: of the sparse FFNs, if there are any.
        pruned: what pruning has left of each layer of a component; None where it took nothing.
        stated: contents of config.json, checked against the shapes where it repeats them.
        where: name of the weight file, for messages.

    Raises:
        ValueError: a tensor that decides is missing, or a JSON field contradicts the shapes.
    """
    routing: Any = {"top_k": top_k, "num_shared_experts": num_shared_experts}
    whole = LLMConfig.from_json(llm)
    config = replace(
        whole,
        sparse_gen=sparse_layers(shapes, "gen", **routing, where=where),
        sparse_und=sparse_layers(shapes, "und", **routing, where=where),
        pruned_gen=_pruned_layers(whole, (pruned or {}).get("gen", {})),
        pruned_und=_pruned_layers(whole, (pruned or {}).get("und", {})),
    )
    embeddings = require_shape(shapes, "language_model.model.embed_tokens.weight", 2, where)
    _agree("llm_config.json", "vocab_size", config.vocab_size, embeddings[0])
    _agree("llm_config.json", "hidden_size", config.hidden_size, embeddings[1])
    num_layers = _count(shapes, r"language_model\.model\.layers\.(\d{1,6})\.")
    if pruned is None:
        _agree("llm_config.json", "num_hidden_layers", config.num_hidden_layers, num_layers)
    norms = [key for key in shapes if re.fullmatch(_QUERY_NORM, key)]
    if norms or pruned is None:
        key = norms[0] if norms else "language_model.model.layers.0.self_attn.q_norm.weight"
        head = require_shape(shapes, key, 1, where)
        _agree("llm_config.json", "hidden_size / num_attention_heads", config.head_dim, head[0])

    token_channels = require_shape(shapes, "vae2llm.weight", 2, where)[1]
    patch = math.isqrt(token_channels // latent_channels)
    if patch * patch * latent_channels != token_channels:
        raise ValueError(
            f"{where}: vae2llm.weight must have p * p * {latent_channels} columns for latents of "
            f"{latent_channels} channels, got {token_channels}"
        )
    vit_layers = vision_layers(shapes)
    if problems := check_vision_layers(vit, vit_layers):
        raise ValueError(f"{where}: {problems[0]}")
    latent_rows = require_shape(shapes, "latent_pos_embed.pos_embed", 2, where)[0]
    vit_rows = require_shape(shapes, "vit_pos_embed.pos_embed", 2, where)[0]
    result = BagelConfig(
        llm=config,
        vision=VisionConfig.from_json(vit, num_hidden_layers=len(vit_layers)),
        latent_channels=latent_channels,
        vae_downsample=vae_downsample,
        latent_patch_size=patch,
        max_latent_size=_square_side(latent_rows, "latent_pos_embed.pos_embed", where),
        vit_max_num_patch_per_side=_square_side(vit_rows, "vit_pos_embed.pos_embed", where),
        special_tokens=special_tokens,
    )
    for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"):
        _agree("config.json", name, (stated or {}).get(name), getattr(result, name))
    if (stated or {}).get("interpolate_pos"):
        raise ValueError("config.json: interpolate_pos must be false, got true")
    return result
