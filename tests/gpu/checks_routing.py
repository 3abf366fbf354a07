# SPDX-License-Identifier: Apache-2.0
"""route_topk, sort_by_expert, permute, combine: exactly where that is possible."""

from __future__ import annotations

import torch
from device_cases import assert_equal, grid, poison
from op_cases import (
    DTYPES,
    ROUTINGS,
    assert_as_good_as_torch,
    draw_routing,
    layouts,
    torch_combine,
)
from registry import check

from sparse_unified import ops
from sparse_unified.ops import reference

TOKENS = (0, 1, 37, 4096)
EXPERTS = ((16, 8), (32, 16), (5, 2), (12, 12), (1, 1), (33, 7))


@check(
    *grid(dtype=DTYPES, num_tokens=TOKENS, experts=EXPERTS[:4]),
    *grid(dtype=DTYPES[1:], num_tokens=(37,), experts=EXPERTS, hidden_size=(3584, 8, 41, 1)),
    small=lambda num_tokens, **_: num_tokens < 100,
)
def route_of_exact_logits(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    experts: tuple[int, int],
    hidden_size: int = 96,
) -> None:
    """Integers: sums are exact in every order, ties included."""
    num_experts, top_k = experts
    with torch.device(device):
        x = torch.randint(-3, 4, (num_tokens, hidden_size)).to(dtype)
        gate = torch.randint(-2, 3, (num_experts, hidden_size)).to(dtype)
    expected = reference.route_topk(x, gate, top_k)
    shapes = ((num_tokens, num_experts), (num_tokens, top_k))
    poison(device, *((shape, torch.float32) for shape in shapes))
    for name, out, other in zip(
        ("logits", "topk_logits", "topk_idx"), ops.route_topk(x, gate, top_k), expected, strict=True
    ):
        assert_equal(name, out, other)


@check(*grid(dtype=DTYPES, num_tokens=(1, 37, 4096)), small=lambda num_tokens, **_: num_tokens < 40)
def route_of_random_logits(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """The choice is the sorted one of the logits returned, which are close to exact."""
    with torch.device(device):
        x = torch.randn(num_tokens, 3584).to(dtype)
        gate = (torch.randn(16, 3584) * 3584**-0.5).to(dtype)
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 8)
    error = (logits.double() - x.double() @ gate.double().t()).abs().max().item()
    assert error < 2e-5, f"logits are off by {error:.2g}"
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :8]
    assert_equal("topk_idx", topk_idx, order.int())
    assert_equal("topk_logits", topk_logits, logits.gather(1, order))


