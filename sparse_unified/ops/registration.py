# SPDX-License-Identifier: Apache-2.0
"""What all ops register alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# Arguments that are no matrices, by name, which means the same in all ops.
_VECTORS = ("row_token", "expert_offsets", "kept_blocks", "token_weights")


def register_fake(op: str) -> Callable[[F], F]:
    """Registers the fake of `sparse_unified::<op>`, which also runs for meta tensors.

    NOTE: given tensors of the CPU and of meta, torch calls the fake, and its empty CPU tensors
    would pass for a result.

    Raises (when the op is called):
        RuntimeError: the tensors are on several devices, have another number of dimensions than
            the op takes, or are None.
    """

    def decorate(fake: F) -> F:
        parameters = inspect.signature(fake).parameters

        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            for name, value in given.items():
                _check(op, name, value, parameters[name].annotation)
            devices = sorted({str(a.device) for a in given.values() if isinstance(a, Tensor)})
            if len(devices) > 1:
                raise RuntimeError(
                    f"{op}: arguments must be on one device, got {' and '.join(devices)}"
                )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"sparse_unified::{op}")(checked)
        return fake

    return decorate


def _check(op: str, name: str, value: Any, annotation: str) -> None:
    """Refuses what the body of a fake could not ask for its sizes."""
    if annotation == "Tensor" and value is None:
        raise RuntimeError(f"{op}: {name} must be a tensor, got None")
    if not isinstance(value, Tensor):
        return
    rank = 1 if name in _VECTORS else 2
    if value.dim() != rank:
        raise RuntimeError(
            f"{op}: {name} must have {rank} dimensions, got shape {list(value.shape)}"
        )
    if name == "expert_offsets" and value.shape[0] < 2:
        raise RuntimeError(f"{op}: {name} must have at least 2 entries, got {value.shape[0]}")


def refuse_gradient(op: str, *, advice: str = "") -> None:
    """Makes a backward pass through `sparse_unified::<op>` an error.

    NOTE: without it torch warns and goes on with gradients of zero.

    Raises (in the backward pass):
        RuntimeError: a gradient is asked of the op.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing: there is no backward."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op}: arguments must not need a gradient, got a backward pass{advice}")

    torch.library.register_autograd(f"sparse_unified::{op}", backward, setup_context=setup_context)
