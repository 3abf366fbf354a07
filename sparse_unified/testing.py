# SPDX-License-Identifier: Apache-2.0
"""Replays recorded cases through the public API, so that anyone can compare it with a recording.

A case is `NAME.json` (configuration) and `NAME.safetensors` (weights under `model.*`, inputs, and
perhaps the recorded outputs, which are not looked at). Cases are trusted: a missing field or tensor
is named, but values are not checked beyond what the library itself checks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from sparse_unified._common import context, require
from sparse_unified.bagel import AutoEncoder, Bagel, LLMConfig, SamplingConfig, VAEConfig
from sparse_unified.bagel.config import SpecialTokens, read_config, vae_config
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.loading import check_tensors
from sparse_unified.bagel.pipeline import generate_tokens
from sparse_unified.bagel.sampler import build_guidance, sample_latents, see_images
from sparse_unified.bagel.tokenizer import SPECIAL_TEXTS
from sparse_unified.checkpoint.files import read_json
from sparse_unified.checkpoint.model_dir import scan_ffns
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor
from sparse_unified.experts import ExpertLayout, snake_partition
from sparse_unified.nn import SparseMoE

__all__ = ["Case", "read_case", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recorded case: its name, the fields of its JSON file, and its tensors."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the recorded module, under official keys."""
        named = self.tensors.items()
        return {k.removeprefix("model."): t for k, t in named if k.startswith("model.")}


