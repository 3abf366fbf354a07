# SPDX-License-Identifier: Apache-2.0
"""First weights of a router: zeros, small random ones, or fitted to what the experts do.

A token's output is sum_k (1 + logit_k) * expert_k(x) over the top-k logits, so that logits do two
things: their order chooses, their size weighs. With zeros the choice is a tie, which the first K
experts win on every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import context
from sparse_unified.experts.keep import layer_generator
from sparse_unified.experts.layout import MIN_TOKENS, ExpertLayout

# Bounds of the root mean square of the logits: enough to keep their order in bf16, and little
# enough that an expert weighs about 1, as conversion leaves it.
MIN_LOGIT_RMS, MAX_LOGIT_RMS = 0.01, 0.1
RANDOM_LOGIT_RMS = 0.02
_TILE_NEURONS = 1024
_HELD_OUT = 5  # every fifth token
_PENALTIES = tuple(10.0**power for power in range(-4, 5))


class RouterInit(str, Enum):
    """What the routers of a new mixture start from."""

    ZERO = "zero"  # the official way
    RANDOM = "random"  # drawn by seed
    ACTIVATION = "activation"  # fitted to calibration inputs


def check_inputs(inputs: Tensor, hidden_size: int) -> None:
    """Raises ValueError unless inputs of an FFN are finite floats [N >= 8, hidden_size]."""
    if inputs.ndim != 2 or inputs.shape[1] != hidden_size or inputs.shape[0] < MIN_TOKENS:
        raise ValueError(
            f"inputs must have shape [N, {hidden_size}] of at least {MIN_TOKENS} tokens, "
            f"got {list(inputs.shape)}"
        )
    if not inputs.dtype.is_floating_point:
        raise ValueError(f"inputs must be floating point, got {inputs.dtype}")
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("inputs must be finite, got NaN or infinity")


def hidden_activations(inputs: Tensor, gate_proj: Tensor, up_proj: Tensor) -> Tensor:
    """What the neurons of a SwiGLU FFN give: h = silu(gate_proj x) * up_proj x.

    inputs [N, D], gate_proj and up_proj [I, D], any float dtype -> [N, I] fp32, where the weights
    are.
    """
    x = inputs.to(gate_proj.device, torch.float32)
    tiles = zip(gate_proj.split(_TILE_NEURONS), up_proj.split(_TILE_NEURONS), strict=True)
    return torch.cat([F.silu(x @ gate.float().t()) * (x @ up.float().t()) for gate, up in tiles], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFit:
    """A fitted router and what it is worth on calibration tokens.

    Errors are relative L2 distances of the sparse output to the dense one, over every fifth token.
    """

    weight: Tensor  # [E, D] fp32
    error_zero: float  # with a router of zeros
    error: float  # with one fitted to the other four fifths of the tokens
    logit_rms: float  # root mean square of the logits of `weight` on all of them


def random_router(num_experts: int, hidden_size: int, *, seed: int, layer: int = 0) -> Tensor:
    """Draws router weights [E, D] fp32 whose logits on inputs of unit mean square have 0.02."""
    drawn = torch.randn(num_experts, hidden_size, generator=layer_generator(seed, layer))
    return drawn * (RANDOM_LOGIT_RMS * hidden_size**-0.5)


@context("fit_router")
def fit_router(
    inputs: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    layout: ExpertLayout,
    top_k: int,
) -> RouterFit:
    """Fits a router to how much each expert gives on calibration tokens.

    With f_e(x) the output of expert e, the target of its logit is the share

        s_e(x) = |f_e(x)| / sum_j |f_j(x)|  -  1 / E,

    which sums to 0 over the experts. Ridge regression of s on x, its penalty that of the least
    leave-one-out error, gives the weights up to a factor. The factor is the least-squares one
    between the sparse and the dense output, kept to logits of root mean square 0.01 to 0.1.

    Args:
        inputs: x of N >= 8 tokens, [N, D], any float dtype, finite.
        gate_proj, up_proj: [I, D]; down_proj: [D, I]; neurons in expert order, shared first.
        layout: neuron ranges. top_k: experts a token uses.

    Raises:
        ValueError: inputs have another shape, too few tokens, or are not finite.
    """
    check_inputs(inputs, gate_proj.shape[1])
    x = inputs.to(gate_proj.device, torch.float32)
    each = []
    for start, stop in map(layout.expert_range, range(layout.num_experts)):
        hidden = hidden_activations(x, gate_proj[start:stop], up_proj[start:stop])
        each.append(hidden @ down_proj[:, start:stop].float().t())
    outputs = torch.stack(each, 1)  # [N, E, D]
    held_out = torch.arange(len(x), device=x.device) % _HELD_OUT == 0
    rest = ~held_out
    partial = _fit(x[rest], outputs[rest], top_k)
    dense = outputs[held_out].sum(1)
    if layout.shared_width:
        own = slice(layout.shared_width)
        hidden = hidden_activations(x[held_out], gate_proj[own], up_proj[own])
        dense += hidden @ down_proj[:, own].float().t()
    norm = torch.linalg.vector_norm(dense).double().clamp_min(torch.finfo(torch.float64).tiny)

    def error(weight: Tensor) -> float:
        missing = _missing(outputs[held_out], x[held_out] @ weight.t(), top_k)
        return float(torch.linalg.vector_norm(missing).double() / norm)

    weight = _fit(x, outputs, top_k)
    return RouterFit(
        weight=weight,
        error_zero=error(torch.zeros_like(weight)),
        error=error(partial),
        logit_rms=float((x @ weight.t()).square().mean().sqrt()),
    )


def _fit(x: Tensor, outputs: Tensor, top_k: int) -> Tensor:
    """x [N, D], outputs of the experts [N, E, D] -> weights [E, D]."""
    size = torch.linalg.vector_norm(outputs, dim=2)  # [N, E]
    share = size / size.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weight = _ridge(x, share - share.mean(1, keepdim=True))
    logits = x @ weight.t()
    rms = float(logits.square().mean().sqrt())
    if not rms > 0:
        return torch.zeros_like(weight)  # every expert gives the same share on every token
    chosen = _chosen(logits, top_k)
    weighed = torch.einsum("tk,tkd->td", chosen * logits, outputs)
    power = float(weighed.double().square().sum())
    gap = _missing(outputs, logits * 0, top_k, chosen)
    factor = float((gap.double() * weighed.double()).sum()) / power if power > 0 else 0.0
    return weight * min(max(factor, MIN_LOGIT_RMS / rms), MAX_LOGIT_RMS / rms)


def _chosen(logits: Tensor, top_k: int) -> Tensor:
    """Marks the top-k of logits [N, E], lower experts first in ties, with 1."""
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(logits).scatter_(1, order, 1.0)


def _missing(outputs: Tensor, logits: Tensor, top_k: int, chosen: Tensor | None = None) -> Tensor:
    """What the sparse sum [N, D] lacks of the sum of all experts' outputs [N, E, D]."""
    chosen = _chosen(logits, top_k) if chosen is None else chosen
    return torch.einsum("tk,tkd->td", 1 - chosen * (1 + logits), outputs)


def _ridge(x: Tensor, target: Tensor) -> Tensor:
    """Regresses target [N, E] on x [N, D] without a bias; [E, D] in the dtype of x.

    The penalty is one of a few multiples of the mean eigenvalue of x x^T, that of the least
    leave-one-out error. The dual form costs N^3, whatever D is.
    """
    wide, goal = x.double().cpu(), target.double().cpu()
    values, vectors = torch.linalg.eigh(wide @ wide.t())
    values = values.clamp_min(0)
    mean = float(values.mean())
    if not mean > 0:
        return torch.zeros(target.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    rotated = vectors.t() @ goal  # [N, E]
    best, least = mean, float("inf")
    for penalty in (mean * multiple for multiple in _PENALTIES):
        shrunk = values / (values + penalty)
        leverage = (vectors.square() * shrunk).sum(1, keepdim=True)
        residual = (goal - vectors @ (shrunk[:, None] * rotated)) / (1 - leverage)
        error = float(residual.square().mean())
        if error < least:
            best, least = penalty, error
    dual = vectors @ (rotated / (values + best)[:, None])
    return (dual.t() @ wide).to(x)
