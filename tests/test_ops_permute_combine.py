# SPDX-License-Identifier: Apache-2.0
"""permute and combine: gathers are exact, sums accumulate in fp32 and round once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    DTYPES,
    assert_as_good_as_torch,
    draw_routing,
    each_thread_count,
    layouts,
    torch_combine,
)
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference


def draw_rows(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    topk_idx = draw_routing("random", num_tokens, num_experts, top_k)
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    return row_token, token_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37, 4096])
@pytest.mark.parametrize("hidden_size", [1, 16, 67])
def test_permute_equals_reference(dtype: torch.dtype, num_tokens: int, hidden_size: int) -> None:
    x = torch.randn(num_tokens, hidden_size).to(dtype)
    row_token, token_rows = draw_rows(num_tokens, 5, 2)
    y = ops.permute(x, row_token, token_rows)
    assert torch.equal(y, reference.permute(x, row_token))
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [896, 897])
def test_permute_of_more_than_the_caches_hold(dtype: torch.dtype, hidden_size: int) -> None:
    # 16 MB and more: rows of whole cache lines go past the caches, others cannot.
    x = torch.randn(1201, hidden_size).to(dtype)
    row_token, token_rows = draw_rows(1201, 16, 8)
    for _, x_in in layouts(x):
        y = ops.permute(x_in, row_token, token_rows)
        assert y.nbytes > 2**24
        assert torch.equal(y, reference.permute(x, row_token))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37, 4096])
@pytest.mark.parametrize(
    ("hidden_size", "num_experts", "top_k"), [(1, 5, 5), (16, 17, 8), (67, 5, 1)]
)
@pytest.mark.parametrize("has_weights", [True, False])
def test_combine_is_as_exact_as_torch(
    dtype: torch.dtype,
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    has_weights: bool,
) -> None:
    _, token_rows = draw_rows(num_tokens, num_experts, top_k)
    y = torch.randn(num_tokens * top_k, hidden_size).to(dtype)
    weights = torch.randn(num_tokens, top_k) * top_k**-0.5 if has_weights else None
    out = ops.combine(y, weights, token_rows)
    # The oracle in fp32: reference.combine rounds to the dtype of y.
    ref32 = reference.combine(y.float(), weights, token_rows)
    assert_as_good_as_torch(out, torch_combine(y, weights, token_rows), ref32)
    if dtype != torch.float32:
        # One rounding of an fp32 sum; where that sum lies next to a tie it may fall either way.
        wide = ops.combine(y.float(), weights, token_rows)
        assert torch.equal(out, wide.to(dtype))


@given(st.integers(0, 40), st.integers(1, 20), st.data())
def test_permute_then_combine_is_multiplication_by_top_k(
    num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    row_token, token_rows = draw_rows(num_tokens, num_experts, top_k)
    x = torch.randint(-8, 9, (num_tokens, 5)).float()
    y = ops.permute(x, row_token, token_rows)
    assert torch.equal(ops.combine(y, None, token_rows), top_k * x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_arguments_does_not_matter(dtype: torch.dtype) -> None:
    row_token, token_rows = draw_rows(19, 9, 3)
    x, y = torch.randn(19, 67).to(dtype), torch.randn(57, 67).to(dtype)
    weights = torch.randn(19, 3)
    permuted = ops.permute(x, row_token, token_rows)
    combined = ops.combine(y, weights, token_rows)
    for name, view in layouts(x):
        assert torch.equal(ops.permute(view, row_token, token_rows), permuted), name
    for name, view in layouts(y):
        assert torch.equal(ops.combine(view, weights, token_rows), combined), name
    for name, view in layouts(weights):
        assert torch.equal(ops.combine(y, view, token_rows), combined), name
    rows_view = token_rows.t().contiguous().t()
    assert torch.equal(ops.combine(y, weights, rows_view), combined)
    assert torch.equal(ops.permute(x, row_token.repeat(2, 1).t()[:, 0], rows_view), permuted)


def test_one_token_expanded_to_many_is_gathered() -> None:
    row_token, token_rows = draw_rows(7, 4, 2)
    x = torch.randn(1, 33).expand(7, 33)
    assert torch.equal(ops.permute(x, row_token, token_rows), x.repeat(2, 1))


def test_non_finite_rows_touch_only_their_token() -> None:
    _, token_rows = draw_rows(12, 4, 2)
    y = torch.randn(24, 40)
    y[token_rows[5, 1]] = torch.nan
    y[token_rows[7, 0]] = torch.inf
    out = ops.combine(y, torch.ones(12, 2), token_rows)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert (out == torch.inf).all(1).nonzero().flatten().tolist() == [7]
    assert out.isfinite().all(1).sum() == 10


def test_repeats_and_thread_counts_give_the_same_bits() -> None:
    row_token, token_rows = draw_rows(301, 16, 8)
    x, y, weights = torch.randn(301, 50), torch.randn(2408, 50), torch.randn(301, 8)
    expected = ops.permute(x, row_token, token_rows), ops.combine(y, weights, token_rows)
    for _ in each_thread_count():
        assert torch.equal(ops.permute(x, row_token, token_rows), expected[0])
        assert torch.equal(ops.combine(y, weights, token_rows), expected[1])
