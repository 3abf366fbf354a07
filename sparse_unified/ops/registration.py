# SPDX-License-Identifier: Apache-2.0
"""What all ops register alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import register_autograd

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
        "grad_y": "T D",
        "gate_rows": "? ?",
        "up_rows": "? ?",
    },
}
# Weights of grouped_ffn may also have a dimension of experts.
_OF_EXPERTS = {"gate_proj": "E h D", "up_proj": "E h D", "down_proj": "E D h"}
_ARGUMENTS = {
    name: (dims.split(), dtype) for dtype, own in _DIMENSIONS.items() for name, dims in own.items()
}


def register_fake(op: str, fake: Callable[[Any], Any]) -> None:
    """Registers the fake of `sparse_unified::<op>`, which also runs for meta tensors.

    NOTE: given tensors of the CPU and of meta, torch calls the fake, and its empty CPU tensors
    would pass for a result.

    Args:
        fake: of an object with the arguments as attributes, returns the outputs.

    Raises (when the op is called):
        RuntimeError: tensors are None or on several devices, or a shape, dtype or top_k does not
            fit. Sizes that are symbolic are left to the kernel.
    """
    schema = getattr(torch.ops.sparse_unified, op).default._schema.arguments
    names = [argument.name for argument in schema]
    optional = {argument.name: argument.default_value for argument in schema}
    required = {argument.name for argument in schema if str(argument.type) == "Tensor"}

    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**optional, **dict(zip(names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        sizes: dict[str, int] = {}
        for name, value in given.items():
            if value is None and name in required:
                raise RuntimeError(f"{op}: {name} must be a tensor, got None")
            if name in tensors:
                _check(op, name, value, sizes)
        top_k = given.get("top_k")
        if type(top_k) is int and not 1 <= top_k <= sizes.get("E", top_k):
            raise RuntimeError(f"{op}: top_k must be from 1 to {sizes['E']}, got {top_k}")
        floats = {value.dtype for name, value in tensors.items() if name in _DIMENSIONS[None]}
        if len(floats) > 1 or not floats <= set(_FLOATS):
            raise RuntimeError(
                f"{op}: tensors must be float32, bfloat16 or float16, all alike, got "
                f"{' and '.join(sorted(map(str, floats)))}"
            )
        devices = sorted({str(value.device) for value in tensors.values()})
        if len(devices) > 1:
            found = " and ".join(devices)
            raise RuntimeError(f"{op}: arguments must be on one device, got {found}")
        return fake(SimpleNamespace(**given))

    torch.library.register_fake(f"sparse_unified::{op}")(checked)


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


def register_ffn_autograd(op: str, leaves: Sequence[Sequence[int]]) -> None:
    """Registers the backward passes of an FFN, whose last argument is a number.

    That of `<op>` computes the two activations again, that of `<op>_train` has kept them.

    Args:
        leaves: positions of the inputs that `<op>_backward` has gradients for, in its order; a
            group for each of its flags.
    """
    ours = torch.ops.sparse_unified
    positions = [position for group in leaves for position in group]
    names = [argument.name for argument in getattr(ours, op).default._schema.arguments]
    schema = getattr(ours, f"{op}_backward").default._schema.arguments
    flags = [argument.name for argument in schema[-len(leaves) :]]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        activations = () if isinstance(output, Tensor) else output[1:]
        ctx.mark_non_differentiable(*activations)
        *tensors, ctx.number = inputs
        ctx.save_for_backward(*tensors, *activations)

    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        count = len(names) - 1
        saved = ctx.saved_tensors  # NOTE: once; checkpointing refuses a second look
        tensors, activations = saved[:count], saved[count:]
        if not activations:
            activations = getattr(ours, f"{op}_train")(*tensors, ctx.number)[1:]
        needs = ctx.needs_input_grad
        wanted = [any(needs[position] for position in group) for group in leaves]
        found = getattr(ours, f"{op}_backward")(grad_y, *tensors, *activations, ctx.number, *wanted)
        gradients = {i: grad for i, grad in zip(positions, found, strict=True) if needs[i]}
        return tuple(gradients.get(i) for i in range(len(names)))

    def fake(a: Any) -> tuple[Tensor, ...]:
        """Gradients of their inputs' shapes, without rows where unwanted."""
        rows = [
            (getattr(a, names[position]), getattr(a, flag))
            for group, flag in zip(leaves, flags, strict=True)
            for position in group
        ]
        return tuple(t.new_empty((t.shape[0] if wanted else 0, *t.shape[1:])) for t, wanted in rows)

    for name in (op, f"{op}_train"):
        register_autograd(f"sparse_unified::{name}", backward, setup_context=save)
    register_fake(f"{op}_backward", fake)
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


def refuse_gradient(op: str, *, advice: str = "") -> None:
    """Makes a backward pass through `sparse_unified::<op>` an error.

    NOTE: without it torch warns and goes on with gradients of zero.

    Raises (in the backward pass):
        RuntimeError: a gradient is asked of the op.
    """

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op}: arguments must not need a gradient, got a backward pass{advice}")

    register_autograd(f"sparse_unified::{op}", backward, setup_context=lambda *_, **__: None)
