# SPDX-License-Identifier: Apache-2.0
"""What all ops register alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

# Argument -> its dimensions, in all ops alike, by dtype. A letter is one size of a call, "?" any.
# None is the float dtype that a call computes in.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DIMENSIONS = {
    torch.int32: {
        "topk_idx": "T K",
        "token_rows": "T K",
        "row_token": "R",
        "expert_offsets": "?",
        "kept_blocks": "?",
    },
    torch.float32: {
        "weights": "T K",
        "token_weights": "T",
        "grad_logits": "T E",
        "grad_topk_logits": "T K",
    },
    None: {
        "x": "T D",
        "gate": "E D",
        "gate_proj": "I D",
        "up_proj": "I D",
        "down_proj": "D I",
        "y": "R D",
        "grad_out": "T D",
        "grad_y": "? D",
        "gate_rows": "? ?",
        "up_rows": "? ?",
    },
}
# Weights of grouped_ffn may also have a dimension of experts.
_OF_EXPERTS = {"gate_proj": "E h D", "up_proj": "E h D", "down_proj": "E D h"}
_ARGUMENTS = {
    name: (dims.split(), dtype) for dtype, own in _DIMENSIONS.items() for name, dims in own.items()
}


def register_fake(op: str) -> Callable[[F], F]:
    """Registers the fake of `sparse_unified::<op>`, which also runs for meta tensors.

    NOTE: given tensors of the CPU and of meta, torch calls the fake, and its empty CPU tensors
    would pass for a result.

    Raises (when the op is called):
        RuntimeError: tensors are None or on several devices, or a shape, dtype or top_k does not
            fit. Sizes that are symbolic are left to the kernel.
    """

    def decorate(fake: F) -> F:
        parameters = inspect.signature(fake).parameters

        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            sizes: dict[str, int] = {}
            for name, value in given.items():
                if value is None and parameters[name].annotation == "Tensor":
                    raise RuntimeError(f"{op}: {name} must be a tensor, got None")
                if isinstance(value, Tensor):
                    _check(op, name, value, sizes)
            top_k = given.get("top_k")
            if type(top_k) is int and not 1 <= top_k <= sizes.get("E", top_k):
                raise RuntimeError(f"{op}: top_k must be from 1 to {sizes['E']}, got {top_k}")
            floats = {a.dtype for n, a in given.items() if n in _DIMENSIONS[None] and a is not None}
            if len(floats) > 1 or not floats <= set(_FLOATS):
                raise RuntimeError(
                    f"{op}: tensors must be float32, bfloat16 or float16, all alike, got "
                    f"{' and '.join(sorted(map(str, floats)))}"
                )
            devices = sorted({str(a.device) for a in given.values() if isinstance(a, Tensor)})
            if len(devices) > 1:
                raise RuntimeError(
                    f"{op}: arguments must be on one device, got {' and '.join(devices)}"
                )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"sparse_unified::{op}")(checked)
        return fake

    return decorate


def _check(op: str, name: str, value: Tensor, sizes: dict[str, int]) -> None:
    """Refuses what an op does not take; `sizes` are those of the arguments before, by letter."""
    dims, dtype = _ARGUMENTS[name]
    if op.startswith("grouped_ffn") and name in _OF_EXPERTS:
        is_first = name == "gate_proj" and value.dim() == 3
        dims = _OF_EXPERTS[name].split() if is_first or "h" in sizes else dims
    if value.dim() != len(dims):
        raise RuntimeError(
            f"{op}: {name} must have {len(dims)} dimensions, got shape {list(value.shape)}"
        )
    if dtype is not None and value.dtype != dtype:
        raise RuntimeError(f"{op}: {name} must be {dtype}, got {value.dtype}")
    if name == "expert_offsets" and value.shape[0] < 2:
        raise RuntimeError(f"{op}: {name} must have at least 2 entries, got {value.shape[0]}")
    if name == "expert_offsets" and type(value.shape[0]) is int:
        sizes["E"] = value.shape[0] - 1
    for letter, size in zip(dims, value.shape, strict=True):
        if letter != "?" and type(size) is int and sizes.setdefault(letter, size) != size:
            raise RuntimeError(
                f"{op}: {name} must fit the arguments before it, [{', '.join(dims)}] with "
                f"{letter} = {sizes[letter]}, got shape {list(value.shape)}"
            )


def refuse_tangents(op: str, *arguments: Any) -> None:
    """Raises RuntimeError for a tensor with a tangent: there is no forward-mode derivative.

    NOTE: where nothing requires a gradient, torch would drop tangents without a word. Public
    functions call this where a level of forward-mode differentiation is entered.
    """
    for value in arguments:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op}: arguments must have no tangent (forward-mode differentiation, "
                "torch.func.jvp), got one; backward works"
            )


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Registers the backward pass of `sparse_unified::<op>`."""
    name = f"sparse_unified::{op}"
    torch.library.register_autograd(name, backward, setup_context=setup_context)


# needs_input_grad, gradient of y, inputs, activations -> a gradient or None for each input.
FfnGradients = Callable[
    [Sequence[bool], Tensor, tuple[Any, ...], tuple[Tensor, ...]], tuple[Tensor | None, ...]
]


def register_ffn_autograd(op: str, gradients: FfnGradients) -> None:
    """Registers the backward passes of an FFN.

    That of `<op>` computes the two activations again, that of `<op>_train` has kept them.
    """
    train = getattr(torch.ops.sparse_unified, f"{op}_train")

    def save(ctx: Any, inputs: tuple[Any, ...], activations: tuple[Tensor, ...] = ()) -> None:
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors, *activations)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    def setup_context_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs, output[1:])

    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = tuple(next(tensors) if held is None else held[0] for held in ctx.constants)
        activations = tuple(tensors) or train(*inputs)[1:]
        return gradients(ctx.needs_input_grad, grad_y, inputs, activations)

    register_autograd(op, backward, setup_context)
    register_autograd(f"{op}_train", backward, setup_context_train)
    refuse_gradient(f"{op}_backward")


def call_ffn(op: str, arguments: tuple[Any, ...], *, recompute: bool) -> Tensor:
    """Calls `<op>`, or `<op>_train` where a gradient will be wanted of kept activations."""
    if forward_ad._current_level >= 0:
        refuse_tangents(op, *arguments)
    wants_gradient = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in arguments
    )
    y: Tensor
    if wants_gradient and not recompute:
        y, _, _ = getattr(torch.ops.sparse_unified, f"{op}_train")(*arguments)
    else:
        y = getattr(torch.ops.sparse_unified, op)(*arguments)
    return y


def fake_ffn_gradients(
    x: Tensor, num_rows: int, weights: Sequence[Tensor], needs_x: bool, needs_weights: bool
) -> tuple[Tensor, ...]:
    """Gradients of the rows and of the three weights, empty where unwanted."""
    own = [(len(w) if needs_weights else 0, *w.shape[1:]) for w in weights]
    return tuple(x.new_empty(shape) for shape in ((num_rows if needs_x else 0, x.shape[1]), *own))


def keep_wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Each gradient that is needed, None for the others."""
    return tuple(grad if needed else None for grad, needed in zip(gradients, needs, strict=True))


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

    register_autograd(op, backward, setup_context)
