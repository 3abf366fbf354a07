# SPDX-License-Identifier: Apache-2.0
"""Dense FFNs of any make: their weights, what they return, and what may take their place.

A FFN has three projections, or gate and up in one: `gate_up_proj`, as serving engines have it, is
one matrix [2I, D], the rows of gate_proj, then those of up_proj. Weights that accelerate keeps
elsewhere are read from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import PROJECTIONS
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import Cut
from sparse_unified.surgery.exchange import hooks_of, undisturbed

MERGED_PROJECTIONS = ("gate_up_proj", "down_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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


def read_weights(ffn: nn.Module) -> DenseWeights:
    """Returns the weights of a dense FFN: the memory of its parameters, and their requires_grad.

    Weights that accelerate has offloaded come from where it keeps them, on the CPU.

    Raises:
        ValueError: the FFN is sparse already, or holds anything but plain floating weights of
            fitting shapes, one dtype and one device: a bias, an adapter, quantised weights.
    """
    if isinstance(ffn, SparseMoE) or hasattr(ffn, "experts"):
        raise ValueError(f"FFN must be dense, got a {type(ffn).__name__}, sparse already")
    names = projection_names(ffn)
    if not names:
        raise ValueError(
            f"FFN must have {', '.join(PROJECTIONS)} (or {' and '.join(MERGED_PROJECTIONS)}), "
            f"got a {describe_module(ffn)}"
        )
    parts = [plain_weight(getattr(ffn, name), name) for name in names]
    known = {f"{name}.weight" for name in names}
    if others := [name for name, _ in ffn.named_parameters() if name not in known]:
        raise ValueError(
            f"FFN must have no parameters but its {len(names)} weights, got {list_some(others)}"
        )
    if names == MERGED_PROJECTIONS:
        halves = parts[0].detach().chunk(2)
        parts[:1] = [half.requires_grad_(parts[0].requires_grad) for half in halves]
    shapes = [list(weight.shape) for weight in parts]
    if len(shapes[0]) != 2 or not shapes[0] == shapes[1] == shapes[-1][::-1] or 0 in shapes[0]:
        raise ValueError(
            f"weights must have shapes [I, D], [I, D] and [D, I] ({', '.join(PROJECTIONS)}), "
            f"got {', '.join(map(str, shapes))}"
        )
    for what in ("dtype", "device"):
        values = {str(getattr(weight, what)) for weight in parts}
        if len(values) > 1:
            raise ValueError(f"weights must share one {what}, got {', '.join(sorted(values))}")
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


def plain_weight(part: nn.Module, name: str) -> Tensor:
    """Returns the weight of a projection: the memory of its parameter, and its requires_grad.

    Raises:
        ValueError: it is no plain floating tensor, or not the only one but for a bias.
    """
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} must have a weight, got a {describe_module(part)}")
    if others := [n for n, _ in part.named_parameters() if n not in ("weight", "bias")]:
        raise ValueError(f"{name} must be a linear layer and nothing else, got {list_some(others)}")
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}.weight must be float32, bfloat16 or float16, not quantised, got {weight.dtype}"
        )
    # Engines mark their parameters by subclasses, which is fine; a subclass with a dispatch of its
    # own stores something else than its values.
    own_dispatch = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    marked = nn.Parameter in type(weight).__mro__
    if own_dispatch or not (marked or type(weight) is Tensor):
        raise ValueError(f"{name}.weight must be a plain tensor, got {type(weight).__name__}")
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

    Its `forward` runs once on one token, without hooks, in eval mode; buffers keep their values. No
    attribute says that the activation is SiLU or that nothing else happens on the way, so the
    output is compared with the formula that a new module computes.

    Raises:
        ValueError: it fails on a token [1, D], returns something else, or y is not
            down_proj(silu(gate_proj(x)) * up_proj(x)).
    """
    token = _token(weights)
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
    hidden = F.silu(F.linear(token, weights.gate_proj)) * F.linear(token, weights.up_proj)
    expected = F.linear(hidden, weights.down_proj).float()
    size = expected.norm().item()
    deviation = (y.float().to(expected.device) - expected).norm().item()
    # NOTE: weights that overflow or are not finite cannot be judged this way; scores are checked.
    if size < float("inf") and not deviation <= _TOLERANCE * size:
        relative = f"{100 * deviation / size:.0f} %" if size else "all"
        raise ValueError(
            "FFN must compute down_proj(silu(gate_proj(x)) * up_proj(x)), "
            f"got an output that is {relative} away from it"
        )
    return is_tuple


def _token(weights: DenseWeights) -> Tensor:
    """Returns a token [1, D] that drives the activation out of its linear range."""
    gate_proj = weights.gate_proj
    token = torch.arange(gate_proj.shape[1], device=gate_proj.device, dtype=torch.float32)
    token = (2.4 * token + 0.5).cos()[None]
    if gate_proj.is_meta:
        return token.to(gate_proj.dtype)
    rms = F.linear(token.to(gate_proj.dtype), gate_proj).float().square().mean().sqrt().item()
    scale = _PREACTIVATION_RMS / rms if 0 < rms < float("inf") else 1.0
    return (token * scale).to(gate_proj.dtype)


def cut_linear(linear: Any, cut: Cut) -> None:
    """Leaves some of the outputs (dim 0) or inputs (dim 1) of a linear layer, bit for bit.

    What accelerate keeps of it elsewhere is cut as well.
    """
    hook = next((h for h in hooks_of(linear) if getattr(h, "weights_map", None) is not None), None)
    stored = {}
    for name, old in linear._parameters.items():
        if old is None:
            continue
        is_whole = cut.dim == 1 and name == "bias"
        if not is_whole:
            new = cut.of(old.detach())
            linear._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        if hook is not None:
            values = hook.weights_map[name]
            stored[name] = values if is_whole else cut.of(values)
    if hook is not None:
        hook.weights_map = stored
    for name, size in zip(("out_features", "in_features"), linear.weight.shape, strict=True):
        if hasattr(linear, name):
            setattr(linear, name, size)


def cut_ffn(ffn: nn.Module, kept: Tensor) -> None:
    """Leaves some of the neurons of a FFN, bit for bit; the routers of a sparse one stay.

    Args:
        ffn: a sparse one, or a checked dense one, see `read_weights`.
        kept: [kept] int64, ascending neuron indices, in expert order.
    """
    if isinstance(ffn, SparseMoE):
        for name in PROJECTIONS:
            old = getattr(ffn, name)
            left = Cut(int(name == "down_proj"), kept).of(old.detach())
            setattr(ffn, name, nn.Parameter(left, requires_grad=old.requires_grad))
        shared = int((kept < ffn.layout.shared_width).sum())
        ffn.layout = replace(
            ffn.layout, intermediate_size=len(kept), shared_intermediate_size=shared
        )
        ffn.intermediate_size = len(kept)
        return
    *inputs, output = (getattr(ffn, name) for name in projection_names(ffn))
    if len(inputs) == 1:  # gate and up in one
        size = inputs[0].weight.shape[0] // 2
        cut_linear(inputs[0], Cut(0, torch.cat([kept, size + kept])))
    else:
        for linear in inputs:
            cut_linear(linear, Cut(0, kept))
    cut_linear(output, Cut(1, kept))


class Skipped(nn.Module):
    """Zeros where a layer that always adds its attention or FFN is not to run it.

    Args:
        others: what the module returned behind its hidden states: None when it returned a tensor
            alone, else the argument (position or name) that each other value of the tuple is, as a
            cache that is handed through, or None.
        like: a tensor that tells dtype and device.
    """

    def __init__(self, others: tuple[int | str | None, ...] | None, like: Tensor) -> None:
        super().__init__()
        self.others = others
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module took, hidden states [..., D] first; returns zeros like them."""
        zeros = torch.zeros_like(hidden_states(args, kwargs))
        if self.others is None:
            return zeros
        given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
        return (zeros, *(None if key is None else given.get(key) for key in self.others))


def hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the hidden states that a module is given: the first tensor of its arguments.

    Raises:
        ValueError: there is no tensor.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("a part to be skipped must be given hidden states, got no tensor")


def skipped_ffn(ffn: nn.Module) -> Skipped:
    """Returns what takes the place of a FFN in a layer that cannot do without one.

    Raises:
        ValueError: the FFN is neither sparse nor a plain dense SwiGLU.
    """
    if isinstance(ffn, SparseMoE):
        is_tuple, weight = ffn.return_router_logits, ffn.gate_proj.detach()
    else:
        weights = read_weights(ffn)
        is_tuple, weight = returns_tuple(ffn, weights), weights.gate_proj
    return Skipped((None,) if is_tuple else None, weight).train(ffn.training)
