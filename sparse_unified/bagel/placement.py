# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model are loaded, where they lie, and how FFN weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import nn

from sparse_unified._common import optional
from sparse_unified.bagel.config import LLMConfig
from sparse_unified.checkpoint.keys import FFN_NAMES, layer_prefix, module_prefixes
from sparse_unified.surgery.storage import STORAGES

LAYERS = "language_model.model.layers"
Device = torch.device | str | int
_Choice = TypeVar("_Choice", bound=Enum)


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
    """How `load_bagel` lays out a model.

    Args:
        device: of all that is not placed elsewhere.
        task: see `unneeded`.
        offload: UND keeps the understanding FFNs on the CPU, see `bagel.decoder.run_ffn`.
        storage: {"und": ..., "gen": ...}: FFNs stored as "int8" or "fp8"; others as they are.
        device_map: module path -> device, "cpu" or "disk", carried out by accelerate.
    """

    device: Device = "cpu"
    task: Task = Task.ALL
    offload: Offload = Offload.NONE
    storage: Mapping[str, str] | None = None
    device_map: Mapping[str, Device] | None = None

    def of_tensor(self, key: str) -> Device:
        """Returns where the tensor of this key lies while it is loaded."""
        if self.device_map is not None:
            return _in_memory(_longest(self.device_map, key))
        inner = key.removeprefix(f"{LAYERS}.").partition(".")[2]
        if self.offload is Offload.UND and inner.startswith(f"{FFN_NAMES['und']}."):
            return "cpu"
        return self.device

    def storage_of(self, key: str) -> str | None:
        """Returns how the FFN that this key starts with is stored; None as it is."""
        name = key.rstrip(".").rpartition(".")[2]
        for component, ffn in FFN_NAMES.items():
            if name == ffn:
                return (self.storage or {}).get(component)
        return None


def choice(kind: type[_Choice], value: object, what: str) -> _Choice:
    """Returns the member of an enum that a value names; ValueError lists them all."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{what} must be one of {', '.join(member.value for member in kind)}, got {value!r}"
        ) from None


def storages(storage: str | Mapping[str, str] | None, *, where: str) -> dict[str, str]:
    """Returns {component: how its FFNs are stored} of what `from_pretrained` was given."""
    given = {} if storage is None else storage
    by_component = dict.fromkeys(FFN_NAMES, given) if isinstance(given, str) else dict(given)
    for component, kind in by_component.items():
        if component not in FFN_NAMES or kind not in STORAGES:
            raise ValueError(
                f"{where}: storage must be one of {', '.join(STORAGES)}, or map "
                f"{' or '.join(FFN_NAMES)} to one of them, got {storage!r}"
            )
    return by_component


def unneeded(config: LLMConfig, task: Task) -> tuple[str, ...]:
    """Returns the starts of the keys that a task never reads; without them its images are the same.

    Images are read off the gen stream, so nothing sees what the last layer's und FFN makes, nor the
    head. Every other und weight is needed: prompts pass through it, and so do, in each step, the
    two markers of the image, whose keys and values the image sees. From texts alone, the ViT and
    what belongs to it is not needed either.
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


def plan_device_map(
    model: nn.Module,
    device_map: str | Mapping[str, Device],
    *,
    device: Device,
    max_memory: Mapping[Any, Any] | None,
) -> dict[str, Device]:
    """Returns where each part of a model goes, for accelerate.

    Args:
        model: on the meta device.
        device_map: "auto" fills devices with decoder layers in turn, by `max_memory`; a mapping of
            module paths is taken as it is, and what it does not name goes to `device`.
        device: of all that is no decoder layer, which has to be in one place.
        max_memory: bytes by device as accelerate takes them; None is what it finds free.

    Raises:
        ValueError: a path names nothing, or what is no decoder layer is not on `device`.
        ImportError: accelerate is not installed.
    """
    where = "from_pretrained"
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(
                f"{where}: device_map must be 'auto' or a mapping of module paths to devices, "
                f"got {device_map!r}"
            )
        return _fill(model, device=device, max_memory=max_memory)
    known = {name for name, _ in model.named_modules()}
    for path, place in device_map.items():
        if path not in known:
            raise ValueError(f"{where}: device_map must name modules, got {path!r}")
        in_layers = path == LAYERS or path.startswith(f"{LAYERS}.")
        if not in_layers and str(place) != str(device):
            raise ValueError(
                f"{where}: device_map may place {LAYERS} and what is below; all else is on "
                f"{device}, got {path!r} on {place!r}"
            )
    layers = [f"{LAYERS}.{name}" for name, _ in model.get_submodule(LAYERS).named_children()]
    rest = [name for name in _outside(model) if _longest(device_map, name) is None]
    return {
        **{path: device for path in (*rest, *layers) if _longest(device_map, path) is None},
        **device_map,
    }


