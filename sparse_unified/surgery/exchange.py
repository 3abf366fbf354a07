# SPDX-License-Identifier: Apache-2.0
"""What a transform does to the modules of a live model, seen from outside, and how it is undone.

A transform changes modules as it likes: `transformed` compares them before and after, logs what
became something else, and takes everything back when there is an error. A new module takes over
what is attached to the old one from outside: hooks on its call, and accelerate's patched forward.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


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
        return self.owner._modules[self.name]

    def put(self, new: nn.Module | None) -> None:
        """Puts a module there, which takes over the hooks of the old one, or nothing."""
        old = self.module
        setattr(self.owner, self.name, new)
        if old is not None and new is not None:
            _move_hooks(old, new)
        elif old is not None:
            # An empty buffer stays where the module was, and moves when the model is moved.
            weight = like(old)
            marker = torch.empty(0) if weight is None else weight.detach().new_empty(0)
            self.owner.register_buffer(f"absent_{self.name}", marker, persistent=False)


def put_all(changes: Iterable[tuple[Slot, nn.Module | None]]) -> None:
    for slot, new in changes:
        slot.put(new)


class _Missing(Enum):
    """What an entry was that was not there; a copy or a pickle of it is the same object."""

    MISSING = None


# Attribute of a module -> what is in it is kept apart from the attributes.
_TABLES = ("_parameters", "_buffers", "_modules")
_INSIDE = (*_TABLES, "_non_persistent_buffers_set")
# Hooks on a call. State dict hooks are not among them: they know the keys of the module they were
# written for.
_CALL_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
# In the instance dict of a decoder layer: for each transform what it changed, None if that was not
# kept. So what was replaced is no submodule: it has no part in state dicts, optimizers, `.to()` or
# `.train()`, but in deepcopy and pickle.
_LOG = "_undo"
_MOVED = {*_CALL_HOOKS, *_INSIDE, _LOG, "forward", "_hf_hook", "_old_forward"}


class Entry(NamedTuple):
    """An entry of a module, or of a hook of accelerate, that became another one."""

    owner: Any
    table: str  # one of `_TABLES`, or "" for an attribute
    name: str
    old: Any
    training: bool  # the mode of the owner then

    def entries(self) -> dict[str, Any]:
        """Returns what the owner has now, by name."""
        attributes = vars(self.owner)
        return attributes[self.table] if self.table else attributes

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Returns a tensor of what is kept and one that tells where the model is now."""
        is_module = isinstance(self.old, nn.Module)
        if self.table not in ("_parameters", "_modules") or (is_module and offloaded(self.old)):
            return None  # accelerate moves the latter
        now = self.entries().get(self.name)
        now = self.owner._buffers[f"absent_{self.name}"] if now is None else like(now)
        kept = like(self.old)
        return None if kept is None or now is None else (kept, now)

    def put_back(self) -> None:
        """Puts the entry back, on the device and in the dtype and mode of its place, with hooks."""
        entries, old = self.entries(), self.old
        if old is _Missing.MISSING:
            entries.pop(self.name, None)
            if self.table == "_buffers":
                self.owner._non_persistent_buffers_set.discard(self.name)
            return
        now, is_module = entries.get(self.name), isinstance(old, nn.Module)
        if pair := self.tensors():
            kept, place = pair
            if (kept.device, kept.dtype) != (place.device, place.dtype):
                if is_module:
                    old.to(place.device, place.dtype)
                else:
                    old.data = old.data.to(place.device, place.dtype)
        if is_module:
            is_training, was = self.owner.training, self.training
            if now is not None:
                is_training, was = now.training, old.training
            if is_training != was:
                old.train(is_training)
        entries[self.name] = old
        if is_module and now is not None:
            _move_hooks(now, old)


