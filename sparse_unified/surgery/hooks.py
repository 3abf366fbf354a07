# SPDX-License-Identifier: Apache-2.0
"""What is attached to a module from outside: hooks on its call, accelerate's patched forward."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_unified.surgery.weights import hooks_of

# Attribute -> its value without hooks. State dict hooks are not among them: they know the keys of
# the module they were written for.
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


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the forward and backward hooks of a module, and accelerate's hook, to another one.

    The dicts move as objects, so that the handles users hold still remove their hooks.
    """
    for name, empty in _CALL_HOOKS.items():
        if name in source.__dict__:
            target.__dict__[name] = source.__dict__[name]
            source.__dict__[name] = empty()
    _move_patch(source, target)


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


def _move_patch(source: nn.Module, target: nn.Module) -> None:
    # accelerate sets, on the instance: _hf_hook, _old_forward (what it wraps) and forward, a
    # partial of one generic function over the module, which reads the other two.
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