def read_case(case_path: str | os.PathLike[str]) -> Case:
    """Reads a case, named by either of its files or by what their names have in common."""
    path = Path(case_path)
    if path.suffix in (".json", ".safetensors"):
        path = path.with_suffix("")
    files = [path.parent / f"{path.name}{suffix}" for suffix in (".json", ".safetensors")]
    for file in files:
        require(file.is_file(), "replay: case must consist of two files", f"no {file}")
    specs = read_header(files[1]).tensors
    return Case(
        name=path.name,
        fields=read_json(files[0]),
        tensors={key: read_tensor(spec) for key, spec in specs.items()},
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
        ValueError: a file is missing or damaged, or the case is of no known kind or incomplete.
    """
    case = read_case(case_path)
    kinds = {
        "num_timesteps": _replay_images,
        "length": _replay_answer,
        "ch_mult": _replay_vae,
        "top_k": _replay_block,
        "intermediate_size": _replay_partition,
    }
    with context(case.name), torch.no_grad():
        for field, run in kinds.items():
            if field in case.fields:
                try:
                    return run(case)
                except KeyError as error:
                    raise ValueError(f"case must hold {error}, got none") from error
        raise ValueError(f"fields must hold one of {', '.join(kinds)}, got {sorted(case.fields)}")


def build_model(case: Case) -> Bagel:
    """Returns the model of an image or answer case, with its weights."""
    fields, weights = case.fields, cast("Any", case.weights)
    whole = LLMConfig.from_json(fields["llm_config"])
    layers = {
        component: {n: replace(whole.layer(n, component), ffn=own.ffn) for n, own in ffns.items()}
        for component, ffns in scan_ffns(weights)[0].items()
    }
    source = SimpleNamespace(
        directory=f"{case.name}.safetensors",
        specs=weights,
        llm_config=fields["llm_config"],
        vit_config=fields["vit_config"],
        shapes=layers,
        top_k=(fields.get("moe") or {}).get("top_k"),
    )
    stated = fields["vae_config"]
    levels = stated["downsample"].bit_length()
    vae = VAEConfig(z_channels=stated["z_channels"], ch_mult=(1,) * levels)
    ids = fields["new_token_ids"]
    names = {name: name if name in ids else f"{name}_token_id" for name in SPECIAL_TEXTS}
    tokens = SpecialTokens(**{name: ids[own] for name, own in names.items()})
    config = read_config(source, vae, stated=fields, special_tokens=tokens)
    return _with_weights(Bagel(config, device="meta"), case)


def build_vae(case: Case) -> AutoEncoder:
    """Returns the autoencoder of a VAE case, with its weights."""
    names = ("scale_factor", "shift_factor")
    factors = {name: case.fields[name] for name in names if name in case.fields}
    config = vae_config(case.weights, where=f"{case.name}.safetensors", **factors)
    return _with_weights(AutoEncoder(config, device="meta"), case).eval()


def _with_weights(module: Any, case: Case) -> Any:
    """Gives a module on the meta device memory, and the weights of a case."""
    check_tensors(module, case.weights, where=f"{case.name}.safetensors")
    module.to_empty(device="cpu").load_state_dict(case.weights)
    return module


def _replay_images(case: Case) -> dict[str, Tensor]:
    names = [name for name in SamplingConfig.__slots__ if name in case.fields]
    config = SamplingConfig(**{name: case.fields[name] for name in names})
    model = build_model(case)
    prompts = _prompts(case)
    size = case.fields["image_size"]
    sizes = [size] * len(prompts) if _is_size(size) else size
    grids = [model.config.token_grid(*size) for size in sizes]
    noise = case.tensors["init_noise"].split([rows * columns for rows, columns in grids])
    guidance = build_guidance(model, prompts, images=_context_images(case, model, len(prompts)))
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
    latent = vae.encode(case.tensors["pixels"])
    return {"latent": latent, "decoded": vae.decode(latent)}


def _replay_block(case: Case) -> dict[str, Tensor]:
    fields, weights = case.fields, case.weights
    shared = weights.get("shared_expert.gate_proj.weight", torch.empty(0)).shape[0]
    width = weights["experts.0.gate_proj.weight"].shape[0]
    block = SparseMoE(
        fields["hidden_size"],
        fields["num_experts"] * width + shared,
        fields["num_experts"],
        fields["top_k"],
        fields.get("num_shared_experts") or 0,
        shared_intermediate_size=shared,
        gate_img="gate_img.weight" in weights,
        device="meta",
    )
    block = _with_weights(block, case)
    indexes = [case.tensors.get(f"packed_{name}_indexes") for name in ("text", "vit_token")]
    output, router_logits = block(case.tensors["input"], *indexes)
    return {"output": output, "router_logits": router_logits}


def _replay_partition(case: Case) -> dict[str, Tensor]:
    fields = case.fields
    layout = ExpertLayout(
        intermediate_size=fields["intermediate_size"],
        num_experts=fields["num_experts"],
        num_shared_experts=fields.get("num_shared_experts") or 0,
        shared_intermediate_size=fields.get("shared_expert_intermediate_size"),
    )
    order = snake_partition(case.tensors["importance_scores"], layout)
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (case.tensors[f"dense.{name}.weight"] for name in names)
    sizes = (gate.shape[1], layout.intermediate_size, layout.num_experts, 1)
    shared = layout.num_shared_experts
    block = SparseMoE(*sizes, shared, shared_intermediate_size=layout.shared_width)
    block.gate_proj.copy_(gate[order])
    block.up_proj.copy_(up[order])
    block.down_proj.copy_(down[:, order])
    return {f"moe.{key}": tensor for key, tensor in block.state_dict().items()}


def _prompts(case: Case) -> list[list[int]]:
    """Returns the token ids of each prompt; a flat list is one prompt."""
    ids = case.fields["prompt_ids"]
    return list(ids) if ids and isinstance(ids[0], list) else [ids]


def _is_size(value: Any) -> bool:
    """Whether a value is a height and a width in pixels, and not a list of them."""
    return bool(value) and isinstance(value[0], int)


def _numbered(case: Case, key: str) -> dict[int, Tensor]:
    """Returns context tensors by number, be they of one image, stacked, or numbered by name."""
    prefix = f"{key}."
    named = {int(n.removeprefix(prefix)): t for n, t in case.tensors.items() if prefix in n}
    if not named and key in case.tensors:
        named = {0: case.tensors[key]}
    stacks = {i: named[i].reshape(-1, *named[i].shape[-3:]) for i in sorted(named)}
    if all(len(stack) == 1 for stack in stacks.values()):
        return {i: stack[0] for i, stack in stacks.items()}
    return dict(enumerate(image for stack in stacks.values() for image in stack))


def _context_images(case: Case, model: Bagel, count: int) -> list[list[ContextImage]] | None:
    """Returns the images before each prompt.

    `context_image` is a (height, width) for all prompts, or for each a pair, a list of pairs or
    null; for one prompt it may also be the list of its pairs.
    """
    stated = case.fields.get("context_image")
    if not stated:
        return None
    entries = [stated] * count if _is_size(stated) else list(stated)
    entries = [entries] if count == 1 and len(entries) > 1 else entries
    rule = f"context_image must have one entry per prompt, {count}"
    require(len(entries) == count, rule, len(entries))
    slots: list[tuple[int, Any]] = []  # prompt, and the size of the image or None
    for prompt, entry in enumerate(entries):
        sizes = [entry] if not entry or _is_size(entry) else entry
        slots += [(prompt, size or None) for size in sizes]
    keys = ("context.latent", "context.vit_pixels")
    found = [_per_slot(case, key, [size for _, size in slots]) for key in keys]
    step, patch = model.config.latent_downsample, model.config.latent_patch_size
    images: list[list[ContextImage]] = [[] for _ in range(count)]
    for (prompt, size), latent, seen in zip(slots, *found, strict=True):
        if size is None:
            continue
        is_held = latent is not None or seen is not None
        require(is_held, "tensors must hold each context image", f"none of size {size}")
        if latent is not None:
            # Latents of one stack are padded to the largest of them.
            latent = latent[:, : size[0] // step * patch, : size[1] // step * patch]
        images[prompt].append(ContextImage(latent=latent, vit_pixels=seen))
    return images


def _per_slot(case: Case, key: str, slots: Sequence[Any]) -> list[Tensor | None]:
    """Returns one tensor, or None, per slot; slots that are None hold no image."""
    found = _numbered(case, key)
    if key in case.tensors and set(found) == {0}:
        return [found[0]] * len(slots)  # one for all
    places = [i for i, slot in enumerate(slots) if slot is not None]
    if set(found) == set(range(len(places))):  # prompts without an image are not counted
        found = {place: found[i] for i, place in enumerate(places)}
    elif key in case.tensors:
        require(len(found) == len(slots), f"{key} must hold {len(places)} images", len(found))
    return [found.get(i) if i in places else None for i in range(len(slots))]
