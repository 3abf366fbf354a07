# SPDX-License-Identifier: Apache-2.0
"""One module for another in a live model, or for nothing, and what is remembered to undo it.

A new module takes over what is attached to the old one from outside: hooks on its call,
accelerate's patched forward, the name that its tokens go by.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# NOTE: kept in the instance dict, inside a dataclass, so that what was replaced is no submodule: it
# has no part in state dicts, optimisers, `.to()` or `.train()`, but in deepcopy and pickle.
_UNDO = "_undo"  # of the module that stands there now
_ABSENT = "_absent"  # of the owner, by name, where nothing stands there now


@dataclass(frozen=True, slots=True)
class Slot:
    """A replaceable attribute: module `name` of `owner` in decoder layer `layer`."""

    owner: nn.Module
    name: str
    layer: int
    path: str

    def __str__(self) -> str:
        return f"layer {self.layer} ({self.path})"

    @property
    def module(self) -> nn.Module | None:
        """What stands there now."""
        return self.owner._modules[self.name]


class Change(NamedTuple):
    """A slot, what stands there, and what is to; None is nothing."""

    slot: Slot
    old: nn.Module | None
    new: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """What stood in a slot before: the module itself, or None where it was not kept.

    Attributes:
        order: transforms of a model are numbered from 1 as they come.
        dtype, device, training: of the slot while a module was in it; None where one still is.
    """

    module: nn.Module | None
    order: int
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    training: bool | None = None


class Step(NamedTuple):
    """One entry of the undo log of a slot: what stands there now, and what did before."""

    slot: Slot
    now: nn.Module | None
    undo: Undo


def undo_log(layers: Sequence[nn.Module], path: str = "") -> list[Step]:
    """Returns what was done to the slots of decoder layers, slot by slot, the latest first."""
    steps = []
    for layer, module in enumerate(layers):
        for prefix, owner in module.named_modules(prefix=f"{path}.{layer}"):
            absent = owner.__dict__.get(_ABSENT, {})
            for name, now in owner._modules.items():
                undo = absent.get(name) if now is None else now.__dict__.get(_UNDO)
                while isinstance(undo, Undo):
                    steps.append(Step(Slot(owner, name, layer, f"{prefix}.{name}"), now, undo))
                    now = undo.module
                    undo = None if now is None else now.__dict__.get(_UNDO)
    return steps


@contextmanager
def exchanged(
    layers: Sequence[nn.Module], changes: Sequence[Change], *, keep: bool
) -> Iterator[None]:
    """Carries out changes of decoder layers as one transform; an error inside takes them back."""
    order = 1 + max((step.undo.order for step in undo_log(layers)), default=0)
    with all_or_nothing(changes):
        for change in changes:
            put_in(change, order=order, keep=keep)
        yield


@contextmanager
def all_or_nothing(changes: Sequence[Change]) -> Iterator[None]:
    """Inside, the modules of the changes may be exchanged.

    Whatever is raised there, an interrupt included, leaves every one in its place with its hooks.
    """
    # NOTE: attributes are moved between modules: the hook dicts go as objects. Children, buffers
    # and pre-hooks are what changes inside its dict.
    modules = [m for c in changes for m in (c.slot.owner, c.old, c.new) if m is not None]
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


def put_in(change: Change, *, order: int, keep: bool) -> None:
    """Carries out a change and logs it. A new module takes over the hooks of the old one."""
    (owner, name), old, new = (change.slot.owner, change.slot.name), change.old, change.new
    assert old is not None
    kept = old if keep else None
    if new is not None:
        new.__dict__[_UNDO] = Undo(module=kept, order=order)
        setattr(owner, name, new)
        _move_hooks(old, new)
        take_name(old, new)
        return
    # An empty buffer stays where the module was, and moves when the model is moved.
    weight = like(old)
    marker = torch.empty(0) if weight is None else weight.new_empty(0)
    owner.register_buffer(_marker(name), marker.detach(), persistent=False)
    undo = Undo(
        module=kept,
        order=order,
        dtype=marker.dtype,
        device=marker.device,
        training=owner.training,
    )
    owner.__dict__[_ABSENT] = {**owner.__dict__.get(_ABSENT, {}), name: undo}
    setattr(owner, name, None)


def _marker(name: str) -> str:
    return f"absent_{name}"


def put_back(step: Step) -> None:
    """Puts what was replaced back into its slot; it takes its hooks back."""
    owner, name, kept = step.slot.owner, step.slot.name, step.undo.module
    assert kept is not None
    setattr(owner, name, kept)
    if step.now is not None:
        _move_hooks(step.now, kept)
        take_name(step.now, kept)
        return
    del owner._buffers[_marker(name)]
    owner._non_persistent_buffers_set.discard(_marker(name))
    left = {key: undo for key, undo in owner.__dict__[_ABSENT].items() if key != name}
    if left:
        owner.__dict__[_ABSENT] = left
    else:
        del owner.__dict__[_ABSENT]


def is_unmoved_meta(step: Step) -> bool:
    """Tells whether what is kept holds no data, while the model got its own."""
    module = step.undo.module
    kept = None if module is None or offloaded(module) else like(module)
    now = _stands_for(step)
    return kept is not None and now is not None and kept.is_meta and not now.is_meta


def follow(step: Step) -> None:
    """Moves a kept module to the device, dtype and mode that its slot has come to have."""
    kept, undo = step.undo.module, step.undo
    assert kept is not None
    weight = None if offloaded(kept) else like(kept)  # else accelerate moves them
    now = _stands_for(step)
    if weight is not None and now is not None:
        then = (undo.device or weight.device, undo.dtype or weight.dtype)
        if (now.device, now.dtype) != then:
            kept.to(device=now.device, dtype=now.dtype)
    training = (step.slot.owner if step.now is None else step.now).training
    if training != (kept.training if undo.training is None else undo.training):
        kept.train(training)


def _stands_for(step: Step) -> Tensor | None:
    """Returns a tensor that tells where a slot is now, and of which dtype."""
    if step.now is None:
        return step.slot.owner._buffers[_marker(step.slot.name)]
    return like(step.now)


def like(module: nn.Module) -> Tensor | None:
    """Returns a tensor of a module that tells where and what it is; None without any."""
    weight = getattr(module, "gate_proj", None)
    weight = getattr(weight, "weight", weight)
    if isinstance(weight, Tensor):
        return weight
    return next(itertools.chain(module.parameters(), module.buffers()), None)


# Hooks. Attribute -> its value without hooks. State dict hooks are not among them: they know the
# keys of the module they were written for.
_CALL_HOOKS: dict[str, Callable[[], Any]] = {
    "_forward_pre_hooks": OrderedDict,
    "_forward_pre_hooks_with_kwargs": OrderedDict,
    "_forward_hooks": OrderedDict,
    "_forward_hooks_with_kwargs": OrderedDict,
    "_forward_hooks_always_called": OrderedDict,
    "_backward_pre_hooks": OrderedDict,
    "_backward_hooks": OrderedDict,
    "_is_full_backward_hook": lambda: None,
}


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the forward and backward hooks of a module, and accelerate's hook, to another one.

    The dicts move as objects, so that the handles users hold still remove their hooks.
    """
    for name, empty in _CALL_HOOKS.items():
        if name in source.__dict__:
            target.__dict__[name] = source.__dict__[name]
            source.__dict__[name] = empty()
    _move_patch(source, target)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, calls into the module's tree fire no hooks, run in eval mode and leave no trace."""
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        kept = {name: part.__dict__[name] for name in _CALL_HOOKS if name in part.__dict__}
        buffers = {
            name: buffer if buffer is None else buffer.clone()
            for name, buffer in part._buffers.items()
        }
        saved.append((part, {**kept, "training": part.training}, dict(part._buffers)))
        for name in kept:
            part.__dict__[name] = _CALL_HOOKS[name]()
        part.__dict__["training"] = False
        part._buffers = buffers
    try:
        yield
    finally:
        for part, kept, buffers in saved:
            part.__dict__.update(kept)
            part._buffers = buffers


