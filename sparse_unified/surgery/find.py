# SPDX-License-Identifier: Apache-2.0
"""Finds the FFNs of a live model by structure: attribute names and tensors, never classes.

A host is anything that leads to decoder layers with the FFNs `mlp` (und) and `mlp_moe_gen` (gen),
or with `mlp` alone: our model, the official ones, decoders of transformers and of serving engines,
and pipelines that hold one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import FFN_NAMES, PROJECTIONS
from sparse_unified.experts import select_layers
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.exchange import Change
from sparse_unified.surgery.skipped import SkippedFFN
from sparse_unified.surgery.weights import (
    MERGED_PROJECTIONS,
    DenseWeights,
    describe_module,
    projection_names,
    read_weights,
)

# Where decoder layers are looked for first; then in every nn.ModuleList.
LAYER_PATHS = (
    "language_model.model.layers",
    "model.language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.layers",
    "layers",
)


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
                f"{describe_module(module)}"
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


def find_host(model: object, *, where: str, component: str | None = None) -> Host:
    """Returns the decoder layers of a model or pipeline.

    Layers with a generation FFN go before layers with `mlp` alone, `LAYER_PATHS` before what else
    is a list of such layers.

    Args:
        component: whose FFN the layers must have; None takes either.

    Raises:
        ValueError: there are none, or several lists of them; the message says what was found.
    """
    stacks = dict(_stacks(model))
    kinds = {FFN_NAMES["gen"]: _has_gen_ffn} if component == "gen" else _HAS_FFN
    for has_ffn in kinds.values():
        hosts = {
            path: Host(path=path, layers=layers)
            for path, layers in stacks.items()
            if any(map(has_ffn, layers))
        }
        for path in LAYER_PATHS:
            if path in hosts:
                return hosts[path]
        if len(hosts) > 1:
            raise ValueError(
                f"{where}: model must have one list of decoder layers, got {len(hosts)}: "
                f"{list_some(list(hosts))}; give the module that holds the one that is meant"
            )
        for host in hosts.values():
            return host
    found = []
    for path in dict.fromkeys((*LAYER_PATHS, *stacks)):
        if path in stacks:
            names = list(dict.fromkeys(map(describe_module, stacks[path])))
            found.append(f"{path}: {len(stacks[path])} x {list_some(names, 2)}")
        elif (other := _at(model, path)) is not None:
            found.append(f"{path}: {describe_module(other)}")
    raise ValueError(
        f"{where}: model must have decoder layers with {' or '.join(kinds)}, made of "
        f"{', '.join(PROJECTIONS)} (or {' and '.join(MERGED_PROJECTIONS)}), under "
        f"{' or '.join(LAYER_PATHS)} or in another list of layers; got a {describe_module(model)}"
        + "".join(f"; {text}" for text in found)
    )


def _stacks(model: object) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yields what may be a list of decoder layers, with the attribute path that leads there."""
    seen: set[int] = set()
    for path in LAYER_PATHS:
        layers: Any = _at(model, path)
        if hasattr(layers, "__len__") and hasattr(layers, "__getitem__"):
            seen.add(id(layers))
            yield path, [layers[i] for i in range(len(layers))]
    # A pipeline is no module, but holds some as attributes.
    roots: Mapping[str, object] = {"": model}
    if not isinstance(model, nn.Module):
        roots = getattr(model, "__dict__", {})
    for root, module in roots.items():
        if not isinstance(module, nn.Module):
            continue
        for path, part in module.named_modules(prefix=root):
            if isinstance(part, nn.ModuleList) and id(part) not in seen:
                seen.add(id(part))
                yield path, list(part)


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
    """Returns the weights of a dense FFN, see `read_weights`.

    Raises:
        ValueError: they are not plain weights of a dense FFN.
    """
    return read_weights(target.ffn, target.describe(where))


def _at(model: object, path: str) -> object:
    return reduce(lambda at, name: getattr(at, name, None), path.split("."), model)


def _has_gen_ffn(layer: nn.Module) -> bool:
    """Tells whether a layer has a generation FFN, or had one before it was skipped."""
    name = FFN_NAMES["gen"]
    return hasattr(layer, name) and any(name in module._modules for module in _modules(layer))


def _has_und_ffn(layer: nn.Module) -> bool:
    """Tells whether a layer has a FFN that can be sparse, or is, or was skipped."""
    ffn = getattr(layer, FFN_NAMES["und"], None)
    return bool(projection_names(ffn)) or isinstance(ffn, SparseMoE | SkippedFFN)


# Name of a FFN -> does a layer have it. One with both is a BAGEL's.
_HAS_FFN = {FFN_NAMES["gen"]: _has_gen_ffn, FFN_NAMES["und"]: _has_und_ffn}


def _modules(module: object) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []
