# SPDX-License-Identifier: Apache-2.0
"""The weights of a dense FFN of another make: three projections, or gate and up in one.

`gate_up_proj`, as serving engines have it, is one matrix [2I, D]: the rows of gate_proj, then those
of up_proj. Weights that accelerate keeps elsewhere are read from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import PROJECTIONS
from sparse_unified.nn import SparseMoE

MERGED = "gate_up_proj"
MERGED_PROJECTIONS = (MERGED, "down_proj")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DenseWeights(NamedTuple):
    """The three tensors of a dense FFN: gate_proj and up_proj [I, D], down_proj [D, I]."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor


def projection_names(ffn: object) -> tuple[str, ...]:
    """Returns the projections by which a module is a dense FFN; () if it is none."""
    for names in (PROJECTIONS, MERGED_PROJECTIONS):
        if all(isinstance(getattr(ffn, name, None), nn.Module) for name in names):
            return names
    return ()


def projection(ffn: nn.Module, name: str) -> nn.Module:
    """Returns the module that holds a projection of a dense FFN, be it with another one."""
    merged = projection_names(ffn) == MERGED_PROJECTIONS and name != "down_proj"
    part: nn.Module = getattr(ffn, MERGED if merged else name)
    return part


def read_weights(ffn: nn.Module, at: str) -> DenseWeights:
    """Returns the weights of a dense FFN, the parameters themselves without their gradients.

    Weights that accelerate has offloaded come from where it keeps them, on the CPU.

    Args:
        at: the start of messages.

    Raises:
        ValueError: the FFN is sparse already, or holds anything but plain floating weights of
            fitting shapes, one dtype and one device: a bias, an adapter, quantised weights.
    """
    if isinstance(ffn, SparseMoE) or hasattr(ffn, "experts"):
        raise ValueError(f"{at}: FFN must be dense, got a {type(ffn).__name__}, sparse already")
    names = projection_names(ffn)
    if not names:
        raise ValueError(
            f"{at}: FFN must have {', '.join(PROJECTIONS)} (or {' and '.join(MERGED_PROJECTIONS)})"
            f", got a {describe_module(ffn)}"
        )
    parts = {name: _plain_weight(getattr(ffn, name), f"{at}: {name}") for name in names}
    known = {f"{name}.weight" for name in names}
    others = [name for name, _ in ffn.named_parameters() if name not in known]
    if others:
        raise ValueError(
            f"{at}: FFN must have no parameters but its {len(names)} weights, "
            f"got {list_some(others)}"
        )
    if MERGED in parts:
        merged = parts[MERGED]
        if merged.ndim != 2 or merged.shape[0] % 2:
            raise ValueError(
                f"{at}: {MERGED}.weight must have shape [2I, D], got {list(merged.shape)}"
            )
        gate_proj, up_proj = merged.chunk(2)
        dense = DenseWeights(gate_proj, up_proj, parts["down_proj"])
    else:
        dense = DenseWeights(*parts.values())
    _check_fit(dense, at)
    if dense.gate_proj.is_meta and any(list(hooks_of(module)) for module in ffn.modules()):
        raise ValueError(f"{at}: weights must be in memory, got weights offloaded by accelerate")
    return dense


def offloaded(ffn: nn.Module) -> Any:
    """Returns a hook by which accelerate brings weights of a FFN to where it runs; else None."""
    for module in ffn.modules():
        for hook in hooks_of(module):
            if getattr(hook, "offload", False):
                return hook
    return None


def offload_like(ffn: nn.Module, other: nn.Module) -> None:
    """Lets accelerate keep the weights of a module on the CPU if it does so for another one's."""
    hook = offloaded(other)
    if hook is None:
        return
    accelerate = importlib.import_module("accelerate.hooks")  # it made the hook
    accelerate.add_hook_to_module(
        ffn,
        accelerate.AlignDevicesHook(
            execution_device=hook.execution_device, offload=True, place_submodules=True
        ),
    )


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks that accelerate has put on a module, those of a sequence one by one."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def describe_module(value: object) -> str:
    """Writes a type and, for a module, what it is made of."""
    if not isinstance(value, nn.Module):
        return type(value).__name__
    children = list_some([name for name, _ in value.named_children()])
    return f"{type(value).__name__} ({children})"


def _plain_weight(part: nn.Module, at: str) -> Tensor:
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{at} must have a weight, got a {describe_module(part)}")
    if getattr(part, "bias", None) is not None:
        raise ValueError(f"{at} must have no bias, got {type(part).__name__} with one")
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{at}.weight must be float32, bfloat16 or float16, not quantised, got {weight.dtype}"
        )
    # Engines mark their parameters by subclasses, which is fine; a subclass with a dispatch of its
    # own stores something else than its values.
    own_dispatch = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    marked = nn.Parameter in type(weight).__mro__
    if own_dispatch or not (marked or type(weight) is Tensor):
        raise ValueError(f"{at}.weight must be a plain tensor, got {type(weight).__name__}")
    if weight.is_meta:
        weight = _stored_elsewhere(part, weight)
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


def _stored_elsewhere(part: nn.Module, weight: Tensor) -> Tensor:
    """Returns the values of a weight on the meta device that accelerate keeps for `part`."""
    for hook in hooks_of(part):
        stored = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and stored is not None:
            value: Tensor = stored["weight"]
            return value.to(weight.dtype)
    return weight


def _check_fit(dense: DenseWeights, at: str) -> None:
    shapes = [list(weight.shape) for weight in dense]
    fit = len(shapes[0]) == 2 and shapes[0] == shapes[1] == shapes[2][::-1] and 0 not in shapes[0]
    if not fit:
        raise ValueError(
            f"{at}: weights must have shapes [I, D], [I, D] and [D, I] ({', '.join(PROJECTIONS)}), "
            f"got {', '.join(map(str, shapes))}"
        )
    for what in ("dtype", "device"):
        values = {str(getattr(weight, what)) for weight in dense}
        if len(values) > 1:
            raise ValueError(
                f"{at}: weights must share one {what}, got {', '.join(sorted(values))}"
            )
