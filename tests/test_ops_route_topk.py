# SPDX-License-Identifier: Apache-2.0
"""route_topk: logits as exact as fp32 allows, selection by the written policy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DTYPES, assert_as_good_as_torch, each_thread_count, layouts
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

NAN, INF = math.nan, math.inf


def assert_same_routing(out: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for own, other in zip(out, expected, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


def route_of_logits(logits: list[float], top_k: int) -> tuple[list[int], list[float]]:
    """With one hidden value of 1, the gate is the row of logits."""
    gate = torch.tensor(logits).unsqueeze(1)
    out = ops.route_topk(torch.ones(1, 1), gate, top_k)
    assert_same_routing(out, reference.route_topk(torch.ones(1, 1), gate, top_k))
    return out[2][0].tolist(), out[1][0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 37, 4096])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (16, 8), (17, 17), (33, 16), (1, 1)])
def test_routing_of_integers_is_exact(
    dtype: torch.dtype, num_tokens: int, num_experts: int, top_k: int
) -> None:
    # Sums of products of small integers are exact in fp32, in whatever order.
    hidden_size = 12 if num_tokens > 1000 else 300
    x = torch.randint(-4, 5, (num_tokens, hidden_size)).to(dtype)
    gate = torch.randint(-2, 3, (num_experts, hidden_size)).to(dtype)
    out = ops.route_topk(x, gate, top_k)
    assert_same_routing(out, reference.route_topk(x, gate, top_k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    x, gate = torch.randn(64, 896).to(dtype), (torch.randn(16, 896) * 896**-0.5).to(dtype)
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 8)
    assert logits.dtype == topk_logits.dtype == torch.float32
    own_dtype = F.linear(x, gate).float()
    assert_as_good_as_torch(logits, own_dtype, reference.route_topk(x, gate, 8)[0])
    # The selection is exact with respect to the op's own logits.
    order = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(topk_idx.long(), order.indices[:, :8])
    assert torch.equal(topk_logits, order.values[:, :8])


def test_equal_logits_go_to_the_lowest_index() -> None:
    _, _, topk_idx = ops.route_topk(torch.randn(9, 20), torch.zeros(17, 20), 5)
    assert topk_idx.tolist() == [[0, 1, 2, 3, 4]] * 9
    assert route_of_logits([1.0, 3.0, 3.0, 1.0, 3.0], 4)[0] == [1, 2, 4, 0]
    assert route_of_logits([-0.0, 0.0, -0.0], 2)[0] == [0, 1]


def test_negative_logits_are_ordered_like_others() -> None:
    assert route_of_logits([-3.0, -1.0, -2.0, -4.0], 3) == ([1, 2, 0], [-1.0, -2.0, -3.0])


def test_nan_comes_first_and_infinities_in_order() -> None:
    assert route_of_logits([1.0, INF, NAN, -INF, NAN], 5)[0] == [2, 4, 1, 0, 3]
    assert route_of_logits([NAN] * 4, 2)[0] == [0, 1]
    assert route_of_logits([-INF] * 4, 3)[0] == [0, 1, 2]
    assert route_of_logits([-INF, 0.0, INF, INF], 3)[0] == [2, 3, 1]


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, NAN, INF, -INF]), min_size=1, max_size=35),
    st.data(),
)
def test_selection_follows_the_policy_on_any_logits(
    logits: list[float], data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, len(logits)))
    chosen, _ = route_of_logits(logits, top_k)
    keys = [(not math.isnan(v), 0.0 if math.isnan(v) else -v, e) for e, v in enumerate(logits)]
    assert chosen == [key[2] for key in sorted(keys)[:top_k]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_arguments_does_not_matter(dtype: torch.dtype) -> None:
    x, gate = torch.randn(19, 67).to(dtype), torch.randn(9, 67).to(dtype)
    expected = ops.route_topk(x, gate, 3)
    for _, view in layouts(x):
        assert_same_routing(ops.route_topk(view, gate, 3), expected)
    for _, view in layouts(gate):
        assert_same_routing(ops.route_topk(x, view, 3), expected)


def test_a_token_is_routed_the_same_in_any_company() -> None:
    x, gate = torch.randn(53, 301), torch.randn(16, 301)
    whole = ops.route_topk(x, gate, 4)
    for tokens in (slice(0, 1), slice(3, 20), slice(52, 53)):
        assert_same_routing(ops.route_topk(x[tokens], gate, 4), tuple(t[tokens] for t in whole))


def test_repeats_and_thread_counts_give_the_same_bits() -> None:
    x, gate = torch.randn(301, 130), torch.randn(16, 130)
    expected = ops.route_topk(x, gate, 8)
    for _ in each_thread_count():
        assert_same_routing(ops.route_topk(x, gate, 8), expected)
