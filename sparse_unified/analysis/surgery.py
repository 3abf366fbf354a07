# SPDX-License-Identifier: Apache-2.0
"""Narrower FFNs and fewer layers for models that are known by their adapter alone.

Models with the two components of BAGEL have the transforms of `sparse_unified.swap`; here are the
two that any decoder takes. Both are undone exactly when their block is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparse_unified.analysis.adapter import Adapter, Ffn, FfnKey


@contextmanager
def narrowed(ffns: Sequence[Ffn], kept: Mapping[FfnKey, Tensor]) -> Iterator[None]:
    """Inside, FFNs hold only the neurons they are given: their weights are shorter tensors.

    Args:
        kept: [n] ascending neuron indices of some FFNs, by key; others stay as they are.

    Raises:
        ValueError: a projection of an FFN is no `nn.Linear` of its module.
    """
    plans = []
    for ffn in ffns:
        if ffn.key in kept:
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                plans.append((_linear(ffn, name), dim, kept[ffn.key]))
    saved = [(linear, linear.weight) for linear, _, _ in plans]
    try:
        for linear, dim, index in plans:
            weight = linear.weight
            narrow = weight.detach().index_select(dim, index.to(weight.device))
            _put(linear, nn.Parameter(narrow, requires_grad=weight.requires_grad))
        yield
    finally:
        for linear, weight in saved:
            _put(linear, weight)


@contextmanager
def without_layers(
    model: nn.Module, adapter: Adapter, component: str, layers: Sequence[int]
) -> Iterator[None]:
    """Inside, the model has fewer layers, numbered anew, so that caches have no gaps.

    Args:
        layers: to leave out; all components lose them.

    Raises:
        ValueError: the layers are in no `nn.ModuleList` of the model, or none would be left.
    """
    modules = [adapter.block(i, component).layer_module for i in range(adapter.num_layers())]
    remaining = [module for i, module in enumerate(modules) if i not in set(layers)]
    if not remaining:
        raise ValueError(f"depth: a layer must be left, got {len(modules)} to leave out")
    owner, name = _holder(model, modules)
    whole = owner._modules[name]
    # What a layer calls its number in a cache, in whichever of its modules.
    numbered: list[tuple[Any, int]] = [
        (part, number)
        for module in remaining
        for part in module.modules()
        if isinstance(number := getattr(part, "layer_idx", None), int)
    ]
    numbers = {modules.index(module): i for i, module in enumerate(remaining)}
    try:
        owner._modules[name] = nn.ModuleList(remaining)
        for part, number in numbered:
            part.layer_idx = numbers[number]
        yield
    finally:
        owner._modules[name] = whole
        for part, number in numbered:
            part.layer_idx = number


def _linear(ffn: Ffn, name: str) -> nn.Linear:
    weight: Tensor = getattr(ffn, name)
    for module in ffn.module.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() == weight.data_ptr():
            return module
    raise ValueError(f"{ffn.name}: {name} must be the weight of an nn.Linear, got none that is")


def _put(linear: nn.Linear, weight: nn.Parameter | Tensor) -> None:
    linear._parameters["weight"] = weight  # type: ignore[assignment]
    linear.out_features, linear.in_features = weight.shape


def _holder(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[nn.Module, str]:
    for owner in model.modules():
        for name, child in owner._modules.items():
            if isinstance(child, nn.ModuleList) and list(child) == list(layers):
                return owner, name
    raise ValueError(
        f"depth: the {len(layers)} layers must be in an nn.ModuleList of the model, got none"
    )


def as_module(model: Any) -> nn.Module:
    """Returns the module of a model or of a pipeline that holds it as `model`.

    Raises:
        TypeError: there is none.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"model: object must be a module or hold one as `model`, got {type(model).__name__}"
        )
    return found
