# SPDX-License-Identifier: Apache-2.0
"""Replays recorded cases through the public API, so that anyone can compare it with a recording.

A case is `NAME.json` (configuration) and `NAME.safetensors` (weights under `model.*`, inputs, and
perhaps the recorded outputs, which are not looked at).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_unified.bagel import (
    AutoEncoder,
    Bagel,
    ContextImage,
    SamplingConfig,
    SpecialTokens,
    VAEConfig,
    build_guidance,
    generate_tokens,
    sample_latents,
)
from sparse_unified.bagel.conditioning import see_images
from sparse_unified.bagel.shapes import bagel_config
from sparse_unified.nn import SparseMoE
from sparse_unified.partition import ExpertLayout, snake_partition


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recorded case: its name, the fields of its JSON file, and its tensors."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the recorded module, under official keys."""
        prefix = "model."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def tensor(self, key: str) -> Tensor:
        """Returns an input.

        Raises:
            ValueError: the case lacks it.
        """
        if key not in self.tensors:
            inputs = sorted(key for key in self.tensors if not key.startswith("model."))
            raise ValueError(f"{self.name}: tensors must hold {key}, got {', '.join(inputs)}")
        return self.tensors[key]


def read_case(case_path: str | os.PathLike[str]) -> Case:
    """Reads a case, named by either of its files or by what their names have in common.

    Raises:
        ValueError: one of the two files is missing.
    """
    path = Path(case_path)
    if path.suffix in (".json", ".safetensors"):
        path = path.with_suffix("")
    files = [path.parent / f"{path.name}{suffix}" for suffix in (".json", ".safetensors")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"replay: case must consist of two files, got no {file}")
    return Case(
        name=path.name, fields=json.loads(files[0].read_text()), tensors=load_file(files[1])
    )


