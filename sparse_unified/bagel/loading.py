# SPDX-License-Identifier: Apache-2.0
"""Weights from files into a model: which parts, on which devices, block by block.

Modules are described on the meta device, checked against the headers of the files, given memory on
their device, and filled by blocks of rows: host memory holds what stays there and one block more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_unified._common import StrPath, choice, list_some, optional, require
from sparse_unified.bagel.config import LLMConfig, SpecialTokens, read_config, vae_config
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.files import read_json
from sparse_unified.checkpoint.keys import FFN_NAMES, module_prefixes
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header, read_tensor
from sparse_unified.nn.sparse_moe import official_tensors
from sparse_unified.surgery.quantize import STORAGES, quantize_ffn_

LAYERS = "language_model.model.layers"
Device = torch.device | str | int
_FACTORS = ("scale_factor", "shift_factor")  # of the autoencoder
_BLOCK_BYTES = 64 * 2**20  # read at a time; an embedding of the released models has 1.1 GB


class Task(str, Enum):
    """What a model is loaded for; parts that the task never reads are left in the file."""

    ALL = "all"
    EDIT = "edit"  # images from texts and images
    IMAGE = "image"  # images from texts


class Offload(str, Enum):
    """What stays in host memory while the rest is on the device."""

    NONE = "none"
    UND = "und"  # the understanding FFNs


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How `load_bagel` lays out a model; see `BagelPipeline.from_pretrained` for the fields."""

    device: Device = "cpu"
    task: Task | str = Task.ALL
    offload: Offload | str = Offload.NONE
    storage: str | Mapping[str, str] | None = None
    device_map: str | Mapping[str, Device] | None = None
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: StrPath | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", choice("task", Task, self.task))
        object.__setattr__(self, "offload", choice("offload", Offload, self.offload))
        given = self.storage or {}
        storage = dict.fromkeys(FFN_NAMES, given) if isinstance(given, str) else dict(given)
        is_known = storage.keys() <= FFN_NAMES.keys() and set(storage.values()) <= set(STORAGES)
        rule = f"one of {', '.join(STORAGES)}, or map {' or '.join(FFN_NAMES)} to one of them"
        require(is_known, f"storage must be {rule}", repr(self.storage))
        is_whole = not storage and self.offload is Offload.NONE
        found = f"offload={Offload(self.offload).value!r}, storage={self.storage!r}"
        rule = "device_map must come without offload and storage"
        require(is_whole or self.device_map is None, rule, found)
        object.__setattr__(self, "storage", storage)

    def of_tensor(self, key: str) -> Device:
        """Returns where the tensor of this key lies while it is loaded."""
        if isinstance(self.device_map, Mapping):
            place = _longest(self.device_map, key)
            return "cpu" if place is None or place == "disk" else place
        inner = key.removeprefix(f"{LAYERS}.").partition(".")[2]
        if self.offload is Offload.UND and inner.startswith(f"{FFN_NAMES['und']}."):
            return "cpu"
        return self.device


def tensor_problems(module: nn.Module, specs: Mapping[str, TensorSpec | Tensor]) -> list[str]:
    """Returns every missing, extra and misshapen tensor of a file that holds `specs`, where it
    should hold those of a module, which may be on the meta device."""
    targets = official_tensors(module)
    problems = [f"missing {key} {list(targets[key].shape)}" for key in targets if key not in specs]
    for key, spec in specs.items():
        if key not in targets:
            problems.append(f"extra {key} {list(spec.shape)}")
        elif (wanted := targets[key].shape) != tuple(spec.shape):
            problems.append(f"misshapen {key} {list(spec.shape)}, not {list(wanted)}")
        elif not spec.dtype.is_floating_point:
            problems.append(f"{key} of {spec.dtype}, not floating point")
    return problems


def check_tensors(module: nn.Module, specs: Mapping[str, Any], *, where: str) -> None:
    """Raises one ValueError that lists the `tensor_problems` of a file with a module's tensors."""
    problems = tensor_problems(module, specs)
    require(not problems, f"{where}: tensors must be those of the model", list_some(problems, 20))


@torch.no_grad()
def fill_(
    module: nn.Module, specs: Mapping[str, TensorSpec], placement: Placement, prefix: str = ""
) -> None:
    """Gives memory to what is on the meta device below a module, whose keys start with `prefix`,
    and fills it from a file."""
    before = official_tensors(module, prefix)
    for path, owner in module.named_modules():
        at = f"{prefix}{path}." if path else prefix
        for name, tensor in owner._parameters.items():
            if tensor is not None and tensor.is_meta:
                full = torch.empty_like(tensor, device=placement.of_tensor(f"{at}{name}"))
                owner._parameters[name] = nn.Parameter(full, requires_grad=tensor.requires_grad)
    for key, target in official_tensors(module, prefix).items():
        if before[key].is_meta:
            _read(specs[key], target)