class Snapshot:
    """What modules hold at one moment, and the hooks of accelerate on them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        holders: list[Any] = [own for module in modules for own in (module, *hooks_of(module))]
        self._held = [
            (h, dict(vars(h)), {name: vars(h)[name].copy() for name in _INSIDE if name in vars(h)})
            for h in holders
        ]

    def put_back(self) -> None:
        """Makes the modules hold again what they held."""
        for holder, attributes, inside in self._held:
            vars(holder).clear()
            vars(holder).update(attributes)
            for name, content in inside.items():
                vars(holder)[name].clear()
                vars(holder)[name].update(content)

    def differences(self) -> tuple[Entry, ...]:
        """Returns the entries that are others now, but for what moves with a module."""
        found = []
        for holder, attributes, inside in self._held:
            for table in ("", *(name for name in _TABLES if name in inside)):
                before = inside[table] if table else attributes
                now = vars(holder)[table] if table else vars(holder)
                for name in {**before, **now}:
                    old = before.get(name, _Missing.MISSING)
                    if old is not now.get(name, _Missing.MISSING) and (table or name not in _MOVED):
                        training = attributes.get("training", False)
                        found.append(Entry(holder, table, name, old, training))
        # Modules before the markers that stand for them.
        return tuple(sorted(found, key=lambda entry: entry.table != "_modules"))


@contextmanager
def unchanged(modules: Iterable[nn.Module], *, on_error: bool = False) -> Iterator[Snapshot]:
    """Afterwards modules hold what they held; with `on_error`, only after an error or interrupt."""
    before = Snapshot(modules)
    try:
        yield before
    except BaseException:
        before.put_back()
        raise
    if not on_error:
        before.put_back()


@contextmanager
def transformed(layers: Sequence[nn.Module], *, keep: bool) -> Iterator[None]:
    """Inside, decoder layers are changed as one transform, to be undone if `keep` says so.

    An error takes everything back.
    """
    with ExitStack() as stack:
        before = [
            stack.enter_context(unchanged(layer.modules(), on_error=True)) for layer in layers
        ]
        yield
        for layer, snapshot in zip(layers, before, strict=True):
            if entries := snapshot.differences():
                log = vars(layer).get(_LOG, ()) if keep else ()
                vars(layer)[_LOG] = (*log, entries if keep else None)


def undo(layers: Sequence[nn.Module]) -> None:
    """Undoes what the logs of decoder layers say, the latest first; raises as `restore_` does."""
    # A wrapper that came later stands before what it wraps.
    log = [
        (layer, holder, step)
        for layer, module in enumerate(layers)
        for holder in module.modules()
        for step in reversed(vars(holder).get(_LOG, ()))
    ]
    if not log:
        raise ValueError(
            "model must have FFNs replaced by apply_moe_ or load_moe_, or parts pruned, "
            f"got none among the {len(layers)} layers"
        )
    kept: list[nn.Module] = []
    for layer, _, step in log:
        if step is None:
            raise RuntimeError(
                f"layer {layer}: what was replaced must have been kept, got keep_dense=False"
            )
        for entry in step:
            pair = entry.tensors()
            if pair is not None and pair[0].is_meta and not pair[1].is_meta:
                raise RuntimeError(f"layer {layer}: kept weights must hold data, got meta tensors")
            kept += [entry.old] if isinstance(entry.old, nn.Module) else []
    parts = {part: None for module in (*layers, *kept) for part in module.modules()}
    with unchanged(parts, on_error=True):
        for _, holder, step in log:
            for entry in step:
                entry.put_back()
            vars(holder).pop(_LOG, None)


def like(module: nn.Module | Tensor) -> Tensor | None:
    """Returns a tensor that tells where and what a module is, or itself; None without any."""
    if isinstance(module, Tensor):
        return module
    weight = getattr(module, "gate_proj", None)
    weight = getattr(weight, "weight", weight)
    if isinstance(weight, Tensor):
        return weight
    return next(itertools.chain(module.parameters(), module.buffers()), None)


def _take_hooks(module: nn.Module) -> dict[str, Any]:
    """Leaves a module without hooks and returns those it had, by attribute."""
    taken = {name: vars(module)[name] for name in _CALL_HOOKS if name in vars(module)}
    for name in taken:
        vars(module)[name] = None if name == "_is_full_backward_hook" else OrderedDict()
    return taken


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the hooks of a module, and accelerate's, to another one.

    The dicts move as objects, so that the handles users hold still remove their hooks.
    """
    vars(target).update(_take_hooks(source))
    _move_patch(source, target)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, calls into the module's tree fire no hooks, run in eval mode and leave no trace."""
    parts = list(module.modules())
    with unchanged(parts):
        for part in parts:
            _take_hooks(part)
            vars(part)["training"] = False
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer if buffer is None else buffer.clone()
        yield


# accelerate sets, on the instance: _hf_hook, _old_forward (what it wraps) and forward, a partial of
# one generic function over the module, which reads the other two.


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks that accelerate has put on a module, those of a sequence one by one."""
    if (hook := vars(module).get("_hf_hook")) is not None:
        yield from getattr(hook, "hooks", (hook,))


def offloaded(module: nn.Module) -> Any:
    """Returns a hook by which accelerate brings weights to where a module runs; else None."""
    hooks = itertools.chain.from_iterable(map(hooks_of, module.modules()))
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def offload_like(module: nn.Module, other: nn.Module) -> None:
    """Lets accelerate keep the weights of a module on the CPU if it does so for another one's."""
    if hook := offloaded(other):
        accelerate = importlib.import_module("accelerate.hooks")  # it made the hook
        own = {"execution_device": hook.execution_device, "offload": True, "place_submodules": True}
        accelerate.add_hook_to_module(module, accelerate.AlignDevicesHook(**own))


def _move_patch(source: nn.Module, target: nn.Module) -> None:
    at, to = vars(source), vars(target)
    patched: Any = at.get("forward")
    # A hook that brings the weights of a module knows their names and stays with it.
    hooks, own = list(hooks_of(source)), list(hooks_of(target))
    staying = [hook for hook in hooks if getattr(hook, "offload", False)]
    moving = [hook for hook in hooks if hook not in staying]
    if not moving or getattr(patched, "args", ())[:1] != (source,) or "_old_forward" not in at:
        return
    if staying:
        at["_hf_hook"] = _joined(staying)
    else:
        del at["forward"], at["_hf_hook"]
        wrapped = at.pop("_old_forward")
        if getattr(wrapped, "__func__", None) is not type(source).forward:
            at["forward"] = wrapped
    to["_hf_hook"] = _joined([*moving, *own])
    if not own:
        to["_old_forward"] = target.forward
        moved = functools.partial(patched.func, target, *patched.args[1:], **patched.keywords)
        to["forward"] = functools.update_wrapper(moved, target.forward)


def _joined(hooks: list[Any]) -> Any:
    if len(hooks) == 1:
        return hooks[0]
    return importlib.import_module("accelerate.hooks").SequentialHook(*hooks)
