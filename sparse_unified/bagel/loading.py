# SPDX-License-Identifier: Apache-2.0
"""Weights from files into a model, block by block.

Modules are described on the meta device, checked against the headers of the files, given memory
on their device, and filled block of rows by block of rows. Host memory holds the weights that stay
there and one small block more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.bagel.config import BagelConfig, SpecialTokens, VAEConfig
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.placement import (
    Device,
    Placement,
    dispatch,
    layer_ffns,
    leave_out,
    plan_device_map,
    unneeded,
)
from sparse_unified.bagel.shapes import bagel_config, vae_config
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint import Checkpoint, TensorSpec
from sparse_unified.checkpoint.reader import read_json
from sparse_unified.checkpoint.safetensors_file import read_header, read_tensor
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.stored import is_packed
from sparse_unified.surgery.storage import quantize_ffn_

_BLOCK_BYTES = 64 * 2**20  # read at a time; an embedding of the released models has 1.1 GB


def official_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Returns every parameter under its official key; those of a sparse FFN are views per expert.

    Copying into these tensors loads the module.
    """
    if isinstance(module, SparseMoE) and not is_packed(module.gate_proj):
        return {prefix + key: view for key, view in module.official_views().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters(recurse=False):
        found[prefix + name] = tensor
    for name, child in module.named_children():
        found |= official_tensors(child, f"{prefix}{name}.")
    return found


def check_tensors(
    targets: Mapping[str, Tensor], specs: Mapping[str, TensorSpec | Tensor], *, where: str
) -> None:
    """Raises one ValueError that lists every missing, extra and misshapen tensor of a file."""
    problems = [f"missing {key} {list(targets[key].shape)}" for key in targets if key not in specs]
    problems += [f"extra {key} {list(specs[key].shape)}" for key in specs if key not in targets]
    for key in targets:
        if key not in specs:
            continue
        spec = specs[key]
        if tuple(targets[key].shape) != tuple(spec.shape):
            shape = list(targets[key].shape)
            problems.append(f"misshapen {key} {list(spec.shape)}, not {shape}")
        elif not spec.dtype.is_floating_point:
            problems.append(f"{key} of {spec.dtype}, not floating point")
    if problems:
        raise ValueError(f"{where}: tensors must be those of the model, got " + "; ".join(problems))


def _blocks(spec: TensorSpec) -> Iterator[tuple[slice | EllipsisType, TensorSpec]]:
    """Yields the parts of a tensor that are read one at a time, and the rows each belongs to."""
    if spec.nbytes <= _BLOCK_BYTES or not spec.shape:
        yield ..., spec
        return
    count = spec.shape[0]
    step = max(1, _BLOCK_BYTES * count // spec.nbytes)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), spec.rows(start, stop)


@torch.no_grad()
def fill_(
    module: nn.Module,
    specs: Mapping[str, TensorSpec],
    *,
    device: torch.device | str,
    where: str,
) -> None:
    """Moves a module from the meta device to `device` and fills it from a file.

    Tensors are read in blocks of whole rows of at most 64 MiB, or of one row if that is larger.

    Raises:
        ValueError: the file does not hold exactly the tensors of the module.
    """
    check_tensors(official_tensors(module), specs, where=where)
    fill_part_(module, specs, Placement(device=device), where=where)


@torch.no_grad()
def fill_part_(
    module: nn.Module,
    specs: Mapping[str, TensorSpec],
    placement: Placement,
    *,
    where: str,
    prefix: str = "",
) -> None:
    """Gives memory to what is on the meta device below a module, and fills it from a file.

    Args:
        specs: of the whole model; those whose module is left out are not read.
        placement: where each tensor goes. prefix: the start of the module's keys.
    """
    targets = official_tensors(module, prefix)
    unfilled = [key for key, tensor in targets.items() if tensor.is_meta]
    for path, owner in module.named_modules():
        at = f"{prefix}{path}." if path else prefix
        for held in (owner._parameters, owner._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                full = torch.empty_like(tensor, device=placement.of_tensor(f"{at}{name}"))
                held[name] = (
                    nn.Parameter(full, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else full
                )
    targets = official_tensors(module, prefix)
    for key in unfilled:
        for rows, block in _blocks(specs[key]):
            targets[key][rows].copy_(read_tensor(block, what=f"{where}: {key}"))


def load_vae(
    file: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    stated: Mapping[str, object] | None = None,
) -> AutoEncoder:
    """Loads an autoencoder; its shapes say how it is built.

    Args:
        dtype: of the weights; None keeps that of the file.
        stated: `vae_config` of config.json, for the two factors that no shape shows.
    """
    specs = read_header(file).tensors
    factors = {
        name: float(value)
        for name in ("scale_factor", "shift_factor")
        if isinstance(value := (stated or {}).get(name), int | float)
    }
    where = os.fspath(file)
    config = vae_config({key: spec.shape for key, spec in specs.items()}, where=where, **factors)
    dtype = dtype or specs["decoder.conv_in.weight"].dtype
    vae = AutoEncoder(config, device="meta", dtype=dtype).eval()
    fill_(vae, specs, device=device, where=where)
    return vae


def read_config(
    checkpoint: Checkpoint,
    vae: VAEConfig,
    *,
    stated: Mapping[str, object] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> BagelConfig:
    """Returns the description of the model of a checkpoint, from headers and JSON files alone.

    Args:
        vae: its autoencoder. stated: config.json, if there is one.
        special_tokens: ids of the markers; None takes those of the released checkpoints.

    Raises:
        ValueError: keys, shapes and JSON files disagree.
    """
    moe = checkpoint.moe
    return bagel_config(
        {key: spec.shape for key, spec in checkpoint.specs.items()},
        checkpoint.llm_config,
        checkpoint.vit_config,
        latent_channels=vae.z_channels,
        vae_downsample=vae.downsample,
        special_tokens=special_tokens or SpecialTokens(),
        top_k=None if moe is None else moe.top_k,
        num_shared_experts=0 if moe is None else moe.num_shared_experts,
        pruned=checkpoint.held,
        stated=stated or {},
        where=os.fspath(checkpoint.directory),
    )


def load_bagel(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    special_tokens: SpecialTokens | None = None,
    placement: Placement | None = None,
    device_map: str | Mapping[str, Device] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[Bagel, AutoEncoder]:
    """Loads a dense, sparse or pruned model and its autoencoder from a directory.

    Args:
        directory: holds the weights, llm_config.json, vit_config.json, ae.safetensors and, if
            there is one, config.json.
        dtype: of the weights; None keeps that of each file.
        special_tokens: ids of the markers; None takes those of the released checkpoints.
        placement: which parts go where, and how they are stored, in the place of `device`.
        device_map, max_memory, offload_folder: see `BagelPipeline.from_pretrained`.

    Raises:
        ValueError: a file is missing or damaged, or keys, shapes and JSON files disagree.
    """
    checkpoint = Checkpoint(directory)
    stated_file = Path(directory) / "config.json"
    stated = read_json(stated_file) if stated_file.exists() else {}
    stated_vae = stated.get("vae_config")
    vae = load_vae(
        checkpoint.vae_file,
        device=device,
        dtype=dtype,
        stated=stated_vae if isinstance(stated_vae, dict) else None,
    )
    config = read_config(checkpoint, vae.config, stated=stated, special_tokens=special_tokens)
    specs = checkpoint.specs
    dtype = dtype or specs["language_model.model.embed_tokens.weight"].dtype
    model = Bagel(config, device="meta", dtype=dtype)
    check_tensors(official_tensors(model), specs, where=os.fspath(directory))
    placement = placement if placement is not None else Placement(device=device)
    leave_out(model, unneeded(config.llm, placement.task))
    if device_map is not None:
        planned = plan_device_map(model, device_map, device=placement.device, max_memory=max_memory)
        placement = replace(placement, device_map=planned)
    for prefix in layer_ffns(config.llm.num_hidden_layers):
        storage = placement.storage_of(prefix)
        ffn = reduce(lambda at, name: getattr(at, name), prefix[:-1].split("."), model)
        if storage is not None and isinstance(ffn, nn.Module):
            # One by one, so that a device holds one FFN more than it has to.
            fill_part_(ffn, specs, placement, where=os.fspath(directory), prefix=prefix)
            quantize_ffn_(ffn.requires_grad_(False), storage)
    fill_part_(model, specs, placement, where=os.fspath(directory))
    if placement.device_map is not None:
        dispatch(model, placement.device_map, device=placement.device, folder=offload_folder)
    return model, vae
