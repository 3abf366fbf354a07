# SPDX-License-Identifier: Apache-2.0
"""What all ops register alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def register_fake(op: str) -> Callable[[F], F]:
    """Registers the fake of `sparse_unified::<op>`, which also runs for meta tensors.

    NOTE: given tensors of the CPU and of meta, torch calls the fake, and its empty CPU tensors
    would pass for a result.

    Raises (when the op is called):
        RuntimeError: the tensors are on several devices.
    """

    def decorate(fake: F) -> F:
        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            devices = sorted({str(tensor.device) for tensor in tensors})
            if len(devices) > 1:
                raise RuntimeError(
                    f"{op}: arguments must be on one device, got {' and '.join(devices)}"
                )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"sparse_unified::{op}")(checked)
        return fake

    return decorate


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
