# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn and grouped_ffn_combine against the reference, on every routing and layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from op_cases import (
    DTYPES,
    ROUTINGS,
    FfnCase,
    assert_as_good_as_torch,
    each_thread_count,
    ffn_case,
    layouts,
    torch_combine,
    torch_grouped_ffn,
)

from sparse_unified import ops
from sparse_unified.ops import reference


def assert_case(case: FfnCase) -> None:
    """Both ops, and the training variant, against fp32 and torch in the same dtype."""
    wide = tuple(t.float() if t.is_floating_point() else t for t in case.arguments)
    ref_rows = reference.grouped_ffn(*wide)
    torch_rows = torch_grouped_ffn(*case.arguments)
    assert_as_good_as_torch(ops.grouped_ffn(*case.arguments), torch_rows, ref_rows)
    train_rows, _, _ = torch.ops.sparse_unified.grouped_ffn_train(*case.arguments)
    assert_as_good_as_torch(train_rows, torch_rows, ref_rows)
    assert_as_good_as_torch(
        ops.grouped_ffn_combine(*case.fused_arguments),
        torch_combine(torch_rows, case.weights, case.token_rows),
        reference.combine(ref_rows, case.weights, case.token_rows),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37, 300])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (17, 8), (33, 33), (1, 1)])
def test_ffn_is_as_exact_as_torch(
    dtype: torch.dtype, num_tokens: int, num_experts: int, top_k: int
) -> None:
    assert_case(ffn_case(num_tokens, 40, num_experts, 24, top_k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn_of_many_tokens(dtype: torch.dtype) -> None:
    assert_case(ffn_case(4096, 16, 5, 8, 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_ffn_of_extreme_routings(dtype: torch.dtype, routing: str) -> None:
    assert_case(ffn_case(37, 40, 5, 24, 1, dtype, routing))
    assert_case(ffn_case(700, 24, 5, 16, 2, dtype, routing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [592, 1184])
def test_ffn_of_bagel_expert_widths(dtype: torch.dtype, width: int) -> None:
    assert_case(ffn_case(41, 48, 3, width, 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden_size", "width"), [(1, 1), (1, 7), (5, 3), (15, 13), (17, 15), (29, 8), (600, 20)]
)
@pytest.mark.parametrize("num_tokens", [3, 20, 90])
def test_ffn_of_odd_sizes(
    dtype: torch.dtype, hidden_size: int, width: int, num_tokens: int
) -> None:
    assert_case(ffn_case(num_tokens, hidden_size, 3, width, 2, dtype))


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 511, 513])
def test_ffn_of_any_number_of_rows(num_rows: int) -> None:
    assert_case(ffn_case(num_rows, 30, 2, 15, 1, torch.float32, "last"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("argument", ["x", "gate_proj", "up_proj", "down_proj"])
def test_layout_of_the_arguments_does_not_matter(dtype: torch.dtype, argument: str) -> None:
    case = ffn_case(300, 35, 3, 21, 2, dtype)
    rows = ops.grouped_ffn(*case.arguments)
    tokens = ops.grouped_ffn_combine(*case.fused_arguments)
    # A GEMM library may choose another kernel for another stride: rounding, no more.
    exact = {"rtol": 0.0, "atol": 0.0}
    rounding = exact if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else rounding
    for name, view in layouts(getattr(case, argument)):
        other = dataclasses.replace(case, **{argument: view})
        message = f"{argument}: {name}: {{}}".format
        torch.testing.assert_close(ops.grouped_ffn(*other.arguments), rows, **rounding, msg=message)
        torch.testing.assert_close(
            ops.grouped_ffn_combine(*other.fused_arguments), tokens, **rounding, msg=message
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    case = ffn_case(300, 48, 5, 37, 2, dtype)
    rows = ops.grouped_ffn(*case.arguments)
    tokens = ops.grouped_ffn_combine(*case.fused_arguments)
    for _ in range(3):
        assert torch.equal(ops.grouped_ffn(*case.arguments), rows)
        assert torch.equal(ops.grouped_ffn_combine(*case.fused_arguments), tokens)


def test_thread_counts_give_the_same_bits() -> None:
    case = ffn_case(300, 48, 5, 37, 2)
    expected = ops.grouped_ffn(*case.arguments)
    for _ in each_thread_count():
        assert torch.equal(ops.grouped_ffn(*case.arguments), expected)


@pytest.mark.parametrize("num_tokens", [5, 127, 128, 300, 2100])
def test_fused_thread_counts_give_the_same_bits(num_tokens: int) -> None:
    case = ffn_case(num_tokens, 16, 5, 8, 2)
    expected = ops.grouped_ffn_combine(*case.fused_arguments)
    for _ in each_thread_count():
        assert torch.equal(ops.grouped_ffn_combine(*case.fused_arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [5, 300])
def test_empty_sums_are_zero(dtype: torch.dtype, num_tokens: int) -> None:
    case = ffn_case(num_tokens, 8, 2, 0, 1, dtype)
    assert ops.grouped_ffn(*case.arguments).abs().max() == 0
    assert ops.grouped_ffn_combine(*case.fused_arguments).abs().max() == 0
    case = ffn_case(num_tokens, 0, 2, 3, 1, dtype)
    assert ops.grouped_ffn(*case.arguments).shape == (num_tokens, 0)
    assert ops.grouped_ffn_combine(*case.fused_arguments).shape == (num_tokens, 0)


def test_token_rows_do_not_change_the_forward() -> None:
    case = ffn_case()
    rows = ops.grouped_ffn(*case.arguments)
    assert torch.equal(ops.grouped_ffn(*case.arguments, case.token_rows), rows)


def test_non_finite_tokens_touch_only_their_rows() -> None:
    for num_tokens in (40, 600):
        case = ffn_case(num_tokens, 40, 5, 24, 2)
        clean_rows = ops.grouped_ffn(*case.arguments)
        clean = ops.grouped_ffn_combine(*case.fused_arguments)
        case.x[3] = torch.nan
        case.x[7, 5] = torch.inf
        bad = torch.zeros(num_tokens, dtype=torch.bool)
        bad[[3, 7]] = True
        rows = ops.grouped_ffn(*case.arguments)
        tokens = ops.grouped_ffn_combine(*case.fused_arguments)
        assert torch.equal(rows.isfinite().all(1), ~bad[case.row_token.long()])
        assert torch.equal(tokens.isfinite().all(1), ~bad)
        torch.testing.assert_close(
            rows[rows.isfinite().all(1)], clean_rows[rows.isfinite().all(1)], rtol=0, atol=0
        )
        torch.testing.assert_close(tokens[~bad], clean[~bad], rtol=0, atol=0)


def test_large_activations_saturate_like_silu() -> None:
    case = ffn_case(40, 40, 2, 24, 1)
    case.gate_proj.mul_(200)
    wide = tuple(t.double() if t.is_floating_point() else t for t in case.arguments)
    expected = reference.grouped_ffn(*wide)
    rows = ops.grouped_ffn(*case.arguments)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5 * expected.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_silu_of_the_most_negative_values_is_zero(dtype: torch.dtype, num_tokens: int) -> None:
    case = ffn_case(num_tokens, 1, 1, 1, 1, dtype)
    least = torch.finfo(dtype).min
    arguments = (torch.ones_like(case.x), *case.arguments[1:3])
    ones = torch.ones(1, 1, dtype=dtype)
    for gate in (least, least / 4, -1000.0):
        rows = ops.grouped_ffn(*arguments, torch.full_like(ones, gate), ones, ones)
        assert torch.equal(rows, torch.zeros_like(rows))
