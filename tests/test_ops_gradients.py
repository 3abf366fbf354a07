# SPDX-License-Identifier: Apache-2.0
"""Gradients: against finite differences, and against autograd of the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_cases import DTYPES, FfnCase, ffn_case
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

# Central differences in fp32 with step s err by u * |f| / s for rounding (u = 6e-8, times a few
# for the sums inside) and by s^2 / 6 * |f'''| for the curve. With |f| and |f'''| of about 1 both
# are near 2e-5 at s = 1e-2; values reach 10 here and sums of a dozen terms are taken: 1e-3.
STEP, ATOL, RTOL = 1e-2, 1e-3, 1e-3

FLOATS = ("x", "gate_proj", "up_proj", "down_proj")


def gradcheck(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            function, tuple(inputs), eps=STEP, atol=ATOL, rtol=RTOL, nondet_tol=0.0
        )


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def with_grad(case: FfnCase, names: Sequence[str] = FLOATS) -> FfnCase:
    for name in names:
        getattr(case, name).requires_grad_()
    return case


def gradients(out: Tensor, grad: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


def assert_gradients_close(
    own: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Relative error below what a few dozen roundings of the dtype make of it."""
    tolerance = 16 * torch.finfo(dtype).eps
    for gradient, expected in zip(own, exact, strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == expected.shape
        error = (gradient.double() - expected).norm()
        assert error <= tolerance * expected.norm()


# route_topk


def separated_router(num_tokens: int, hidden_size: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """x and gate whose logits lie so far apart that a finite difference changes no choice."""
    while True:
        x, gate = torch.randn(num_tokens, hidden_size), torch.randn(num_experts, hidden_size)
        gaps = (x @ gate.t()).sort(1).values.diff(dim=1)
        if gaps.min() > 20 * STEP:
            return x.requires_grad_(), gate.requires_grad_()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradcheck_of_route_topk(top_k: int) -> None:
    x, gate = separated_router(3, 5, 4)
    gradcheck(lambda x, gate: ops.route_topk(x, gate, top_k)[:2], (x, gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_route_topk_equal_fp64_autograd(dtype: torch.dtype) -> None:
    # Integers: the choice is the same in every precision, ties included.
    x = torch.randint(-3, 4, (53, 70)).to(dtype).requires_grad_()
    gate = torch.randint(-2, 3, (17, 70)).to(dtype).requires_grad_()
    grads = torch.randn(53, 17), torch.randn(53, 5)
    logits, topk_logits, _ = ops.route_topk(x, gate, 5)
    own = torch.autograd.grad((logits, topk_logits), (x, gate), grads)
    wide = [t.detach().double().requires_grad_() for t in (x, gate)]
    logits, topk_logits, _ = reference.route_topk(*wide, 5)
    exact = torch.autograd.grad((logits, topk_logits), wide, tuple(grad.double() for grad in grads))
    assert_gradients_close(own, exact, dtype)


def test_route_topk_gives_each_argument_its_gradient_alone() -> None:
    for trained in (0, 1):
        arguments = [torch.randn(6, 8), torch.randn(5, 8)]
        arguments[trained].requires_grad_()
        logits, topk_logits, topk_idx = ops.route_topk(*arguments, 2)
        assert not topk_idx.requires_grad
        (logits.sum() + topk_logits.sum()).backward()
        assert arguments[trained].grad is not None
        assert arguments[1 - trained].grad is None


# permute and combine


def rows_of(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    topk_idx = torch.randint(num_experts, (num_tokens, top_k), dtype=torch.int32)
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    return row_token, token_rows


def test_gradcheck_of_permute_and_combine() -> None:
    row_token, token_rows = rows_of(4, 3, 2)
    gradcheck(lambda x: ops.permute(x, row_token, token_rows), [leaf(4, 3)])
    gradcheck(lambda y, w: ops.combine(y, w, token_rows), [leaf(8, 3), leaf(4, 2)])
    gradcheck(lambda y: ops.combine(y, None, token_rows), [leaf(8, 3)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_permute_and_combine_equal_fp64_autograd(dtype: torch.dtype) -> None:
    row_token, token_rows = rows_of(41, 5, 3)
    x, y = leaf(41, 67, dtype=dtype), leaf(123, 67, dtype=dtype)
    weights = leaf(41, 3)
    x64, y64, weights64 = (t.detach().double().requires_grad_() for t in (x, y, weights))

    grad = torch.randn(123, 67).to(dtype)
    own = gradients(ops.permute(x, row_token, token_rows), grad, [x])
    exact = gradients(reference.permute(x64, row_token), grad, [x64])
    assert_gradients_close(own, exact, dtype)

    grad = torch.randn(41, 67).to(dtype)
    grad_y, grad_weights = gradients(ops.combine(y, weights, token_rows), grad, [y, weights])
    exact = gradients(reference.combine(y64, weights64, token_rows), grad, [y64, weights64])
    assert_gradients_close([grad_y], exact[:1], dtype)
    assert_gradients_close([grad_weights], exact[1:], torch.float32)
    own = gradients(ops.combine(y, None, token_rows), grad, [y])
    exact = gradients(reference.combine(y64, None, token_rows), grad, [y64])
    assert_gradients_close(own, exact, dtype)


def test_combine_gives_each_argument_its_gradient_alone() -> None:
    _, token_rows = rows_of(6, 4, 2)
    y, weights = leaf(12, 5), torch.randn(6, 2)
    ops.combine(y, weights, token_rows).sum().backward()
    assert y.grad is not None
    y, weights = torch.randn(12, 5), leaf(6, 2)
    ops.combine(y, weights, token_rows).sum().backward()
    assert weights.grad is not None
    assert y.grad is None


# grouped_ffn


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("routing", ["random", "first"])
def test_gradcheck_of_grouped_ffn(recompute: bool, routing: str) -> None:
    case = with_grad(ffn_case(4, 3, 3, 2, 2, routing=routing))

    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.grouped_ffn(
            x,
            case.row_token,
            case.expert_offsets,
            gate,
            up,
            down,
            case.token_rows,
            recompute=recompute,
        )

    gradcheck(function, (case.x, *case.experts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["random", "last", "gaps"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_grouped_ffn_equal_fp64_autograd(
    dtype: torch.dtype, routing: str, recompute: bool
) -> None:
    case = with_grad(ffn_case(90, 35, 5, 21, 2, dtype, routing))
    grad = torch.randn(180, 35).to(dtype)
    inputs = (case.x, *case.experts)
    y = ops.grouped_ffn(*case.arguments, case.token_rows, recompute=recompute)
    own = gradients(y, grad, inputs)
    x64, *experts64 = wide = [t.detach().double().requires_grad_() for t in inputs]
    y64 = reference.grouped_ffn(x64, case.row_token, case.expert_offsets, *experts64)
    assert_gradients_close(own, gradients(y64, grad, wide), dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_recomputed_gradients_equal_stored_ones(num_tokens: int) -> None:
    case = with_grad(ffn_case(num_tokens, 24, 5, 16, 2))
    grad = torch.randn(num_tokens * 2, 24)
    inputs = (case.x, *case.experts)
    results = []
    for recompute in (False, True):
        for token_rows in (case.token_rows, None):
            y = ops.grouped_ffn(*case.arguments, token_rows, recompute=recompute)
            results.append(gradients(y, grad, inputs))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_experts_without_rows_get_zero_gradients() -> None:
    case = with_grad(ffn_case(9, 8, 4, 3, 1, routing="last"))
    ops.grouped_ffn(*case.arguments).sum().backward()
    for weight in (case.gate_proj.grad, case.up_proj.grad, case.down_proj.grad.t()):
        assert weight[:9].abs().max() == 0
        assert weight[9:].abs().min() > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_experts_get_no_gradient_and_pass_one_on(recompute: bool) -> None:
    everything = with_grad(ffn_case())
    expected = gradients(ops.grouped_ffn(*everything.arguments), torch.ones(74, 40), [everything.x])
    for weight in everything.experts:
        weight.requires_grad_(False)
    y = ops.grouped_ffn(*everything.arguments, everything.token_rows, recompute=recompute)
    y.backward(torch.ones(74, 40))
    assert torch.equal(everything.x.grad, expected[0])
    assert all(weight.grad is None for weight in everything.experts)


def test_frozen_experts_skip_the_weight_gradients() -> None:
    case = ffn_case()
    _, gate_rows, up_rows = torch.ops.sparse_unified.grouped_ffn_train(*case.arguments)

    def sizes(needs_x: bool, needs_weights: bool) -> list[int]:
        outputs = torch.ops.sparse_unified.grouped_ffn_backward(
            torch.ones(74, 40), *case.arguments, gate_rows, up_rows, needs_x, needs_weights
        )
        return [output.numel() for output in outputs]

    assert sizes(True, False) == [74 * 40, 0, 0, 0]
    assert sizes(False, True) == [0, 120 * 40, 120 * 40, 40 * 120]


def test_one_trained_projection_gets_its_gradient_alone() -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        case = with_grad(ffn_case(), [name])
        ops.grouped_ffn(*case.arguments).sum().backward()
        for other in FLOATS:
            assert (getattr(case, other).grad is not None) == (other == name)


def test_gradients_repeat_bit_for_bit_on_any_number_of_threads() -> None:
    case = with_grad(ffn_case(300, 24, 5, 16, 2))
    grad = torch.randn(600, 24)
    inputs = (case.x, *case.experts)

    def run() -> tuple[Tensor, ...]:
        return gradients(ops.grouped_ffn(*case.arguments, case.token_rows), grad, inputs)

    expected = run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for own, other in zip(run(), expected, strict=True):
            assert torch.equal(own, other)


def test_gradients_do_not_depend_on_the_layout_of_the_incoming_one() -> None:
    case = with_grad(ffn_case(37, 24, 5, 16, 2))
    inputs = (case.x, *case.experts)
    grad = torch.randn(24, 74).t()
    y = ops.grouped_ffn(*case.arguments, case.token_rows)
    strided = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    dense = torch.autograd.grad(y, inputs, grad.contiguous())
    for own, other in zip(strided, dense, strict=True):
        assert torch.equal(own, other)


def test_grouped_ffn_combine_refuses_to_be_differentiated() -> None:
    case = with_grad(ffn_case())
    with pytest.raises(RuntimeError, match="grouped_ffn_combine"):
        ops.grouped_ffn_combine(*case.fused_arguments).sum().backward()


def test_tokens_with_unequal_numbers_of_rows_get_their_gradients() -> None:
    # Token 0 has three rows and token 1 one: no [T, K] map exists, and none is needed.
    case = with_grad(ffn_case(2, 12, 2, 8, 2))
    row_token = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    arguments = (case.x, row_token, case.expert_offsets, *case.experts)
    inputs = (case.x, *case.experts)
    grad = torch.randn(4, 12)
    ours = gradients(ops.grouped_ffn(*arguments), grad, inputs)
    expected = gradients(reference.grouped_ffn(*arguments), grad, inputs)
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["route_topk", "combine", "grouped_ffn"])
def test_a_second_derivative_is_refused_and_not_zero(op: str) -> None:
    case = with_grad(ffn_case())
    if op == "route_topk":
        out, inputs = ops.route_topk(case.x, leaf(5, 40), 2)[0], (case.x,)
    elif op == "combine":
        rows = leaf(len(case.row_token), 40)
        out, inputs = ops.combine(rows, case.weights, case.token_rows), (rows,)
    else:
        out, inputs = ops.grouped_ffn(*case.arguments, case.token_rows), (case.x,)
    (first,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}_backward: arguments must not need a gradient"):
        torch.autograd.grad(first.sum(), inputs)


def test_gradient_of_the_whole_block_equals_fp64_autograd() -> None:
    num_experts, top_k = 5, 2
    x = torch.randint(-2, 3, (40, 24)).float() / 2
    gate = torch.randint(-2, 3, (num_experts, 24)).float() / 8  # ties and exact logits
    case = ffn_case(40, 24, num_experts, 16, top_k)
    inputs = [t.detach().requires_grad_() for t in (x, gate, *case.experts)]

    _, topk_logits, topk_idx = ops.route_topk(inputs[0], inputs[1], top_k)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    rows = ops.grouped_ffn(inputs[0], row_token, expert_offsets, *inputs[2:], token_rows)
    out = ops.combine(rows, 1 + topk_logits, token_rows)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    out64, _ = reference.sparse_ffn(wide[0], wide[1], top_k, *wide[2:])
    grad = torch.randn(40, 24)
    assert_gradients_close(
        gradients(out, grad, inputs), gradients(out64, grad, wide), torch.float32
    )
