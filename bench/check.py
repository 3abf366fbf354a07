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


def _sample(count: int, wanted: int, device: torch.device) -> Tensor:
    """Up to `wanted` of `count` indices, evenly spread, first and last among them."""
    return torch.linspace(0, count - 1, min(count, wanted), device=device).round().long()


def _tolerance(dtype: torch.dtype, epsilons: int) -> float:
    return max(epsilons * torch.finfo(dtype).eps, _LEAST_TOLERANCE)


def judge_rows(what: str, out: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Compares two results of the same products row by row, as gradients are.

    Raises:
        WrongResultError: a row is further off than two roundings of `dtype` explain.
    """
    _judge(what, out, expected, _tolerance(dtype, _BACKWARD_EPS))


def _judge(what: str, out: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares row by row; NaN never passes."""
    rows = (out.float() - expected.float()).flatten(1).norm(dim=1)
    sizes = expected.float().flatten(1).norm(dim=1)
    error = (rows / sizes.clamp_min(1e-30)).max().item()
    if not error <= tolerance:
        raise WrongResultError(f"{what} is off by {error:.2g}, allowed {tolerance:.2g}")


def expert_weights(weights: Tensor, topk_idx: Tensor, num_experts: int) -> Tensor:
    """weights and topk_idx [T, K] -> [T, E], zero where an expert is not used."""
    dense = weights.new_zeros(weights.shape[0], num_experts)
    return dense.scatter_add(1, topk_idx.long(), weights)


def reference(x: Tensor, by_expert: Tensor, weights: Weights) -> Tensor:
    """x [n, D], by_expert [n, E], both fp32 -> y [n, D] fp32: every expert on every token."""
    num_experts = by_expert.shape[1]
    y = torch.zeros_like(x)
    for expert, (gate, up, down) in enumerate(
        zip(
            weights.gate_proj.chunk(num_experts),
            weights.up_proj.chunk(num_experts),
            weights.down_proj.chunk(num_experts, dim=1),
            strict=True,
        )
    ):
        hidden = F.silu(x @ gate.float().t()) * (x @ up.float().t())
        y = y + (hidden * by_expert[:, expert, None]) @ down.float().t()
    return y


def check_forward(provider: Provider, x: Tensor, case: Case, weights: Weights) -> None:
    """Runs a provider forward and compares its tokens.

    Raises:
        WrongResultError: some token is not what the reference computes.
    """
    with torch.inference_mode():
        y = provider(x)
        if y.shape != x.shape or y.dtype != x.dtype:
            raise WrongResultError(f"output is {list(y.shape)} {y.dtype}")
        tokens = _sample(x.shape[0], NUM_TOKENS, x.device)
        routing, topk_idx = provider.routing(x)
        by_expert = expert_weights(routing[tokens], topk_idx[tokens], case.num_experts)
        expected = reference(x[tokens].float(), by_expert, weights)
        _judge("output", y[tokens], expected, _tolerance(x.dtype, _FORWARD_EPS))


def check_backward(
    provider: Provider, x: Tensor, grad: Tensor, case: Case, weights: Weights
) -> None:
    """Runs a provider backward and compares the gradients of some tokens.

    They go through every product and through the router, where there is one. Gradients of weights
    are compared by the tests of the ops alone.

    Raises:
        WrongResultError: a gradient is not what the reference gives.
    """
    leaf = x.detach().clone().requires_grad_()
    provider(leaf).backward(grad)
    provider.zero_grad(set_to_none=True)
    if leaf.grad is None:
        raise WrongResultError("gradient of the tokens is missing")
    tokens = _sample(x.shape[0], NUM_TOKENS, x.device)
    with torch.no_grad():
        topk_idx = provider.routing(x)[1][tokens]
    wide = x[tokens].float().requires_grad_()
    if any(name.endswith("gate.weight") for name, _ in provider.named_parameters()):
        routing = 1 + (wide @ weights.gate.float().t()).gather(1, topk_idx.long())
    else:
        routing = torch.ones(topk_idx.shape, device=x.device)
    y = reference(wide, expert_weights(routing, topk_idx, case.num_experts), weights)
    (expected,) = torch.autograd.grad(y, wide, grad[tokens].float())
    tolerance = _tolerance(x.dtype, _BACKWARD_EPS)
    _judge("gradient of the tokens", leaf.grad[tokens], expected, tolerance)
