# SPDX-License-Identifier: Apache-2.0
"""Finds the FFNs of a live model by structure: attribute names and tensors, never classes.

A host is anything that leads, by one of `LAYER_PATHS`, to decoder layers with two FFNs, `mlp` (und)
and `mlp_moe_gen` (gen): our model, the official ones, and pipelines that hold one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified.checkpoint.ffn import list_some
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.partition import select_layers
from sparse_unified.swap.exchange import Change
from sparse_unified.swap.skipped import SkippedFFN

LAYER_PATHS = (
    "language_model.model.layers",
    "model.language_model.model.layers",
    "model.layers",
    "layers",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DenseWeights(NamedTuple):
    """The three tensors of a dense FFN: gate_proj and up_proj [I, D], down_proj [D, I]."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One FFN of a live model, and the module that holds it as attribute `name`."""

    layer: int
    component: str
    path: str
    owner: nn.Module
    name: str
    ffn: nn.Module

    def describe(self, where: str) -> str:
        """Returns the start of a message about this FFN."""
        return f"{where}: layer {self.layer} ({self.path})"

    def change(self, new: nn.Module | None) -> Change:
        """Returns the exchange of this FFN for another module, or for nothing."""
        return Change(owner=self.owner, name=self.name, old=self.ffn, new=new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place in a live model: attribute `name` of `owner`, and what stands there."""

    owner: nn.Module
    name: str
    path: str
    module: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The decoder layers of a model, found under the attribute path `path`."""

    path: str
    layers: Sequence[nn.Module]

    def target(self, layer: int, component: str, *, where: str) -> Target:
        """Returns the FFN of one layer.

        Raises:
            ValueError: the layer has none.
        """
        name = FFN_NAMES[component]
        place = self.place(layer, name)
        if place is None or place.module is None:
            module = self.layers[layer]
            raise ValueError(
                f"{where}: layer {layer} ({self.path}.{layer}.{name}): {name} must be a module of "
                f"the layer, got {type(getattr(module, name, None)).__name__} in a "
                f"{_describe(module)}"
            )
        return Target(
            layer=layer,
            component=component,
            path=place.path,
            owner=place.owner,
            name=name,
            ffn=place.module,
        )

    def place(self, layer: int, name: str) -> Slot | None:
        """Returns the place of a module in a layer, `mlp` or `self_attn.q_proj`; None without."""
        holder, _, last = name.rpartition(".")
        module: object = self.layers[layer]
        if holder:
            module = getattr(module, holder, None)
        found = getattr(module, last, None)
        # A wrapper may show the attribute of the layer inside it; what counts is where it is.
        for owner in _modules(module):
            if last in owner._modules and owner._modules[last] is found:
                path = f"{self.path}.{layer}.{name}"
                return Slot(owner=owner, name=last, path=path, module=found)
        return None

    def skips(self, layer: int, name: str) -> bool:
        """Tells whether the module of this name was taken out of a layer by `skip_layers_`."""
        place = self.place(layer, name)
        if place is None or place.module is not None:
            return place is not None and isinstance(place.module, SkippedFFN)
        return takes_absent_parts(self.layers[layer])


def find_host(model: object, *, where: str) -> Host:
    """Returns the decoder layers of a model or pipeline.

    Raises:
        ValueError: none of `LAYER_PATHS` leads to layers with `mlp_moe_gen`; the message says what
            each of them led to.
    """
    found = []
    for path in LAYER_PATHS:
        layers = reduce(lambda at, name: getattr(at, name, None), path.split("."), model)
        if layers is None:
            continue
        if hasattr(layers, "__len__") and hasattr(layers, "__getitem__"):
            modules = [layers[i] for i in range(len(layers))]
            if any(_has_ffn(m) for m in modules):
                return Host(path=path, layers=modules)
            kinds = list_some(dict.fromkeys(map(_describe, modules)), 2)
            found.append(f"{path}: {len(modules)} x {kinds}")
        else:
            found.append(f"{path}: {_describe(layers)}")
    raise ValueError(
        f"{where}: model must have decoder layers with mlp_moe_gen (and mlp), each with "
        f"{', '.join(PROJECTIONS)}, under {' or '.join(LAYER_PATHS)}; got a {_describe(model)}"
        + "".join(f"; {text}" for text in found)
    )


def select_held(
    host: Host, layers: str | Sequence[int], names: Sequence[str], *, where: str
) -> tuple[int, ...]:
    """Returns the selected layers that do not skip the named modules.

    "all" and "middle" pass over layers that skip one of them; a layer that is named must not.

    Raises:
        ValueError: a named layer does not exist or skips one, or no layer is left.
    """
    selected = select_layers(layers, len(host.layers))
    skipped = {n: name for name in names for n in selected if host.skips(n, name)}
    if layers in ("all", "middle") and len(skipped) < len(selected):
        return tuple(layer for layer in selected if layer not in skipped)
    for layer, name in sorted(skipped.items()):
        raise ValueError(
            f"{where}: layer {layer} ({host.path}.{layer}.{name}): {name} must be there, "
            "got a layer that skips it"
        )
    return selected


def takes_absent_parts(layer: nn.Module) -> bool:
    """Tells whether a layer runs without the parts that are None, as ours does."""
    return any(getattr(type(module), "takes_absent_parts", False) for module in _modules(layer))


def read_dense(target: Target, *, where: str) -> DenseWeights:
    """Returns the weights of a dense FFN, the parameters themselves without their gradients.

    Raises:
        ValueError: the FFN is sparse already, or holds anything but three plain floating weights
            of fitting shapes, one dtype and one device: a bias, an adapter, quantised weights.
    """
    ffn, at = target.ffn, target.describe(where)
    if isinstance(ffn, SparseMoE) or hasattr(ffn, "experts"):
        raise ValueError(f"{at}: FFN must be dense, got a {type(ffn).__name__}, sparse already")
    parts = [getattr(ffn, name, None) for name in PROJECTIONS]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError(f"{at}: FFN must have {', '.join(PROJECTIONS)}, got a {_describe(ffn)}")
    weights = []
    for name, part in zip(PROJECTIONS, parts, strict=True):
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"{at}: {name} must have a weight, got a {_describe(part)}")
        if getattr(part, "bias", None) is not None:
            raise ValueError(f"{at}: {name} must have no bias, got {type(part).__name__} with one")
        if weight.dtype not in _DTYPES:
            raise ValueError(
                f"{at}: {name}.weight must be float32, bfloat16 or float16, not quantised, "
                f"got {weight.dtype}"
            )
        if type(weight) not in (nn.Parameter, Tensor):
            raise ValueError(
                f"{at}: {name}.weight must be a plain tensor, got {type(weight).__name__}"
            )
        weights.append(weight.detach())
    known = {f"{name}.weight" for name in PROJECTIONS}
    others = [name for name, _ in ffn.named_parameters() if name not in known]
    if others:
        raise ValueError(
            f"{at}: FFN must have no parameters but its three weights, got {list_some(others)}"
        )
    dense = DenseWeights(*weights)
    _check_fit(dense, at)
    if dense.gate_proj.is_meta and any(hasattr(module, "_hf_hook") for module in ffn.modules()):
        raise ValueError(f"{at}: weights must be in memory, got weights offloaded by accelerate")
    return dense


def _check_fit(dense: DenseWeights, at: str) -> None:
    shapes = [list(weight.shape) for weight in dense]
    fit = len(shapes[0]) == 2 and shapes[0] == shapes[1] == shapes[2][::-1] and 0 not in shapes[0]
    if not fit:
        raise ValueError(
            f"{at}: weights must have shapes [I, D], [I, D] and [D, I] ({', '.join(PROJECTIONS)}), "
            f"got {', '.join(map(str, shapes))}"
        )
    for what in ("dtype", "device"):
        values = {str(getattr(weight, what)) for weight in dense}
        if len(values) > 1:
            raise ValueError(
                f"{at}: weights must share one {what}, got {', '.join(sorted(values))}"
            )


def _has_ffn(layer: nn.Module) -> bool:
    """Tells whether a layer has a generation FFN, or had one before it was skipped."""
    name = FFN_NAMES["gen"]
    return hasattr(layer, name) and any(name in module._modules for module in _modules(layer))


def _modules(module: object) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []


def _describe(value: object) -> str:
    """Writes a type and, for a module, what it is made of."""
    if not isinstance(value, nn.Module):
        return type(value).__name__
    children = list_some([name for name, _ in value.named_children()])
    return f"{type(value).__name__} ({children})"
