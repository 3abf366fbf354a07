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
        name, module = FFN_NAMES[component], self.layers[layer]
        path = f"{self.path}.{layer}.{name}"
        ffn = getattr(module, name, None)
        # A wrapper may show the attribute of the layer inside it; the FFN is replaced where it is.
        owners = [m for m in _modules(module) if ffn is not None and m._modules.get(name) is ffn]
        if not isinstance(ffn, nn.Module) or not owners:
            raise ValueError(
                f"{where}: layer {layer} ({path}): {name} must be a module of the layer, "
                f"got {type(ffn).__name__} in a {_describe(module)}"
            )
        return Target(
            layer=layer, component=component, path=path, owner=owners[0], name=name, ffn=ffn
        )


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
            if any(isinstance(getattr(m, FFN_NAMES["gen"], None), nn.Module) for m in modules):
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


def _modules(module: object) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []


def _describe(value: object) -> str:
    """Writes a type and, for a module, what it is made of."""
    if not isinstance(value, nn.Module):
        return type(value).__name__
    children = list_some([name for name, _ in value.named_children()])
    return f"{type(value).__name__} ({children})"