def _read(spec: TensorSpec, target: Tensor) -> None:
    """Copies a tensor of a file, blocks of rows at a time."""
    if spec.nbytes <= _BLOCK_BYTES:
        target.copy_(read_tensor(spec))
        return
    step = max(1, _BLOCK_BYTES * len(target) // spec.nbytes)
    for start in range(0, len(target), step):
        rows = target[start : start + step]
        rows.copy_(read_tensor(spec.rows(start, start + len(rows))))


def local_reader(model: nn.Module, specs: Mapping[str, TensorSpec]) -> Callable[[], None]:
    """Returns what fills a model that is on the meta device now, once it has memory. Modules may be
    wrapped, parametrized, and sharded by rows meanwhile; a process reads its own rows alone."""
    owners = {
        weight.untyped_storage()._cdata: (owner, name)
        for owner in model.modules()
        for name, weight in owner.named_parameters(recurse=False)
    }
    # Of each tensor of the file: its module and parameter, first row and column there, and sizes.
    places = []
    for key, view in official_tensors(model).items():
        owner, name = owners[view.untyped_storage()._cdata]
        row, column = divmod(int(view.storage_offset()), view.stride(0))
        places.append((specs[key], owner, name, row, column))

    @torch.no_grad()
    def read() -> None:
        owner: Any
        for spec, owner, name, row, column in places:
            if parametrize.is_parametrized(owner, name):
                owner, name = owner.parametrizations[name], "original"
            held, start = local_rows(owner._parameters[name])
            first, end = max(row, start), min(row + spec.shape[0], start + len(held))
            if first < end:
                target = held[first - start : end - start]
                if len(spec.shape) == 2:
                    target = target[:, column : column + spec.shape[1]]
                _read(spec.rows(first - row, end - row), target)

    return read


def local_rows(parameter: Any) -> tuple[Tensor, int]:
    """Returns the rows of a parameter that lie in this process, and the number of the first."""
    if not hasattr(parameter, "to_local"):
        return parameter, 0
    (chunk,) = parameter.__create_chunk_list__()  # as torch.distributed.checkpoint asks it
    return parameter.to_local(), chunk.offsets[0]


def load_bagel(
    directory: StrPath,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    special_tokens: SpecialTokens | None = None,
    placement: Placement | None = None,
    fill: bool = True,
) -> tuple[Bagel, AutoEncoder]:
    """Loads a dense, sparse or pruned model and its autoencoder from a directory.

    Args:
        directory: holds the weights, llm_config.json, vit_config.json, ae.safetensors and, if
            there is one, config.json.
        device: where all of it goes.
        dtype: of the weights; None keeps that of each file.
        special_tokens: ids of the markers; None takes those of the released checkpoints.
        placement: which parts go where, and how they are stored, in the place of `device`.
        fill: False leaves the weights of the model on the meta device, see `local_reader`.

    Raises:
        ValueError: a file is missing or damaged, or keys, shapes and JSON files disagree.
    """
    placement = placement or Placement(device=device)
    checkpoint, stated_file = Checkpoint(directory), Path(directory) / "config.json"
    stated = read_json(stated_file) if stated_file.exists() else {}

    # The autoencoder: its shapes say how it is built, but for two factors that no shape shows.
    specs, where = read_header(checkpoint.vae_file).tensors, os.fspath(checkpoint.vae_file)
    given = stated.get("vae_config")
    given = given if isinstance(given, Mapping) else {}
    factors = {k: given[k] for k in _FACTORS if isinstance(given.get(k), (int, float))}
    vae_dtype = dtype or specs["decoder.conv_in.weight"].dtype
    vae = AutoEncoder(vae_config(specs, where=where, **factors), device="meta", dtype=vae_dtype)
    check_tensors(vae.eval(), specs, where=where)
    fill_(vae, specs, Placement(device=placement.device))

    config = read_config(checkpoint, vae.config, stated=stated, special_tokens=special_tokens)
    specs = checkpoint.specs
    dtype = dtype or specs["language_model.model.embed_tokens.weight"].dtype
    model = Bagel(config, device="meta", dtype=dtype)
    check_tensors(model, specs, where=os.fspath(directory))
    if not fill:
        return model, vae
    if prefixes := unneeded(config.llm, Task(placement.task)):
        leave_out(model, prefixes)
    if placement.device_map is not None:
        placement = replace(placement, device_map=plan_device_map(model, placement))
    assert isinstance(placement.storage, Mapping)
    layers: Any = model.language_model.model.layers
    for index, layer in enumerate(layers):
        layer.und_on_host = placement.offload is Offload.UND
        for component, storage in placement.storage.items():
            name = FFN_NAMES[component]
            if (ffn := getattr(layer, name)) is not None:
                # One by one, so that a device holds one FFN more than it has to.
                fill_(ffn, specs, placement, prefix=f"{LAYERS}.{index}.{name}.")
                quantize_ffn_(ffn.requires_grad_(False), storage)
    fill_(model, specs, placement)
    if placement.device_map is not None:
        _dispatch(model, placement)
    return model, vae


def unneeded(config: LLMConfig, task: Task) -> tuple[str, ...]:
    """Returns the starts of the keys that a task never reads.

    Images are read off the gen stream, so nothing sees what the last layer's und FFN makes, nor the
    head. Every other und weight is needed: prompts pass through it, and so do, in each step, the
    two markers of the image. From texts alone, the ViT is not needed either.
    """
    if task is Task.ALL:
        return ()
    last = config.num_hidden_layers - 1
    names = (FFN_NAMES["und"], "post_attention_layernorm")
    prefixes = ("language_model.lm_head.", *module_prefixes(last, names))
    if task is Task.IMAGE:
        prefixes += ("vit_model.", "connector.", "vit_pos_embed.")
    return prefixes


def leave_out(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Takes modules out of a model: what stands there is None."""
    for prefix in prefixes:
        path, _, name = prefix.rstrip(".").rpartition(".")
        setattr(model.get_submodule(path), name, None)


def plan_device_map(model: nn.Module, placement: Placement) -> dict[str, Device]:
    """Returns where each part of a model on the meta device goes, for accelerate.

    "auto" fills devices with decoder layers in turn, by `max_memory`. A mapping is taken as it is;
    what it does not name goes to `device`, and so must all that is no decoder layer.
    """
    device_map, device = placement.device_map, placement.device
    layers = model.get_submodule(LAYERS)
    known = dict(model.named_modules())
    above = {LAYERS[:end] for end, c in enumerate(LAYERS) if c == "."} | {"", LAYERS}
    # The largest modules without decoder layers in them.
    outside = [
        path for path in known if path not in above and path.rpartition(".")[0] in above - {LAYERS}
    ]
    if device_map == "auto":
        utils, main = _accelerate("utils"), torch.device(device)
        limits = dict(placement.max_memory) if placement.max_memory else None
        room = dict(utils.get_max_memory(limits))
        name = main.type if main.type == "cpu" else main.index or 0
        if name in room:
            taken = sum(w.nbytes for path in outside for w in known[path].parameters())
            room[name] = max(0, room[name] - taken)
        filled = utils.infer_auto_device_map(
            layers, max_memory=room, no_split_module_classes=["DecoderLayer"]
        )
        placed = {f"{LAYERS}.{path}".rstrip("."): place for path, place in filled.items()}
        return {**dict.fromkeys(outside, device), **placed}
    if not isinstance(device_map, Mapping):
        rule = "'auto' or a mapping of module paths to devices"
        raise ValueError(f"device_map must be {rule}, got {device_map!r}")
    rule = f"device_map may place {LAYERS} and what is below; all else is on {device}"
    for path, place in device_map.items():
        require(path in known, "device_map must name modules", repr(path))
        is_layer = f"{path}.".startswith(f"{LAYERS}.")
        require(is_layer or str(place) == str(device), rule, f"{path!r} on {place!r}")
    rest = (*outside, *(f"{LAYERS}.{name}" for name, _ in layers.named_children()))
    placed = dict.fromkeys((path for path in rest if _longest(device_map, path) is None), device)
    return {**placed, **device_map}


def _dispatch(model: nn.Module, placement: Placement) -> None:
    """Lets accelerate put its hooks on a loaded model."""
    device_map, folder = placement.device_map, placement.offload_folder
    assert isinstance(device_map, Mapping)
    needs = "disk" in device_map.values()
    require(folder or not needs, "offload_folder must be given for what goes to disk", folder)
    # Hooks ask for parameters by name; the state dict of a sparse FFN has those of its experts.
    state = {key: weight.detach() for key, weight in model.named_parameters()}
    on_disk = {key: tensor for key, tensor in state.items() if _longest(device_map, key) == "disk"}
    if on_disk:
        _accelerate("utils").offload_state_dict(folder, on_disk)
    _accelerate("big_modeling").dispatch_model(
        model,
        dict(device_map),
        main_device=placement.device,
        state_dict=state,
        offload_dir=folder,
        preload_module_classes=["SparseMoE"],  # it reads its routers without calling them
        force_hooks=True,
    )


def _accelerate(module: str) -> Any:
    return optional(f"accelerate.{module}", "offload", purpose="device_map")


def _longest(device_map: Mapping[str, Device], key: str) -> Device | None:
    """Returns the place of the longest path in a map that is the start of a key."""
    while key and key not in device_map:
        key = key.rpartition(".")[0]
    return device_map.get(key)
