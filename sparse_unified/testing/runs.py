# SPDX-License-Identifier: Apache-2.0
"""Computes the outputs of recorded cases, kind by kind."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import context
from sparse_unified.bagel import (
    ContextImage,
    SamplingConfig,
    build_guidance,
    generate_tokens,
    sample_latents,
)
from sparse_unified.bagel.sampler import see_images
from sparse_unified.experts import ExpertLayout, snake_partition
from sparse_unified.nn import SparseMoE
from sparse_unified.testing.cases import Case, is_number, read_case
from sparse_unified.testing.contexts import (
    read_context_images,
    read_pictures,
    read_prompts,
    read_sizes,
)
from sparse_unified.testing.models import build_model, build_vae, load_weights_


def replay(case_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Computes the outputs of a recorded case from its configuration, weights and inputs.

    Args:
        case_path: `NAME`, `NAME.json` or `NAME.safetensors`.

    Returns:
        By kind of case: `output` and `router_logits` of a sparse FFN block; `moe.*` of a
        partition; `latent.0`, `latent.1`, ... of images; `token_ids` of an answer; `latent` and
        `decoded` of an autoencoder.

    Raises:
        ValueError: the case is incomplete, malformed or of no known kind; the message names the
            file, the rule and the value.
    """
    case = read_case(case_path)
    kinds = {
        "num_timesteps": _replay_images,
        "length": _replay_answer,
        "ch_mult": _replay_vae,
        "top_k": _replay_block,
        "intermediate_size": _replay_partition,
    }
    for field, run in kinds.items():
        if field in case.fields:
            try:
                with torch.no_grad():
                    return run(case)
            except ValueError as error:
                # What the library itself refuses came from a field; it does not know the file.
                if str(error).startswith((f"{case.json_file}: ", f"{case.tensor_file}: ")):
                    raise
                raise ValueError(f"{case.json_file}: {error}") from error
    raise ValueError(
        f"{case.json_file}: fields must hold one of {', '.join(kinds)}, got {sorted(case.fields)}"
    )


def _replay_images(case: Case) -> dict[str, Tensor]:
    config = _sampling(case)
    model = build_model(case)
    prompts = read_prompts(case, model.config.llm.vocab_size)
    sizes = read_sizes(case, len(prompts))
    with context(case.json_file):
        grids = [model.config.token_grid(*size) for size in sizes]
    lengths = [rows * columns for rows, columns in grids]
    noise = case.tensor("init_noise", [sum(lengths), model.config.token_channels])
    images = read_context_images(case, model, len(prompts))
    guidance = build_guidance(model, prompts, images=images)
    latents = sample_latents(model, guidance, noise.split(lengths), grids, config)
    return {f"latent.{i}": latent for i, latent in enumerate(latents)}


def _sampling(case: Case) -> SamplingConfig:
    """Returns how to sample; a field that is absent has its default."""
    given: dict[str, Any] = {}
    for name in SamplingConfig.__slots__:
        if name not in case.fields:
            continue
        if name == "num_timesteps":
            given[name] = case.integer(name, least=2)
        elif name == "cfg_interval":
            given[name] = case.field(
                name,
                "be a pair of finite numbers",
                lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_number, v)),
            )
        elif name == "cfg_renorm_type":
            given[name] = case.fields[name]
        else:
            given[name] = case.number(name)
    return SamplingConfig(**given)


def _replay_answer(case: Case) -> dict[str, Tensor]:
    length = case.integer("length", least=1)
    model = build_model(case)
    prompts = read_prompts(case, model.config.llm.vocab_size)
    channels = model.config.vision.num_channels
    seen = read_pictures(case, "context.vit_pixels", channels).values()
    contexts = model.new_contexts(1)
    see_images(model, contexts, [[ContextImage(vit_pixels=pixels) for pixels in seen]])
    model.prefill_text(contexts, prompts[:1])
    ids = generate_tokens(model, contexts, max_length=length)
    return {"token_ids": torch.tensor(ids[0])}


def _replay_vae(case: Case) -> dict[str, Tensor]:
    vae = build_vae(case)
    pixels = case.tensor("pixels", [None, vae.config.in_channels, None, None])
    if 0 in pixels.shape:
        raise ValueError(f"{case.tensor_file}: pixels must hold some, got {list(pixels.shape)}")
    latent = vae.encode(pixels)
    return {"latent": latent, "decoded": vae.decode(latent)}


def _replay_block(case: Case) -> dict[str, Tensor]:
    hidden_size = case.integer("hidden_size", least=1)
    num_experts = case.integer("num_experts", least=1)
    # Their product decides about memory, so the router has to confirm them first.
    case.tensor("model.gate.weight", [num_experts, hidden_size])
    width = case.tensor("model.experts.0.gate_proj.weight", [None, hidden_size]).shape[0]
    shared_key = "model.shared_expert.gate_proj.weight"
    shared = 0
    if shared_key in case.tensors:
        shared = case.tensor(shared_key, [None, hidden_size]).shape[0]
    block = SparseMoE(
        hidden_size,
        num_experts * width + shared,
        num_experts,
        case.integer("top_k", least=1),
        case.fields.get("num_shared_experts") or 0,
        shared_intermediate_size=shared,
        gate_img="gate_img.weight" in case.weights,
        device="meta",
    )
    load_weights_(block, case)
    x = case.tensor("input")
    if x.ndim == 0 or x.dtype != torch.float32:
        raise ValueError(
            f"{case.tensor_file}: input must be torch.float32 [..., {hidden_size}], "
            f"got {x.dtype} {list(x.shape)}"
        )
    indexes = [case.tensors.get(f"packed_{name}_indexes") for name in ("text", "vit_token")]
    for index in indexes:
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{case.tensor_file}: packed indexes must be int32 or int64, got {index.dtype}"
            )
    output, router_logits = block(x, *indexes)
    return {"output": output, "router_logits": router_logits}


def _replay_partition(case: Case) -> dict[str, Tensor]:
    width = case.integer("intermediate_size", least=1)
    gate_proj = case.tensor("dense.gate_proj.weight", [width, None])
    hidden_size = gate_proj.shape[1]
    up_proj = case.tensor("dense.up_proj.weight", [width, hidden_size])
    down_proj = case.tensor("dense.down_proj.weight", [hidden_size, width])
    layout = ExpertLayout(
        intermediate_size=width,
        num_experts=case.integer("num_experts", least=1),
        num_shared_experts=case.fields.get("num_shared_experts") or 0,
        shared_intermediate_size=case.fields.get("shared_expert_intermediate_size"),
    )
    order = snake_partition(case.tensor("importance_scores", [width]), layout)
    block = SparseMoE(
        hidden_size,
        layout.intermediate_size,
        layout.num_experts,
        1,
        layout.num_shared_experts,
        shared_intermediate_size=layout.shared_width,
    )
    block.gate_proj.copy_(gate_proj[order])
    block.up_proj.copy_(up_proj[order])
    block.down_proj.copy_(down_proj[:, order])
    return {f"moe.{key}": tensor for key, tensor in block.state_dict().items()}
