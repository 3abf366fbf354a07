# SPDX-License-Identifier: Apache-2.0
"""Reads a model's description off the names and shapes of its tensors.

The JSON files of a checkpoint can be wrong without any key being missing, so shapes decide wherever
they can, and a JSON field that contradicts them is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_unified.bagel.config import (
    BagelConfig,
    ExpertConfig,
    LLMConfig,
    SpecialTokens,
    VAEConfig,
    VisionConfig,
)

Shapes = Mapping[str, Sequence[int]]


def _shape(shapes: Shapes, key: str, where: str) -> Sequence[int]:
    if key not in shapes:
        raise ValueError(f"{where}: {key} must be in the file, got {len(shapes)} other tensors")
    return shapes[key]


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
    shapes: Shapes, llm: Mapping[str, Any], component: str, *, where: str
) -> dict[int, ExpertConfig]:
    """Returns the sparse FFNs among the keys of a component, by layer.

    Args:
        shapes: shape of every tensor, by official key.
        llm: contents of llm_config.json: `top_k`, `num_experts`, `num_shared_experts`,
            `transformed_gen` / `transformed_und`.
        component: "gen" or "und".
        where: name of the file, for messages.

    Raises:
        ValueError: the configuration names other layers or other counts than the keys.
    """
    ffn = {"gen": "mlp_moe_gen", "und": "mlp"}[component]
    found: dict[int, ExpertConfig] = {}
    for layer in range(_count(shapes, r"language_model\.model\.layers\.(\d+)\.")):
        prefix = f"language_model.model.layers.{layer}.{ffn}"
        num_experts = _count(shapes, re.escape(prefix) + r"\.experts\.(\d+)\.")
        if num_experts == 0:
            continue
        _agree("llm_config.json", "num_experts", llm.get("num_experts"), num_experts)
        if llm.get("top_k") is None:
            raise ValueError(
                f"llm_config.json: top_k must be given for the {num_experts} experts of layer "
                f"{layer}, got none"
            )
        expert = _shape(shapes, f"{prefix}.experts.0.gate_proj.weight", where)
        shared = shapes.get(f"{prefix}.shared_expert.gate_proj.weight", (0,))
        found[layer] = ExpertConfig(
            num_experts=num_experts,
            top_k=llm["top_k"],
            expert_width=expert[0],
            num_shared_experts=int(llm.get("num_shared_experts") or 0),
            shared_width=shared[0],
        )
    stated = llm.get(f"transformed_{component}", False)
    num_layers = int(llm["num_hidden_layers"])
    listed = list(range(num_layers)) if stated is True else sorted(stated or [])
    if listed != sorted(found):
        raise ValueError(
            f"llm_config.json: transformed_{component} must be {sorted(found)}, the layers whose "
            f"experts are in {where}, got {stated}"
        )
    return found


def vae_config(shapes: Shapes, *, where: str = "ae.safetensors", **factors: float) -> VAEConfig:
    """Returns the description of the autoencoder with these tensors.

    Args:
        factors: `scale_factor` and `shift_factor`, which no shape shows.
    """
    stem = _shape(shapes, "encoder.conv_in.weight", where)  # [ch, in, 3, 3]
    levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.")
    outputs = [
        _shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", where)[0]
        for level in range(levels)
    ]
    for channels in outputs:
        if channels % stem[0]:
            raise ValueError(
                f"{where}: channels of every resolution must be multiples of {stem[0]}, "
                f"got {outputs}"
            )
    return VAEConfig(
        ch=stem[0],
        ch_mult=tuple(channels // stem[0] for channels in outputs),
        num_res_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        z_channels=_shape(shapes, "decoder.conv_in.weight", where)[1],
        in_channels=stem[1],
        out_ch=_shape(shapes, "decoder.conv_out.weight", where)[0],
        **factors,
    )


def bagel_config(
    shapes: Shapes,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    *,
    latent_channels: int,
    vae_downsample: int,
    special_tokens: SpecialTokens,
    stated: Mapping[str, Any] | None = None,
    where: str = "ema.safetensors",
) -> BagelConfig:
    """Returns the description of the model with these tensors.

    Args:
        shapes: shape of every tensor of the model, by official key.
        llm, vit: contents of llm_config.json and vit_config.json.
        latent_channels, vae_downsample: what the autoencoder says.
        stated: contents of config.json, checked against the shapes where it repeats them.
        where: name of the weight file, for messages.

    Raises:
        ValueError: a tensor that decides is missing, or a JSON field contradicts the shapes.
    """
    config = LLMConfig.from_json(
        llm,
        sparse_gen=sparse_layers(shapes, llm, "gen", where=where),
        sparse_und=sparse_layers(shapes, llm, "und", where=where),
    )
    embeddings = _shape(shapes, "language_model.model.embed_tokens.weight", where)
    _agree("llm_config.json", "vocab_size", config.vocab_size, embeddings[0])
    _agree("llm_config.json", "hidden_size", config.hidden_size, embeddings[1])
    num_layers = _count(shapes, r"language_model\.model\.layers\.(\d+)\.")
    _agree("llm_config.json", "num_hidden_layers", config.num_hidden_layers, num_layers)
    head = _shape(shapes, "language_model.model.layers.0.self_attn.q_norm.weight", where)
    _agree("llm_config.json", "hidden_size / num_attention_heads", config.head_dim, head[0])

    token_channels = _shape(shapes, "vae2llm.weight", where)[1]
    patch = math.isqrt(token_channels // latent_channels)
    if patch * patch * latent_channels != token_channels:
        raise ValueError(
            f"{where}: vae2llm.weight must have p * p * {latent_channels} columns for latents of "
            f"{latent_channels} channels, got {token_channels}"
        )
    latent_rows = _shape(shapes, "latent_pos_embed.pos_embed", where)[0]
    vit_rows = _shape(shapes, "vit_pos_embed.pos_embed", where)[0]
    result = BagelConfig(
        llm=config,
        vision=VisionConfig.from_json(
            vit, num_hidden_layers=_count(shapes, r"vit_model\..*encoder\.layers\.(\d+)\.")
        ),
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
