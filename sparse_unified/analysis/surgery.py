# SPDX-License-Identifier: Apache-2.0
"""Narrower FFNs, fewer layers and layers without a part, for models known by their adapter alone.

Models with the two components of BAGEL have the transforms of `sparse_unified.surgery`; here
are those that any decoder takes, and in `head_surgery` fewer heads. All are undone exactly when
their block is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparse_unified.analysis.adapter import Adapter, Block, Ffn, FfnKey
from sparse_unified.analysis.stand_in import StandIn, learn_conventions
from sparse_unified.surgery import Part


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
    blocks = [adapter.block(i, component) for i in range(adapter.num_layers())]
    modules = [block.layer_module for block in blocks]
    remaining = [module for i, module in enumerate(modules) if i not in set(layers)]
    if not remaining:
        raise ValueError(f"depth: a layer must be left, got {len(modules)} to leave out")
    _require_one_kind(blocks)
    owner, name = _holder(model, modules)
    whole = owner._modules[name]
    try:
        owner._modules[name] = nn.ModuleList(remaining)
        with _numbered_anew(remaining):
            yield
    finally:
        owner._modules[name] = whole


@contextmanager
def without_part(
    adapter: Adapter,
    component: str,
    layers: Sequence[int],
    part: Part,
    forward: Callable[[], object],
) -> Iterator[None]:
    """Inside, layers add nothing where their attention or FFN was; it and its norm are not run.

    A skipped attention leaves no keys and values. Attentions that remain are numbered anew, so that
    caches have no gaps and the first of them counts the tokens.

    Args:
        layers: that lose the part. part: `Part.ATTENTION` or `Part.FFN`.
        forward: runs the whole model once, to see what the part returns.

    Raises:
        ValueError: no attention would be left, or the part is not one that adds a tensor like its
            hidden states.
    """
    blocks = [adapter.block(i, component) for i in layers]
    attention = part is Part.ATTENTION
    kept = [n for n in range(adapter.num_layers()) if n not in set(layers)] if attention else []
    if attention:
        if not kept:
            raise ValueError(f"depth: an attention must be left, got {len(blocks)} to leave out")
        _require_one_kind([adapter.block(i, component) for i in range(adapter.num_layers())])
    gone = [block.attention if attention else block.ffn for block in blocks]
    conventions = learn_conventions(gone, forward)
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    for block, module in zip(blocks, gone, strict=True):
        norm = block.input_norm if attention else block.post_attention_norm
        stand_in = StandIn(conventions[module]).train(module.training)
        changes += [(*_place(block, module), stand_in), (*_place(block, norm), nn.Identity())]
    saved = [(owner, name, owner._modules[name]) for owner, name, _ in changes]
    try:
        for owner, name, new in changes:
            owner._modules[name] = new
        with _numbered_anew([adapter.block(i, component).attention for i in kept]):
            yield
    finally:
        for owner, name, old in saved:
            owner._modules[name] = old


@contextmanager
def _numbered_anew(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what modules call their number in a cache counts the given ones alone."""
    numbered: list[tuple[Any, int, int]] = [
        (module, number, i)
        for i, part in enumerate(parts)
        for module in part.modules()
        if isinstance(number := getattr(module, "layer_idx", None), int)
    ]
    try:
        for module, _, new in numbered:
            module.layer_idx = new
        yield
    finally:
        for module, old, _ in numbered:
            module.layer_idx = old


def _require_one_kind(blocks: Sequence[Block]) -> None:
    """Raises ValueError where layers are told apart by their number, which would change."""
    kinds = {
        (
            getattr(block.attention, "layer_type", None),
            getattr(block.attention, "sliding_window", None),
        )
        for block in blocks
    }
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{kind} (window {window})" for kind, window in kinds))
        raise ValueError(
            "depth: layers must have attentions of one kind, because caches and masks are chosen "
            f"by the number of a layer, got {listed}; part='ffn' can be skipped"
        )


def _place(block: Block, module: nn.Module) -> tuple[nn.Module, str]:
    for owner in block.layer_module.modules():
        for name, child in owner._modules.items():
            if child is module:
                return owner, name
    raise ValueError(
        f"depth: the {type(module).__name__} of layer {block.layer} must be a module of the layer, "
        "got one from elsewhere"
    )


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