@dataclass(frozen=True)
class _Renamed:
    """A forward pre-hook that takes the tokens by the name that a replaced module had for them."""

    name: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if args or self.name not in kwargs:
            return None
        return (kwargs[self.name],), {k: v for k, v in kwargs.items() if k != self.name}


def take_name(source: nn.Module, target: nn.Module) -> None:
    """Lets the tokens of `target` be given by the keyword that `source` takes them by.

    The hooks of `source` have been moved to `target` before, the one of an earlier transform, which
    knows the name, among them.
    """
    hooks = target._forward_pre_hooks
    known = [key for key, hook in hooks.items() if isinstance(hook, _Renamed)]
    name, own = _token_name(source), _token_name(target)
    if known:
        name = next(hook.name for hook in hooks.values() if isinstance(hook, _Renamed))
    for key in known:
        del hooks[key]
        target._forward_pre_hooks_with_kwargs.pop(key, None)
    if name is not None and name != own:
        target.register_forward_pre_hook(_Renamed(name), with_kwargs=True)


def _token_name(module: nn.Module) -> str | None:
    """Returns the name of the first parameter of a forward, None where it has none."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    return parameters[0].name


# accelerate sets, on the instance: _hf_hook, _old_forward (what it wraps) and forward, a partial of
# one generic function over the module, which reads the other two.


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks that accelerate has put on a module, those of a sequence one by one."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def offloaded(module: nn.Module) -> Any:
    """Returns a hook by which accelerate brings weights to where a module runs; else None."""
    for part in module.modules():
        for hook in hooks_of(part):
            if getattr(hook, "offload", False):
                return hook
    return None


def offload_like(module: nn.Module, other: nn.Module) -> None:
    """Lets accelerate keep the weights of a module on the CPU if it does so for another one's."""
    hook = offloaded(other)
    if hook is None:
        return
    accelerate = importlib.import_module("accelerate.hooks")  # it made the hook
    accelerate.add_hook_to_module(
        module,
        accelerate.AlignDevicesHook(
            execution_device=hook.execution_device, offload=True, place_submodules=True
        ),
    )


