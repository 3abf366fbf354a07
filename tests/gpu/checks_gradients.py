# SPDX-License-Identifier: Apache-2.0
"""Gradients against fp64 autograd of the references, finite differences, and themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from device_cases import HALVES, assert_equal, case_on, grid
from op_cases import DTYPES, FfnCase, draw_routing
from registry import Skip, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference


def assert_gradients(own: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Relative error below what a few dozen roundings of the dtype make of it."""
    tolerance = 16 * torch.finfo(dtype).eps
    for position, (gradient, expected) in enumerate(zip(own, exact, strict=True)):
        assert gradient.shape == expected.shape
        error = (gradient.double() - expected).norm()
        allowed = tolerance * expected.norm()
        assert error <= allowed, f"gradient {position} is off by {error:.3g}, allowed {allowed:.3g}"


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def differentiable(case: FfnCase) -> tuple[Tensor, ...]:
    for tensor in (case.x, *case.experts):
        tensor.requires_grad_()
    return case.x, *case.experts


@check(
    *grid(dtype=DTYPES, num_tokens=(1, 53, 1000)),
    small=lambda num_tokens, **_: num_tokens < 100,
)
def gradients_of_route_topk(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    with torch.device(device):
        x = torch.randint(-3, 4, (num_tokens, 72)).to(dtype).requires_grad_()
        gate = torch.randint(-2, 3, (17, 72)).to(dtype).requires_grad_()
        grads = torch.randn(num_tokens, 17), torch.randn(num_tokens, 5)
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 5)
    assert not topk_idx.requires_grad
    own = torch.autograd.grad((logits, topk_logits), (x, gate), grads)
    wide = doubles(x, gate)
    logits, topk_logits, _ = reference.route_topk(*wide, 5)
    exact = torch.autograd.grad((logits, topk_logits), wide, tuple(g.double() for g in grads))
    assert_gradients(own, exact, dtype)