def dispatch(
    model: nn.Module, device_map: Mapping[str, Device], *, device: Device, folder: Any
) -> None:
    """Lets accelerate put its hooks on a loaded model.

    Raises:
        ValueError: something goes to "disk" and there is no folder for it.
    """
    if "disk" in device_map.values() and folder is None:
        raise ValueError(
            "from_pretrained: offload_folder must be given for what goes to disk, got None"
        )
    # Hooks ask for parameters by name; the state dict of a sparse FFN has those of its experts.
    state = {key: weight.detach() for key, weight in model.named_parameters()}
    state |= dict(model.named_buffers())
    on_disk = {key: tensor for key, tensor in state.items() if _longest(device_map, key) == "disk"}
    if on_disk:
        accelerate_library("utils").offload_state_dict(folder, on_disk)
    accelerate_library("big_modeling").dispatch_model(
        model,
        dict(device_map),
        main_device=device,
        state_dict=state,
        offload_dir=folder,
        preload_module_classes=["SparseMoE"],  # it reads its routers without calling them
        force_hooks=True,
    )


def accelerate_library(module: str) -> Any:
    """Imports a module of accelerate; ImportError says how to get it."""
    return optional(f"accelerate.{module}", "offload", purpose="device_map")


def _fill(
    model: nn.Module, *, device: Device, max_memory: Mapping[Any, Any] | None
) -> dict[str, Device]:
    utils = accelerate_library("utils")
    room = dict(utils.get_max_memory(None if max_memory is None else dict(max_memory)))
    main = torch.device(device)
    name = main.type if main.type == "cpu" else main.index or 0
    outside = sum(
        weight.nbytes
        for key, weight in model.named_parameters()
        if not key.startswith(f"{LAYERS}.")
    )
    if name in room:
        room[name] = max(0, room[name] - outside)
    layers = model.get_submodule(LAYERS)
    filled = utils.infer_auto_device_map(
        layers, max_memory=room, no_split_module_classes=["DecoderLayer"]
    )
    placed: dict[str, Device] = dict.fromkeys(_outside(model), device)
    if set(filled) == {""}:
        return placed | {LAYERS: filled[""]}
    return placed | {f"{LAYERS}.{path}": place for path, place in filled.items()}


def _outside(model: nn.Module) -> list[str]:
    """Returns the paths of the largest modules without decoder layers in them."""
    paths: list[str] = []
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        holds_layers = LAYERS.startswith(f"{path}.") or path in ("", LAYERS)
        if holds_layers or path.startswith(f"{LAYERS}.") or parent in paths:
            continue
        if any(path.startswith(f"{known}.") for known in paths) or module is None:
            continue
        paths.append(path)
    return paths


def _longest(device_map: Mapping[str, Device], key: str) -> Device | None:
    """Returns the place of the longest path in a map that is the start of a key."""
    path = key
    while path:
        if path in device_map:
            return device_map[path]
        path = path.rpartition(".")[0]
    return device_map.get("")


def _in_memory(place: Device | None) -> Device:
    return "cpu" if place is None or place == "disk" else place


def layer_ffns(num_layers: int) -> list[str]:
    """Returns the starts of the keys of all FFNs of the decoder layers."""
    return [f"{layer_prefix(i)}{name}." for i in range(num_layers) for name in FFN_NAMES.values()]
