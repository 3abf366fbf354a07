# SPDX-License-Identifier: Apache-2.0
"""Whether a provider computes the sparse FFN, before its time is of any interest.

Each token is judged alone, so that one lost row shows: |y[t] - ref[t]| relative to |ref[t]|. The
reference runs in fp32, on a sample of tokens, with the provider's own routing, since a router that
rounds its logits may choose another expert of two that are nearly equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .peers import Provider, Weights

NUM_TOKENS = 128
# In units of the dtype's epsilon; a lost expert of 16 is 25 % of a token, 32 epsilons of bf16.
_FORWARD_EPS, _BACKWARD_EPS = 4, 8
_LEAST_TOLERANCE = 2e-5


class WrongResultError(Exception):
    """A provider computes something else; the text says how far off it is."""


def judge_rows(
    what: str, out: Tensor, expected: Tensor, dtype: torch.dtype, epsilons: int = _BACKWARD_EPS
) -> None:
    """Compares two results row by row; NaN never passes.

    Raises:
        WrongResultError: a row is further off than a few roundings of `dtype` explain.
    """
    rows = (out.float() - expected.float()).flatten(1).norm(dim=1)
    sizes = expected.float().flatten(1).norm(dim=1)
    error = (rows / sizes.clamp_min(1e-30)).max().item()
    allowed = max(epsilons * torch.finfo(dtype).eps, _LEAST_TOLERANCE)
    if not error <= allowed:
        raise WrongResultError(f"{what} is off by {error:.2g}, allowed {allowed:.2g}")


def expert_weights(weights: Tensor, topk_idx: Tensor, num_experts: int) -> Tensor:
    """weights and topk_idx [T, K] -> [T, E], zero where an expert is not used."""
    dense = weights.new_zeros(weights.shape[0], num_experts)
    return dense.scatter_add(1, topk_idx.long(), weights)


def reference(x: Tensor, by_expert: Tensor, weights: Weights) -> Tensor:
    """x [n, D], by_expert [n, E], both fp32 -> y [n, D] fp32: every expert on every token."""
    gate, up, down = (w.float() for w in (weights.gate_proj, weights.up_proj, weights.down_proj))
    by_neuron = by_expert.repeat_interleave(gate.shape[0] // by_expert.shape[1], dim=1)
    return (F.silu(x @ gate.t()) * (x @ up.t()) * by_neuron) @ down.t()


def check_result(
    provider: Provider, x: Tensor, case: Case, weights: Weights, grad: Tensor | None = None
) -> None:
    """Runs a provider and compares some of its tokens; given a gradient of y, that of x too.

    It goes through every product and the router, where there is one. Gradients of weights are
    compared by the tests of the ops alone.

    Raises:
        WrongResultError: some token or gradient is not what the reference computes.
    """
    leaf = x.detach().clone().requires_grad_(grad is not None)
    with torch.set_grad_enabled(grad is not None):
        y = provider(leaf)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise WrongResultError(f"output is {list(y.shape)} {y.dtype}")
    # First and last among them, evenly spread.
    steps = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], NUM_TOKENS), device=x.device)
    tokens = steps.round().long()
    with torch.no_grad():
        routing, topk_idx = (part[tokens] for part in provider.routing(x))
    wide = x[tokens].float().requires_grad_(grad is not None)
    if grad is not None and provider.has_router:
        routing = 1 + (wide @ weights.gate.float().t()).gather(1, topk_idx.long())
    with torch.set_grad_enabled(grad is not None):
        expected = reference(wide, expert_weights(routing, topk_idx, case.num_experts), weights)
    judge_rows("output", y[tokens].detach(), expected.detach(), x.dtype, _FORWARD_EPS)
    if grad is not None:
        y.backward(grad)
        provider.zero_grad(set_to_none=True)
        if leaf.grad is None:
            raise WrongResultError("gradient of the tokens is missing")
        (exact,) = torch.autograd.grad(expected, wide, grad[tokens].float())
        judge_rows("gradient of the tokens", leaf.grad[tokens], exact, x.dtype)