def _move_patch(source: nn.Module, target: nn.Module) -> None:
    patched = source.__dict__.get("forward")
    if not isinstance(patched, functools.partial) or "_old_forward" not in source.__dict__:
        return
    if not patched.args or patched.args[0] is not source:
        return
    # A hook that brings the weights of a module knows their names and stays with it.
    hooks = list(hooks_of(source))
    staying = [hook for hook in hooks if getattr(hook, "offload", False)]
    moving = [hook for hook in hooks if hook not in staying]
    if staying and not moving:
        return
    if staying:
        source.__dict__["_hf_hook"] = _joined(staying)
    else:
        del source.__dict__["forward"]
        wrapped = source.__dict__.pop("_old_forward")
        if getattr(wrapped, "__func__", None) is not type(source).forward:
            source.__dict__["forward"] = wrapped
        source.__dict__.pop("_hf_hook", None)
    own = list(hooks_of(target))
    target.__dict__["_hf_hook"] = _joined([*moving, *own])
    if own:
        return
    target.__dict__["_old_forward"] = target.forward
    moved = functools.partial(patched.func, target, *patched.args[1:], **patched.keywords)
    target.__dict__["forward"] = functools.update_wrapper(moved, target.forward)


def _joined(hooks: list[Any]) -> Any:
    if len(hooks) < 2:
        return hooks[0] if hooks else None
    return importlib.import_module("accelerate.hooks").SequentialHook(*hooks)
