# SPDX-License-Identifier: Apache-2.0
"""What stands where a layer calls its attention or FFN whatever happens, and adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What attentions call the cache they are given.
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """How a module takes its hidden states and what it returns with them.

    Attributes:
        others: None when it returns a tensor alone; else what comes after the tensor in its tuple:
            the argument (position or name) that is handed through, as a cache is, or None.
    """

    others: tuple[int | str | None, ...] | None


class StandIn(nn.Module):
    """Zeros in place of a module; what that handed through is still handed through."""

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        self.convention = convention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module took, hidden states [..., D] first; returns zeros like them."""
        zeros = torch.zeros_like(_hidden(args, kwargs))
        if self.convention.others is None:
            return zeros
        given = _by_key(args, kwargs)
        others = self.convention.others
        return (zeros, *(None if key is None else given.get(key) for key in others))


def learn_conventions(
    modules: Sequence[nn.Module], forward: Callable[[], object]
) -> dict[nn.Module, Convention]:
    """Runs a model once and returns how each module was called.

    Args:
        modules: of the model, whole as it is.
        forward: runs it.

    Raises:
        ValueError: a module was not run, or returned something else than a tensor like its hidden
            states, alone or first in a tuple.
    """
    found: dict[nn.Module, Convention] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found[module] = _convention(type(module).__name__, args, kwargs, output)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            handle = module.register_forward_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        forward()
    for module in modules:
        if module not in found:
            raise ValueError(
                f"depth: forward must run every part that is to be skipped, got none of a "
                f"{type(module).__name__}"
            )
    return found


def _convention(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Convention:
    first, *others = output if isinstance(output, tuple) and output else (output,)
    like = _hidden(args, kwargs)
    if not isinstance(first, Tensor) or first.shape != like.shape:
        got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"depth: a part to be skipped must return a tensor {list(like.shape)} like its hidden "
            f"states, alone or first in a tuple, got {got} of a {name}"
        )
    if not isinstance(output, tuple):
        return Convention(others=None)
    given = _by_key(args, kwargs)
    return Convention(
        others=tuple(_handed_through(i, other, given) for i, other in enumerate(others, 1))
    )


def _handed_through(index: int, value: object, given: Mapping[int | str, Any]) -> int | str | None:
    """Returns the argument that the value at an index of a tuple is, None when it is none."""
    if value is not None:
        return next((key for key, argument in given.items() if argument is value), None)
    # Without a cache nothing tells which None is one; by custom it is the third value.
    return next((name for name in _CACHES if index == 2 and name in given), None)


def _by_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the hidden states: the first tensor of the arguments."""
    values: Iterator[Any] = iter((*args, *kwargs.values()))
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise ValueError("depth: a part to be skipped must be given hidden states, got no tensor")
    return found