@check(*grid(dtype=DTYPES, num_experts=(4, 16, 32)))
def route_of_extreme_logits(device: torch.device, dtype: torch.dtype, num_experts: int) -> None:
    """Equal, negative, zero of both signs, infinite and NaN: the reference's order."""
    most = torch.finfo(dtype).max
    values = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, most, -most)
    with torch.device(device):
        drawn = torch.randint(len(values), (64, num_experts))
        table = torch.tensor(values)
        # Row t of x picks column t of the gate, so that any logits can be written down.
        x = torch.eye(64).to(dtype)
        wanted = table[drawn]  # [64, E]
        wanted[0] = 0.0
        wanted[1] = -1.0
        wanted[2] = torch.nan
        wanted[3] = -torch.inf
    for token in range(64):  # a product with 0 would make NaN of inf: one token at a time
        gate = wanted[token, :, None].to(dtype)
        one = x[token : token + 1, token : token + 1]
        logits, topk_logits, topk_idx = ops.route_topk(one, gate, num_experts // 2)
        expected = reference.route_topk(one, gate, num_experts // 2)
        assert_equal(f"logits of {wanted[token].tolist()}", logits, expected[0])
        assert_equal(f"topk_idx of {wanted[token].tolist()}", topk_idx, expected[2])
        assert_equal(f"topk_logits of {wanted[token].tolist()}", topk_logits, expected[1])


@check(
    *grid(routing=ROUTINGS, num_tokens=TOKENS, experts=EXPERTS),
    *grid(routing=("random", "repeated"), num_tokens=(1000, 70_000), experts=((16, 8), (200, 3))),
    small=lambda num_tokens, **_: num_tokens < 100,
)
def sort_is_the_stable_one(
    device: torch.device, routing: str, num_tokens: int, experts: tuple[int, int]
) -> None:
    num_experts, top_k = experts
    with torch.device(device):
        topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
    expected = reference.sort_by_expert(topk_idx, num_experts)
    for name, out, other in zip(
        ("expert_offsets", "row_token", "token_rows"),
        ops.sort_by_expert(topk_idx, num_experts),
        expected,
        strict=True,
    ):
        assert_equal(name, out, other)


@check(
    *grid(dtype=DTYPES, num_tokens=TOKENS, hidden_size=(3584, 41)),
    *grid(dtype=DTYPES, num_tokens=(37,), hidden_size=(1, 8, 1000)),
    small=lambda num_tokens, **_: num_tokens < 100,
)
def permute_and_combine(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int
) -> None:
    top_k = 8
    with torch.device(device):
        topk_idx = draw_routing("random", num_tokens, 16, top_k)
        _, row_token, token_rows = reference.sort_by_expert(topk_idx, 16)
        x = torch.randn(num_tokens, hidden_size).to(dtype)
        y = torch.randn(num_tokens * top_k, hidden_size).to(dtype)
        weights = torch.randn(num_tokens, top_k)
    poison(device, (tuple(y.shape), dtype))
    rows = ops.permute(x, row_token, token_rows)
    assert_equal("permute", rows, reference.permute(x, row_token))
    poison(device, (tuple(x.shape), dtype))
    for each in (weights, None):
        assert_as_good_as_torch(
            ops.combine(y, each, token_rows),
            torch_combine(y, each, token_rows),
            reference.combine(y.float(), each, token_rows),
        )
    # Every row once: the sum over the rows of a token is K times the token, exact for integers.
    whole = torch.randint(-9, 10, x.shape, device=device).to(dtype)
    back = ops.combine(ops.permute(whole, row_token, token_rows), None, token_rows)
    assert_equal("combine of permute", back, (top_k * whole.float()).to(dtype))


@check(*grid(dtype=DTYPES))
def routing_ops_take_any_layout(device: torch.device, dtype: torch.dtype) -> None:
    with torch.device(device):
        topk_idx = draw_routing("random", 37, 5, 2)
        _, row_token, token_rows = reference.sort_by_expert(topk_idx, 5)
        x = torch.randint(-3, 4, (37, 40)).to(dtype)
        gate = torch.randint(-2, 3, (5, 40)).to(dtype)
        y = torch.randn(74, 40).to(dtype)
        weights = torch.randn(37, 2)
    routed = ops.route_topk(x, gate, 2)
    permuted, combined = ops.permute(x, row_token, token_rows), ops.combine(y, weights, token_rows)
    for name, view in layouts(x):
        assert_equal(f"permute of {name}", ops.permute(view, row_token, token_rows), permuted)
        for out, other in zip(ops.route_topk(view, gate, 2), routed, strict=True):
            assert_equal(f"route_topk of {name}", out, other)
    for name, view in layouts(gate):
        for out, other in zip(ops.route_topk(x, view, 2), routed, strict=True):
            assert_equal(f"route_topk of a gate with {name}", out, other)
    for name, view in layouts(y):
        assert_equal(f"combine of {name}", ops.combine(view, weights, token_rows), combined)
    for name, view in layouts(weights):
        assert_equal(f"combine of weights: {name}", ops.combine(y, view, token_rows), combined)
    transposed = topk_idx.t().contiguous().t()
    assert_equal("sort_by_expert", ops.sort_by_expert(transposed, 5)[2], token_rows)
