# SPDX-License-Identifier: Apache-2.0
"""Decoders of transformers that were made sparse, narrower or shallower: to disk and back.

Weights and configuration are what transformers writes, experts under their official keys. What
neither tells, which modules stand where and how many experts a token uses, is in
`sparse_unified_decoder.json`; shapes are those of the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import StrPath, context, list_some, optional
from sparse_unified.checkpoint import files, keys
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.decoder import Decoder, find_adapter
from sparse_unified.surgery.ffn import Skipped
from sparse_unified.surgery.others import number_anew, tell_counts

STRUCTURE = "sparse_unified_decoder.json"
_MOE = ("hidden_size", "intermediate_size", "num_experts", "top_k", "num_shared_experts")
_MOE_FORM = {**dict.fromkeys(_MOE, (int,)), "shared": (int,), "returns_logits": (bool,)}


@context("save_pretrained")
def save_pretrained(model: Any, directory: StrPath, **options: Any) -> None:
    """Writes a transformers model whose decoder layers were changed, for `from_pretrained`.

    Args:
        model: of transformers, changed by `apply_moe_`, `prune_width_`, `prune_heads_` or
            `skip_layers_`.
        directory: to write to; made if it is not there.
        options: of the model's own `save_pretrained`.

    Raises:
        ValueError: the model has no decoder layers of a known structure. TypeError: it is no model
            of transformers.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TypeError(f"model must be one of transformers, got {type(model).__name__}")
    adapter = find_adapter(model)
    names = map(adapter.names, adapter.components)
    of_layer = [norm for own in names for norm in (own.input_norm, own.post_attention_norm)]
    norms = {f"{adapter.path}.{i}.{norm}" for i in range(adapter.num_layers()) for norm in of_layer}
    moe, skipped, left_out = {}, {}, []
    for path, module in model.named_modules():
        if isinstance(module, SparseMoE):
            shared = module.layout.shared_width
            own = {name: getattr(module, name) for name in _MOE}
            moe[path] = {**own, "shared": shared, "returns_logits": module.return_router_logits}
        elif isinstance(module, Skipped):
            skipped[path] = module.values
        elif isinstance(module, nn.Identity) and path in norms:
            left_out.append(path)
    model.save_pretrained(directory, **options)
    structure = {"version": 1, "moe": moe, "skipped": skipped, "left_out": left_out}
    text = json.dumps(structure, indent=2) + "\n"
    files.replace_file(Path(directory) / STRUCTURE, text.encode())


@context("from_pretrained")
def from_pretrained(
    directory: StrPath, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """Loads what `save_pretrained` wrote, in inference mode; no weight is left as it was drawn.

    Args:
        directory: the model directory.
        dtype: of the weights; None is that of the files.
        device: where the model goes.

    Raises:
        ValueError: the directory is of something else, or its tensors are not those of the model.
    """
    folder = Path(directory)
    structure: Any = files.read_json(folder / STRUCTURE)
    form = {"version": (int,), "moe": {str: _MOE_FORM}, "skipped": {str: (int,)}}
    if not files.has_form(structure, {**form, "left_out": [(str,)]}):
        raise ValueError(f"{folder / STRUCTURE}: must be as save_pretrained writes it")
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {key: read_tensor(spec) for key, spec in read_header(path).tensors.items()}
    if not tensors:
        raise ValueError(f"{folder}: directory must hold safetensors files, got none")
    transformers = optional("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"{folder}: architectures must name a class of transformers, got {name!r}")
    model = getattr(transformers, name)(config)
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    model.to(dtype or stored)
    _rebuild(model, structure)
    for path, weight in list(model.named_parameters()):
        if path in tensors and tensors[path].shape != weight.shape:
            _resize(model.get_submodule(path.rpartition(".")[0]), path, tensors[path])
    _count_heads(find_adapter(model))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = tuple(
        model.state_dict().keys() & dict.fromkeys(getattr(model, "_tied_weights_keys", ()))
    )
    if problems := [*unexpected, *(key for key in missing if key not in tied)]:
        raise ValueError(f"{folder}: tensors must be those of the model, got {list_some(problems)}")
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        values = files.read_json(folder / "generation_config.json")
        model.generation_config = transformers.GenerationConfig.from_dict(values)
    return model.to(device).eval()


def _rebuild(model: nn.Module, structure: Any) -> None:
    """Puts empty sparse blocks and what stands for skipped parts into a dense model."""
    like = next(model.parameters())
    new: dict[str, nn.Module] = dict.fromkeys(structure["left_out"], nn.Identity())
    for path, values in structure["skipped"].items():
        new[path] = Skipped(values, like)
    for path, own in structure["moe"].items():
        new[path] = SparseMoE(
            **{name: own[name] for name in _MOE},
            shared_intermediate_size=own["shared"],
            gate_shared=False,
            return_router_logits=own["returns_logits"],
            dtype=like.dtype,
        )
    for path, module in new.items():
        holder, _, name = path.rpartition(".")
        setattr(model.get_submodule(holder), name, module)
    adapter = find_adapter(model)
    name = adapter.names(adapter.components[0]).attention
    attentions = [getattr(layer, name) for layer in adapter.layers]
    kept = [module for module in attentions if not isinstance(module, Skipped)]
    if len(kept) < len(attentions):
        number_anew(adapter, adapter.components[0], kept)


def _resize(owner: nn.Module, path: str, tensor: Tensor) -> None:
    name = path.rpartition(".")[2]
    old = getattr(owner, name)
    if not isinstance(owner, nn.Linear):
        was, now = list(old.shape), list(tensor.shape)
        raise ValueError(f"{path} must have the shape {was}, got {now}")
    setattr(owner, name, nn.Parameter(old.new_empty(tensor.shape), old.requires_grad))
    if name == "weight":
        owner.out_features, owner.in_features = tensor.shape


def _count_heads(adapter: Decoder) -> None:
    for layer in adapter.layers:
        module: Any = getattr(layer, adapter.names(adapter.components[0]).attention)
        if isinstance(module, Skipped) or not hasattr(module, "head_dim"):
            continue
        names = keys.ATTENTION_PROJECTIONS[:2]
        parts: list[Any] = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in parts):
            tell_counts(module, *(part.out_features // module.head_dim for part in parts))
