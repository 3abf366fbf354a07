# SPDX-License-Identifier: Apache-2.0
"""Dense FFNs of any make: their weights, what they return, and what may take their place.

A FFN has three projections, or gate and up in one: `gate_up_proj`, as serving engines have it, is
one matrix [2I, D], the rows of gate_proj, then those of up_proj. Weights that accelerate keeps
elsewhere are read from there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import Cut, narrowed
from sparse_unified.surgery.exchange import hooks_of, undisturbed

MERGED_PROJECTIONS = ("gate_up_proj", "down_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What arguments call a cache.
_CACHES = ("past_key_value", "past_key_values", "layer_past", "cache")

# Far above the rounding of bf16 (below 1 %), far below what another activation makes of
# pre-activations of this size (GELU: more than 10 %).
_TOLERANCE = 0.04
_PREACTIVATION_RMS = 2.0


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


def read_weights(ffn: nn.Module, *, merge: bool = False) -> DenseWeights:
    """Returns the weights of a dense FFN: the memory of its parameters, and their requires_grad.

    With `merge`, copies of those that peft has wrapped, its adapters merged.

    Raises:
        ValueError: the FFN is sparse already, or holds anything but plain floating weights of
            fitting shapes, one dtype and one device: a bias, an adapter, quantised weights.
    """
    if not (names := projection_names(ffn)):
        raise ValueError(
            f"FFN must be dense, made of {', '.join(PROJECTIONS)} (or "
            f"{' and '.join(MERGED_PROJECTIONS)}), got a {describe_module(ffn)}"
        )
    layers = [getattr(ffn, name) for name in names]
    if merge:
        layers = list(map(_without_adapters, layers))
    parts = list(map(plain_weight, layers, names))
    inside = tuple(f"{name}." for name in names)
    others = [name for name, _ in ffn.named_parameters() if not name.startswith(inside)]
    for name, layer in zip(names, layers, strict=True):
        others += [f"{name}.{own}" for own, _ in layer.named_parameters() if own != "weight"]
    if others:
        raise ValueError(
            f"FFN must have no parameters but its {len(names)} weights, got {list_some(others)}"
        )
    if names == MERGED_PROJECTIONS:
        halves = parts[0].detach().chunk(2)
        parts[:1] = [half.requires_grad_(parts[0].requires_grad) for half in halves]
    shapes = [list(weight.shape) for weight in parts]
    kinds = {f"{weight.dtype} on {weight.device}" for weight in parts}
    is_swiglu = len(shapes[0]) == 2 and shapes[0] == shapes[1] == shapes[-1][::-1]
    if not is_swiglu or 0 in shapes[0] or len(kinds) > 1:
        raise ValueError(
            f"weights must have shapes [I, D], [I, D] and [D, I] ({', '.join(PROJECTIONS)}), one "
            f"dtype and one device, got {', '.join(map(str, shapes))}, {' and '.join(kinds)}"
        )
    dense = DenseWeights(*parts)
    if dense.gate_proj.is_meta and any(list(hooks_of(module)) for module in ffn.modules()):
        raise ValueError("weights must be in memory, got weights offloaded by accelerate")
    if names == MERGED_PROJECTIONS:
        returns_tuple(ffn, dense)  # which half is which shows in what it computes
    return dense


def describe_module(value: object) -> str:
    """Writes a type and, for a module, what it is made of."""
    if not isinstance(value, nn.Module):
        return type(value).__name__
    children = list_some([name for name, _ in value.named_children()])
    return f"{type(value).__name__} ({children})"


def _without_adapters(layer: Any) -> Any:
    """Returns a linear layer; of one that peft has wrapped a copy with the adapters merged."""
    if "base_layer" not in layer._modules:
        return layer
    if not layer.disable_adapters:
        layer = copy.deepcopy(layer)
        layer.merge()
    return layer.get_base_layer()


def plain_weight(part: nn.Module, name: str) -> Tensor:
    """Returns the weight of a projection, which must be plain, with no other but a bias."""
    weight = getattr(part, "weight", None)
    others = [n for n, _ in part.named_parameters() if n not in ("weight", "bias")]
    if not isinstance(weight, Tensor) or others:
        raise ValueError(
            f"{name} must be a linear layer and nothing else, got a {describe_module(part)}"
        )
    # Engines mark their parameters by subclasses, which is fine; a subclass with a dispatch of its
    # own stores something else than its values.
    own_dispatch = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    is_marked = nn.Parameter in type(weight).__mro__ or type(weight) is Tensor
    if own_dispatch or not is_marked or weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}.weight must be a plain tensor of float32, bfloat16 or float16, got a "
            f"{type(weight).__name__} of {weight.dtype}"
        )
    trained = weight.requires_grad
    if weight.is_meta:
        for hook in hooks_of(part):  # accelerate keeps the values
            stored = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and stored is not None:
                weight = stored["weight"].to(weight.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().requires_grad_(trained)


@torch.no_grad()
def returns_tuple(ffn: nn.Module, weights: DenseWeights) -> bool:
    """Tells whether a dense FFN returns (y, router_logits) rather than y.

    Its `forward` runs once on one token [1, D], without hooks, in eval mode; buffers keep their
    values. No attribute says that the activation is SiLU or that nothing else happens on the way,
    so a ValueError says where the output differs from the formula that a new module computes.
    """
    gate_proj = weights.gate_proj
    # A token that drives the activation out of its linear range.
    token = torch.arange(gate_proj.shape[1], device=gate_proj.device, dtype=torch.float32)
    token = (2.4 * token + 0.5).cos()[None]
    if not gate_proj.is_meta:
        hidden = F.linear(token.to(gate_proj.dtype), gate_proj)
        rms = hidden.float().square().mean().sqrt().item()
        token = token * (_PREACTIVATION_RMS / rms if 0 < rms < float("inf") else 1.0)
    token = token.to(gate_proj.dtype)
    with undisturbed(ffn):
        try:
            out = ffn.forward(token)
        except Exception as error:
            raise ValueError(
                f"forward must run on one token {list(token.shape)}, "
                f"got {type(error).__name__}: {error}"
            ) from error
    is_tuple = isinstance(out, tuple)
    y = out[0] if is_tuple and len(out) == 2 else out
    if not isinstance(y, Tensor) or y.shape != token.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"forward must return y {list(token.shape)} or (y, router_logits), got {got}"
        )
    if y.is_meta:
        return is_tuple
    hidden = F.silu(F.linear(token, gate_proj)) * F.linear(token, weights.up_proj)
    expected = F.linear(hidden, weights.down_proj).float()
    size = expected.norm().item()
    deviation = (y.float().to(expected.device) - expected).norm().item()
    # NOTE: weights that overflow or are not finite cannot be judged this way; scores are checked.
    if size < float("inf") and not deviation <= _TOLERANCE * size:
        raise ValueError(
            "FFN must compute down_proj(silu(gate_proj(x)) * up_proj(x)), got an output of norm "
            f"{size:.3g} that is {deviation:.3g} away from it"
        )
    return is_tuple


def cut_linear(linear: Any, cut: Cut) -> None:
    """Leaves some of the outputs (dim 0) or inputs (dim 1) of a linear layer, bit for bit.

    What accelerate keeps of it elsewhere is cut as well.
    """
    hook = next((h for h in hooks_of(linear) if getattr(h, "weights_map", None) is not None), None)
    stored = {}
    for name, old in linear._parameters.items():
        if old is None:
            continue
        values = None if hook is None else hook.weights_map[name]
        if cut.dim == 0 or name != "bias":
            new = cut.of(old.detach())
            linear._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
            values = None if values is None else cut.of(values)
        stored[name] = values
    if hook is not None:
        hook.weights_map = stored
    for name, size in zip(("out_features", "in_features"), linear.weight.shape, strict=True):
        if hasattr(linear, name):
            setattr(linear, name, size)


def cut_ffn(ffn: nn.Module, kept: Tensor) -> None:
    """Leaves the neurons `kept` [kept] of a checked FFN, bit for bit; routers stay."""
    if isinstance(ffn, SparseMoE):
        for name in PROJECTIONS:
            old = getattr(ffn, name)
            left = Cut(int(name == "down_proj"), kept).of(old.detach())
            setattr(ffn, name, nn.Parameter(left, requires_grad=old.requires_grad))
        ffn.layout, ffn.intermediate_size = narrowed(ffn.layout, kept), len(kept)
        return
    *inputs, output = (getattr(ffn, name) for name in projection_names(ffn))
    rows = kept if len(inputs) == 2 else torch.cat([kept, inputs[0].weight.shape[0] // 2 + kept])
    for linear in inputs:
        cut_linear(linear, Cut(0, rows))
    cut_linear(output, Cut(1, kept))


class Skipped(nn.Module):
    """Zeros where a layer that always adds its attention or FFN is not to run it.

    Args:
        values: what the module returned: 0 for hidden states alone, 2 for a tuple with one more
            value, 3 with two more, of which the last is the cache that it was given.
        like: a tensor that tells dtype and device.
    """

    def __init__(self, values: int, like: Tensor) -> None:
        super().__init__()
        self.values = values
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module took, hidden states [..., D] first; returns zeros like them."""
        zeros = torch.zeros_like(hidden_states(args, kwargs))
        cache = next((kwargs[name] for name in _CACHES if name in kwargs), None)
        return (zeros, None, cache)[: self.values] if self.values else zeros


def hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the hidden states that a module is given: the first tensor of its arguments."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def read_ffn(ffn: nn.Module) -> tuple[DenseWeights, bool]:
    """Returns the weights of a dense or sparse FFN, and whether it returns (y, router_logits).

    Those of a sparse one must be plain and in memory, a dense one as for `returns_tuple`.
    """
    if not isinstance(ffn, SparseMoE):
        weights = read_weights(ffn)
        return weights, returns_tuple(ffn, weights)
    if ffn.gate_proj.is_meta and hasattr(ffn, "_hf_hook"):
        raise ValueError("weights must be in memory, got weights offloaded by accelerate")
    ffn.official_views()  # refuses weights in fewer bits
    return DenseWeights(ffn.gate_proj, ffn.up_proj, ffn.down_proj), ffn.return_router_logits