def replay(case_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Computes the outputs of a recorded case from its configuration, weights and inputs.

    Args:
        case_path: `NAME`, `NAME.json` or `NAME.safetensors`.

    Returns:
        By kind of case: `output` and `router_logits` of a sparse FFN block; `moe.*` of a
        partition; `latent.0`, `latent.1`, ... of images; `token_ids` of an answer; `latent` and
        `decoded` of an autoencoder.

    Raises:
        ValueError: the case is incomplete or of no known kind.
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
            with torch.no_grad():
                return run(case)
    raise ValueError(
        f"{case.name}: fields must hold one of {', '.join(kinds)}, got {sorted(case.fields)}"
    )


def build_model(case: Case) -> Bagel:
    """Returns the model of an image or answer case, with its weights."""
    fields, moe = case.fields, case.fields.get("moe") or {}
    markers = fields["new_token_ids"]
    config = bagel_config(
        {key: tuple(tensor.shape) for key, tensor in case.weights.items()},
        fields["llm_config"],
        fields["vit_config"],
        latent_channels=fields["vae_config"]["z_channels"],
        vae_downsample=fields["vae_config"]["downsample"],
        special_tokens=SpecialTokens(
            bos=markers["bos_token_id"],
            eos=markers["eos_token_id"],
            start_of_image=markers["start_of_image"],
            end_of_image=markers["end_of_image"],
        ),
        top_k=moe.get("top_k"),
        num_shared_experts=moe.get("num_shared_experts") or 0,
        stated=fields,
        where=case.name,
    )
    model = Bagel(config)
    model.load_state_dict(case.weights)
    return model


def build_vae(case: Case) -> AutoEncoder:
    """Returns the autoencoder of a VAE case, with its weights."""
    names = VAEConfig.__slots__
    vae = AutoEncoder(VAEConfig(**{n: case.fields[n] for n in names if n in case.fields})).eval()
    vae.load_state_dict(case.weights)
    return vae


def _pairs(value: Sequence[Any], count: int) -> list[tuple[int, int]]:
    """Reads a pair, or one pair per image."""
    listed = [value] * count if isinstance(value[0], int) else list(value)
    return [(pair[0], pair[1]) for pair in listed]


def _prompts(case: Case) -> list[list[int]]:
    """Returns the token ids of each prompt; a flat list is one prompt."""
    ids = case.fields["prompt_ids"]
    return list(ids) if ids and isinstance(ids[0], list) else [ids]


def _numbered(case: Case, key: str) -> dict[int, Tensor]:
    """Returns context tensors by number, be they of one image, stacked, or numbered by name."""
    prefix = f"{key}."
    named = {int(k[len(prefix) :]): t for k, t in case.tensors.items() if k.startswith(prefix)}
    if not named and key in case.tensors:
        named = {0: case.tensors[key]}
    stacks = {i: named[i].reshape(-1, *named[i].shape[-3:]) for i in sorted(named)}
    if all(len(stack) == 1 for stack in stacks.values()):
        return {i: stack[0] for i, stack in stacks.items()}
    return dict(enumerate(image for stack in stacks.values() for image in stack))


def _per_image(case: Case, key: str, slots: Sequence[Any]) -> list[Tensor | None]:
    """Returns one tensor, or None, per slot; slots that are None hold no image."""
    places = [i for i, slot in enumerate(slots) if slot is not None]
    found = _numbered(case, key)
    if key in case.tensors and set(found) == {0}:
        return [found[0]] * len(slots)  # one for all
    # Prompts without an image may be counted or not.
    counted = set(found) != set(range(len(places)))
    own = {place: found.get(place if counted else i) for i, place in enumerate(places)}
    missing = key in case.tensors and any(tensor is None for tensor in own.values())
    if missing or not set(found) <= set(range(len(slots))):
        raise ValueError(
            f"{case.name}: {key} must hold {len(places)} images, got numbers {sorted(found)}"
        )
    return [own.get(i) for i in range(len(slots))]


def _context_images(case: Case, model: Bagel, count: int) -> list[list[ContextImage]] | None:
    """Returns the images before each prompt.

    `context_image` is a (height, width) for all prompts, or for each a pair, a list of pairs or
    null; for one prompt it may also be the list of its pairs.
    """
    stated = case.fields.get("context_image")
    if not stated:
        return None
    entries = [stated] * count if isinstance(stated[0], int) else list(stated)
    entries = [entries] if count == 1 and len(entries) > 1 else entries
    if len(entries) != count:
        raise ValueError(
            f"{case.name}: context_image must have one entry per prompt, {count}, got {stated}"
        )
    own = [[e] if not e or isinstance(e[0], int) else list(e) for e in entries]
    slots = [(prompt, size or None) for prompt, sizes in enumerate(own) for size in sizes]
    sizes = [size for _, size in slots]
    latents = _per_image(case, "context.latent", sizes)
    pixels = _per_image(case, "context.vit_pixels", sizes)
    step, patch = model.config.latent_downsample, model.config.latent_patch_size
    images: list[list[ContextImage]] = [[] for _ in range(count)]
    for (prompt, size), latent, seen in zip(slots, latents, pixels, strict=True):
        if size is None:
            continue
        if latent is None and seen is None:
            raise ValueError(f"{case.name}: tensors must hold each context image, got no {size}")
        if latent is not None:
            # Latents of one stack are padded to the largest of them.
            latent = latent[:, : size[0] // step * patch, : size[1] // step * patch]
        images[prompt].append(ContextImage(latent=latent, vit_pixels=seen))
    return images


def _replay_images(case: Case) -> dict[str, Tensor]:
    fields = case.fields
    model = build_model(case)
    prompts = _prompts(case)
    sizes = _pairs(fields["image_size"], len(prompts))
    grids = [model.config.token_grid(*size, where=case.name) for size in sizes]
    names = SamplingConfig.__slots__
    config = SamplingConfig(**{name: fields[name] for name in names if name in fields})
    guidance = build_guidance(model, prompts, images=_context_images(case, model, len(prompts)))
    noise = case.tensor("init_noise").split([rows * columns for rows, columns in grids])
    latents = sample_latents(model, guidance, noise, grids, config)
    return {f"latent.{i}": latent for i, latent in enumerate(latents)}


def _replay_answer(case: Case) -> dict[str, Tensor]:
    model = build_model(case)
    contexts = model.new_contexts(1)
    seen = _numbered(case, "context.vit_pixels").values()
    see_images(model, contexts, [[ContextImage(vit_pixels=pixels) for pixels in seen]])
    model.prefill_text(contexts, _prompts(case)[:1])
    ids = generate_tokens(model, contexts, max_length=case.fields["length"])
    return {"token_ids": torch.tensor(ids[0])}


def _replay_vae(case: Case) -> dict[str, Tensor]:
    vae = build_vae(case)
    latent = vae.encode(case.tensor("pixels"))
    return {"latent": latent, "decoded": vae.decode(latent)}


def _replay_block(case: Case) -> dict[str, Tensor]:
    fields, weights = case.fields, case.weights
    shared = weights.get("shared_expert.gate_proj.weight", torch.empty(0))
    width = case.tensor("model.experts.0.gate_proj.weight").shape[0]
    block = SparseMoE(
        fields["hidden_size"],
        fields["num_experts"] * width + shared.shape[0],
        fields["num_experts"],
        fields["top_k"],
        fields.get("num_shared_experts") or 0,
        shared_intermediate_size=shared.shape[0],
        gate_img="gate_img.weight" in weights,
    )
    block.load_state_dict(weights)
    output, router_logits = block(
        case.tensor("input"),
        case.tensors.get("packed_text_indexes"),
        case.tensors.get("packed_vit_token_indexes"),
    )
    return {"output": output, "router_logits": router_logits}


def _replay_partition(case: Case) -> dict[str, Tensor]:
    fields = case.fields
    layout = ExpertLayout(
        intermediate_size=fields["intermediate_size"],
        num_experts=fields["num_experts"],
        num_shared_experts=fields.get("num_shared_experts") or 0,
        shared_intermediate_size=fields.get("shared_expert_intermediate_size"),
    )
    order = snake_partition(case.tensor("importance_scores"), layout)
    gate_proj = case.tensor("dense.gate_proj.weight")
    block = SparseMoE(
        gate_proj.shape[1],
        layout.intermediate_size,
        layout.num_experts,
        1,
        layout.num_shared_experts,
        shared_intermediate_size=layout.shared_width,
    )
    block.gate_proj.copy_(gate_proj[order])
    block.up_proj.copy_(case.tensor("dense.up_proj.weight")[order])
    block.down_proj.copy_(case.tensor("dense.down_proj.weight")[:, order])
    return {f"moe.{key}": tensor for key, tensor in block.state_dict().items()}
