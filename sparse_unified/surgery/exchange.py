# SPDX-License-Identifier: Apache-2.0
"""One module for another in a live model, or for nothing, and what is remembered to undo it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.surgery.hooks import move_hooks, take_name
from sparse_unified.surgery.weights import offloaded

# NOTE: kept in the instance dict, inside a dataclass, so that what was replaced is no submodule: it
# has no part in state dicts, optimisers, `.to()` or `.train()`, but in deepcopy and pickle.
_STATE = "_replaced"
_ABSENT = "_absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """What stood in a place before: the module itself, or None where it was not kept.

    Attributes:
        order: transforms of a model are numbered from 1 as they come.
        dtype, device, training: how the place of an absent module was, see `_mark`; None where a
            module took its place.
    """

    type_name: str
    module: nn.Module | None
    order: int
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    training: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A place in a model, what stands there, and what is to; None is nothing."""

    owner: nn.Module
    name: str
    old: nn.Module | None
    new: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in which something was replaced, and by which transforms: the latest one's state."""

    owner: nn.Module
    name: str
    path: str
    now: nn.Module | None
    state: Replaced


def find_replaced(module: nn.Module, path: str) -> list[Place]:
    """Returns every place below a module in which something was replaced, in model order."""
    places = []
    for prefix, owner in module.named_modules(prefix=path):
        absent = owner.__dict__.get(_ABSENT, {})
        for name, now in owner._modules.items():
            state = absent.get(name) if now is None else now.__dict__.get(_STATE)
            if isinstance(state, Replaced):
                at = f"{prefix}.{name}"
                places.append(Place(owner=owner, name=name, path=at, now=now, state=state))
    return places


def below(place: Place) -> Place | None:
    """Returns what a place looks like once its latest transform is undone; None if that was all."""
    kept = place.state.module
    state = None if kept is None else kept.__dict__.get(_STATE)
    if not isinstance(state, Replaced):
        return None
    return Place(owner=place.owner, name=place.name, path=place.path, now=kept, state=state)


def next_order(layers: Iterable[nn.Module]) -> int:
    """Returns the number of the next transform of a model."""
    found = itertools.chain.from_iterable(find_replaced(layer, "") for layer in layers)
    return 1 + max((place.state.order for place in found), default=0)


def like(module: nn.Module) -> Tensor | None:
    """Returns a tensor of a module that tells where and what it is; None without any."""
    weight = getattr(module, "gate_proj", None)
    weight = getattr(weight, "weight", weight)
    if isinstance(weight, Tensor):
        return weight
    return next(itertools.chain(module.parameters(), module.buffers()), None)


@contextmanager
def all_or_nothing(changes: Sequence[Change]) -> Iterator[None]:
    """Inside, the modules of the changes may be exchanged.

    Whatever is raised there, an interrupt included, leaves every one in its place with its hooks.
    """
    # NOTE: attributes are moved between modules: the hook dicts go as objects. Children, buffers
    # and pre-hooks are what changes inside its dict.
    modules = [m for c in changes for m in (c.owner, c.old, c.new) if m is not None]
    saved = [(m, dict(m.__dict__), _contents(m)) for m in modules]
    try:
        yield
    except BaseException:
        for module, attributes, contents in saved:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, content in contents.items():
                held = module.__dict__[name]
                held.clear()
                held.update(content)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    names = (
        "_modules",
        "_buffers",
        "_non_persistent_buffers_set",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    )
    return {name: module.__dict__[name].copy() for name in names if name in module.__dict__}


def put_in(change: Change, *, order: int, keep: bool = True) -> None:
    """Carries out a change. A new module takes over the hooks of the old one."""
    owner, name, old, new = change.owner, change.name, change.old, change.new
    assert old is not None
    kept, type_name = old if keep else None, type(old).__name__
    if new is not None:
        new.__dict__[_STATE] = Replaced(type_name=type_name, module=kept, order=order)
        setattr(owner, name, new)
        move_hooks(old, new)
        take_name(old, new)
        return
    marker = _mark(owner, name, old)
    state = Replaced(
        type_name=type_name,
        module=kept,
        order=order,
        dtype=marker.dtype,
        device=marker.device,
        training=owner.training,
    )
    owner.__dict__[_ABSENT] = {**owner.__dict__.get(_ABSENT, {}), name: state}
    setattr(owner, name, None)


def _mark(owner: nn.Module, name: str, old: nn.Module) -> Tensor:
    """Leaves an empty buffer where a module was, that moves when the model is moved."""
    weight = like(old)
    marker = torch.empty(0) if weight is None else weight.new_empty(0)
    owner.register_buffer(_marker(name), marker.detach(), persistent=False)
    return marker


def _marker(name: str) -> str:
    return f"absent_{name}"


def is_unmoved_meta(place: Place) -> bool:
    """Tells whether what is kept of a place holds no data, while the model got its own."""
    module = place.state.module
    kept = None if module is None or offloaded(module) else like(module)
    now = place.owner._buffers[_marker(place.name)] if place.now is None else like(place.now)
    return kept is not None and now is not None and kept.is_meta and not now.is_meta


def follow(place: Place) -> None:
    """Moves a kept module to the device, dtype and mode that its place has come to have."""
    kept, state = place.state.module, place.state
    assert kept is not None
    weight = None if offloaded(kept) else like(kept)  # else accelerate moves them
    now = place.owner._buffers[_marker(place.name)] if place.now is None else like(place.now)
    if weight is not None and now is not None:
        then = (weight.device, weight.dtype)
        if state.dtype is not None and state.device is not None:
            then = (state.device, state.dtype)
        if (now.device, now.dtype) != then:
            kept.to(device=now.device, dtype=now.dtype)
    training = (place.owner if place.now is None else place.now).training
    if training != (kept.training if state.training is None else state.training):
        kept.train(training)


def put_back(place: Place) -> None:
    """Puts what was replaced back into its place; it takes its hooks back."""
    owner, name, kept = place.owner, place.name, place.state.module
    assert kept is not None
    setattr(owner, name, kept)
    if place.now is not None:
        move_hooks(place.now, kept)
        take_name(place.now, kept)
        return
    del owner._buffers[_marker(name)]
    owner._non_persistent_buffers_set.discard(_marker(name))
    left = {key: state for key, state in owner.__dict__[_ABSENT].items() if key != name}
    if left:
        owner.__dict__[_ABSENT] = left
    else:
        del owner.__dict__[_ABSENT]
