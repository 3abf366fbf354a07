# SPDX-License-Identifier: Apache-2.0
"""sort_by_expert: offsets, maps and stability, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import ROUTINGS, draw_routing
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference


def assert_sorted(topk_idx: Tensor, num_experts: int) -> None:
    """The invariants of routing, stated without the reference."""
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    num_tokens, top_k = topk_idx.shape
    flat = topk_idx.reshape(-1).tolist()
    offsets = expert_offsets.tolist()
    # Offsets are monotone, begin at 0, end at R, and count the rows of each expert.
    assert offsets[0] == 0
    assert offsets[-1] == num_tokens * top_k
    assert [b - a for a, b in itertools.pairwise(offsets)] == [
        flat.count(expert) for expert in range(num_experts)
    ]
    # Every row once, and the two maps are inverse.
    rows = token_rows.reshape(-1).tolist()
    assert sorted(rows) == list(range(len(flat)))
    tokens = row_token.tolist()
    assert [tokens[row] for row in rows] == [slot // max(top_k, 1) for slot in range(len(flat))]
    # A row lies within its expert's range, in flat order.
    for expert in range(num_experts):
        own = [row for row, owner in zip(rows, flat, strict=True) if owner == expert]
        assert own == list(range(offsets[expert], offsets[expert + 1]))
    for tensor in (expert_offsets, row_token, token_rows):
        assert tensor.dtype == torch.int32


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_experts = draw(st.integers(1, 40))
    num_tokens, top_k = draw(st.integers(0, 30)), draw(st.integers(1, 6))
    experts = st.integers(0, num_experts - 1)
    flat = draw(st.lists(experts, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(flat, dtype=torch.int32).view(num_tokens, top_k), num_experts


@given(routings())
def test_any_routing_is_sorted_stably(routing: tuple[Tensor, int]) -> None:
    assert_sorted(*routing)


@pytest.mark.parametrize("num_tokens", [0, 1, 37, 4096])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (16, 8), (17, 17), (33, 1)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_sort_equals_reference(num_tokens: int, num_experts: int, top_k: int, routing: str) -> None:
    topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
    expected = reference.sort_by_expert(topk_idx, num_experts)
    for _ in range(2):
        for own, other in zip(ops.sort_by_expert(topk_idx, num_experts), expected, strict=True):
            assert torch.equal(own, other)
            assert own.dtype == other.dtype


def test_layout_of_the_argument_does_not_matter() -> None:
    topk_idx = torch.randint(7, (23, 8), dtype=torch.int32)
    for view in (topk_idx[:, 1:5], topk_idx[::2], topk_idx.t()):
        expected = ops.sort_by_expert(view.contiguous(), 7)
        for own, other in zip(ops.sort_by_expert(view, 7), expected, strict=True):
            assert torch.equal(own, other)


def test_no_slots_give_no_rows() -> None:
    expert_offsets, row_token, token_rows = ops.sort_by_expert(
        torch.empty(4, 0, dtype=torch.int32), 3
    )
    assert expert_offsets.tolist() == [0, 0, 0, 0]
    assert row_token.shape == (0,)
    assert token_rows.shape == (4, 0)