@check(
    *grid(dtype=DTYPES, num_tokens=(1, 41, 1000)),
    small=lambda num_tokens, **_: num_tokens < 100,
)
def gradients_of_permute_and_combine(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    with torch.device(device):
        topk_idx = draw_routing("random", num_tokens, 5, 3)
        _, row_token, token_rows = reference.sort_by_expert(topk_idx, 5)
        x = torch.randn(num_tokens, 72).to(dtype).requires_grad_()
        y = torch.randn(3 * num_tokens, 72).to(dtype).requires_grad_()
        weights = torch.randn(num_tokens, 3).requires_grad_()
        grad_y = torch.randn(3 * num_tokens, 72).to(dtype)
        grad = torch.randn(num_tokens, 72).to(dtype)
    x64, y64, weights64 = doubles(x, y, weights)

    own = torch.autograd.grad(ops.permute(x, row_token, token_rows), x, grad_y)
    exact = torch.autograd.grad(reference.permute(x64, row_token), x64, grad_y.double())
    assert_gradients(own, exact, dtype)
    own = torch.autograd.grad(ops.combine(y, weights, token_rows), (y, weights), grad)
    out = reference.combine(y64, weights64, token_rows)
    exact = torch.autograd.grad(out, (y64, weights64), grad.double())
    assert_gradients(own[:1], exact[:1], dtype)
    assert_gradients(own[1:], exact[1:], torch.float32)
    own = torch.autograd.grad(ops.combine(y, None, token_rows), y, grad)
    exact = torch.autograd.grad(reference.combine(y64, None, token_rows), y64, grad.double())
    assert_gradients(own, exact, dtype)


@check(
    *grid(dtype=HALVES, routing=("random", "last", "gaps"), recompute=(False, True)),
    *grid(dtype=HALVES, routing=("random",), recompute=(False,), num_tokens=(0, 1, 700)),
    *grid(dtype=HALVES, routing=("random",), recompute=(False,), num_tokens=(90,), width=(592,)),
)
def gradients_of_grouped_ffn(
    device: torch.device,
    dtype: torch.dtype,
    routing: str,
    recompute: bool,
    num_tokens: int = 90,
    width: int = 24,
) -> None:
    case = case_on(
        device, num_tokens=num_tokens, hidden_size=40, width=width, dtype=dtype, routing=routing
    )
    inputs = differentiable(case)
    grad = torch.randn(2 * num_tokens, 40, device=device).to(dtype)
    y = ops.grouped_ffn(*case.arguments, case.token_rows, recompute=recompute)
    own = torch.autograd.grad(y, inputs, grad)
    wide = doubles(*inputs)
    y64 = reference.grouped_ffn(wide[0], case.row_token, case.expert_offsets, *wide[1:])
    assert_gradients(own, torch.autograd.grad(y64, wide, grad.double()), dtype)


@check(*grid(dtype=HALVES))
def experts_without_rows_get_zero_gradients(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(
        device,
        num_tokens=9,
        hidden_size=16,
        num_experts=4,
        width=8,
        top_k=1,
        dtype=dtype,
        routing="last",
    )
    inputs = differentiable(case)
    y = ops.grouped_ffn(*case.arguments)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for weight in (grads[1], grads[2], grads[3].t()):
        assert weight[:24].abs().max() == 0
        assert weight[24:].abs().max() > 0


@check(*grid(dtype=HALVES))
def frozen_experts_pass_the_same_gradient_on(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(device, dtype=dtype)
    inputs = differentiable(case)
    grad = torch.randn(74, 40, device=device).to(dtype)
    expected = torch.autograd.grad(ops.grouped_ffn(*case.arguments, case.token_rows), inputs, grad)
    for weight in case.experts:
        weight.requires_grad_(False)
    y = ops.grouped_ffn(*case.arguments, case.token_rows)
    (own,) = torch.autograd.grad(y, case.x, grad)
    assert_equal("gradient of x", own, expected[0])


@check(*grid(dtype=HALVES))
def gradients_repeat_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(device, num_tokens=700, hidden_size=72, num_experts=7, width=56, dtype=dtype)
    inputs = differentiable(case)
    grad = torch.randn(1400, 72, device=device).to(dtype)

    def run() -> tuple[Tensor, ...]:
        y = ops.grouped_ffn(*case.arguments, case.token_rows)
        return torch.autograd.grad(y, inputs, grad)

    expected = run()
    for _ in range(10):
        for position, (own, other) in enumerate(zip(run(), expected, strict=True)):
            assert_equal(f"gradient {position}", own, other)


def slope(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, step: float) -> float:
    """Central difference of a scalar function, in fp64 of its fp32 values."""
    ahead, behind = (function(at + sign * step * along).double() for sign in (1, -1))
    return float((ahead - behind) / (2 * step))


@check()
def gradients_are_slopes(device: torch.device) -> None:
    """Finite differences through route_topk and combine, which take fp32 on every device."""
    with torch.device(device):
        x, gate = torch.randn(6, 24), torch.randn(5, 24)
        y, weights = torch.randn(12, 24), torch.randn(6, 2)
        topk_idx = draw_routing("random", 6, 5, 2)
        _, _, token_rows = reference.sort_by_expert(topk_idx, 5)
        towards = torch.randn(6, 24)
        mix = torch.randn(6, 5)

    def of_logits(value: Tensor) -> Tensor:
        return (ops.route_topk(value, gate, 2)[0] * mix).double().sum()

    def of_rows(value: Tensor) -> Tensor:
        return (ops.combine(value, weights, token_rows) * towards).double().sum()

    def of_weights(value: Tensor) -> Tensor:
        return (ops.combine(y, value, token_rows) * towards).double().sum()

    for function, at in ((of_logits, x), (of_rows, y), (of_weights, weights)):
        along = torch.randn_like(at)
        leaf = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        found = float((gradient.double() * along.double()).sum())
        expected = slope(function, at, along, 1e-2)
        assert abs(found - expected) <= 1e-3 * (1 + abs(expected)), f"{found}, not {expected}"


@check(*grid(dtype=HALVES))
def a_step_down_the_gradient_goes_down(device: torch.device, dtype: torch.dtype) -> None:
    """The whole block, experts and router: the loss falls by about what the gradient says."""
    if device.type == "cpu" and dtype == torch.float16:
        raise Skip("fp16 on the CPU is tested elsewhere")
    case = case_on(device, num_tokens=64, hidden_size=64, num_experts=4, width=32, dtype=dtype)
    inputs = differentiable(case)
    target = torch.randn(128, 64, device=device)

    def loss(*tensors: Tensor) -> Tensor:
        x, *experts = tensors
        rows = ops.grouped_ffn(x, case.row_token, case.expert_offsets, *experts, case.token_rows)
        return (rows.float() - target).square().mean()

    start = loss(*inputs)
    grads = torch.autograd.grad(start, inputs)
    square = sum(g.double().square().sum() for g in grads)
    step = 0.05 * start.item() / float(square)
    with torch.no_grad():
        moved = [
            (t.float() - step * g.float()).to(dtype) for t, g in zip(inputs, grads, strict=True)
        ]
        fell = float(start - loss(*moved))
    predicted = step * float(square)
    assert 0.5 * predicted < fell < 1.5 * predicted, f"fell by {fell:.3g}, not {predicted:.3g}"
