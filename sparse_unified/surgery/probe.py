# SPDX-License-Identifier: Apache-2.0
"""Runs a dense FFN on one token: what does it return, and is it the SwiGLU we think it is?

No attribute says that the activation is SiLU or that nothing else happens on the way, so the
output is compared with the formula before the module is replaced by one that computes the formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.surgery.find import Target
from sparse_unified.surgery.hooks import undisturbed
from sparse_unified.surgery.weights import DenseWeights

# Far above the rounding of bf16 (below 1 %), far below what another activation makes of
# pre-activations of this size (GELU: more than 10 %).
_TOLERANCE = 0.04
_PREACTIVATION_RMS = 2.0


@torch.no_grad()
def returns_tuple(target: Target, weights: DenseWeights, *, where: str) -> bool:
    """Tells whether a dense FFN returns (y, router_logits) rather than y.

    Its `forward` runs once on one token, without hooks, in eval mode; buffers keep their values.

    Raises:
        ValueError: it fails on a token [1, D], returns something else, or y is not
            down_proj(silu(gate_proj(x)) * up_proj(x)).
    """
    at = target.describe(where)
    token = _token(weights)
    with undisturbed(target.ffn):
        try:
            out = target.ffn.forward(token)
        except Exception as error:
            raise ValueError(
                f"{at}: forward must run on one token {list(token.shape)}, "
                f"got {type(error).__name__}: {error}"
            ) from error
    is_tuple = isinstance(out, tuple)
    y = out[0] if is_tuple and len(out) == 2 else out
    if not isinstance(y, Tensor) or y.shape != token.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{at}: forward must return y {list(token.shape)} or (y, router_logits), got {got}"
        )
    if not y.is_meta:
        _check_formula(y, token, weights, at)
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


def _check_formula(y: Tensor, token: Tensor, weights: DenseWeights, at: str) -> None:
    hidden = F.silu(F.linear(token, weights.gate_proj)) * F.linear(token, weights.up_proj)
    expected = F.linear(hidden, weights.down_proj).float()
    size = expected.norm().item()
    deviation = (y.float().to(expected.device) - expected).norm().item()
    # NOTE: weights that overflow or are not finite cannot be judged this way; scores are checked.
    if size < float("inf") and not deviation <= _TOLERANCE * size:
        relative = f"{100 * deviation / size:.0f} %" if size else "all"
        raise ValueError(
            f"{at}: FFN must compute down_proj(silu(gate_proj(x)) * up_proj(x)), "
            f"got an output that is {relative} away from it"
        )
