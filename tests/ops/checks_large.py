# SPDX-License-Identifier: Apache-2.0
"""Element offsets beyond 2^31, where the memory allows them."""

from __future__ import annotations

import mmap

import torch
from problems import assert_equal, both_problems, draw_routing, needs_memory
from registry import CPU, CUDA, Skip, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

LIMIT = 2**31


@check(on=(CUDA,))
def rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """permute and combine of small integers, whose sums are exact."""
    top_k, hidden_size = 8, 4096
    num_tokens = LIMIT // (top_k * hidden_size) + 1000
    needs_memory(device, 3 * 2 * num_tokens * top_k * hidden_size)
    topk_idx = draw_routing("repeated", num_tokens, 7, top_k).to(device)
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, 7)
    x = torch.randint(-3, 4, (num_tokens, hidden_size), device=device, dtype=torch.int8).bfloat16()
    y = ops.permute(x, row_token, token_rows)
    assert y.numel() > LIMIT
    last = torch.arange(len(row_token) - 3000, len(row_token), device=device)
    for rows in (last, last - last[0]):
        assert_equal("permute", y[rows], x[row_token[rows].long()])
    back = ops.combine(y, None, token_rows)
    assert_equal("combine", back, (top_k * x.float()).bfloat16())


@check(on=(CUDA,))
def expert_rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    hidden_size, width, num_experts = 3584, 64, 4
    num_tokens = LIMIT // (2 * hidden_size) + 1000
    needs_memory(device, 5 * num_tokens * 2 * hidden_size * 2)
    with torch.device(device):
        topk_idx = draw_routing("random", num_tokens, num_experts, 2)
        x = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16)
        gate, up = (
            (torch.randn(num_experts * width, hidden_size) * hidden_size**-0.5).bfloat16()
            for _ in range(2)
        )
        down = (torch.randn(hidden_size, num_experts * width) * width**-0.5).bfloat16()
    offsets, row_token, _ = ops.sort_by_expert(topk_idx, num_experts)
    y = ops.grouped_ffn(x, row_token, offsets, gate, up, down)
    assert y.numel() > LIMIT
    starts = offsets.tolist()
    for expert in range(num_experts):
        own = slice(expert * width, (expert + 1) * width)
        for rows in (
            slice(starts[expert], starts[expert] + 64),
            slice(starts[expert + 1] - 64, starts[expert + 1]),
        ):
            tokens = x[row_token[rows].long()].float()
            expected = reference.swiglu(
                tokens, gate[own].float(), up[own].float(), down[:, own].float()
            )
            error = (y[rows].float() - expected).norm() / expected.norm()
            assert error < 0.02, f"expert {expert}: rows are off by {error:.2g}"


@check(on=(CUDA,))
def row_strides_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """The last of 20 tokens lies more than 2^31 elements behind the first."""
    needs_memory(device, 3 * LIMIT)
    stride = LIMIT // 19 // 8 * 8 + 8 * 64
    flat = torch.empty(19 * stride + 64, dtype=torch.bfloat16, device=device)
    spread = flat.as_strided((20, 64), (stride, 1))
    x = torch.randn(20, 64, device=device).bfloat16()
    spread.copy_(x)
    assert 19 * spread.stride(0) > LIMIT
    with torch.device(device):
        gate = torch.randn(5, 64).bfloat16()
        topk_idx = draw_routing("random", 20, 5, 2)
        weights = [torch.randn(5 * 16, 64).bfloat16() / 8 for _ in range(2)]
        down = torch.randn(64, 5 * 16).bfloat16() / 4
    offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, 5)
    for own, expected in zip(
        ops.route_topk(spread, gate, 2), ops.route_topk(x, gate, 2), strict=True
    ):
        assert_equal("route_topk", own, expected)
    assert_equal(
        "permute", ops.permute(spread, row_token, token_rows), ops.permute(x, row_token, token_rows)
    )
    assert_equal(
        "grouped_ffn",
        ops.grouped_ffn(spread, row_token, offsets, *weights, down),
        ops.grouped_ffn(x, row_token, offsets, *weights, down),
    )


def spread_rows(tensor: Tensor) -> Tensor:
    """The same matrix with its last row more than 2^31 elements behind its first.

    Memory of the system is only taken for pages that are written.
    """
    rows, columns = tensor.shape
    stride = LIMIT // (rows - 1) + 1 + columns
    length = (rows - 1) * stride + columns
    try:
        memory = mmap.mmap(-1, length * tensor.element_size())
    except OSError as error:
        raise Skip(f"the system refuses {length >> 30} Gi elements: {error}") from error
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    spread = flat.as_strided((rows, columns), (stride, 1))
    spread.copy_(tensor)
    return spread


# NOTE: torch's own bf16 product of 40 rows crashes on weights spread so far (torch 2.13, AVX-512),
# without any op of ours; so weights are spread in fp32 alone.
@check({"dtype": torch.float32}, {"dtype": torch.bfloat16}, on=(CPU,))
def rows_spread_over_2_to_the_31_elements(device: torch.device, dtype: torch.dtype) -> None:
    topk_idx = draw_routing("random", 20, 5, 2)
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, 5)
    x, gate, y = (torch.randn(n, 24).to(dtype) for n in (20, 5, 40))
    expected = ops.route_topk(x, gate, 2)
    for found in (
        ops.route_topk(spread_rows(x), gate, 2),
        ops.route_topk(x, spread_rows(gate), 2),
    ):
        for own, other in zip(found, expected, strict=True):
            assert_equal("route_topk", own, other)
    permuted = ops.permute(x, row_token, token_rows)
    assert_equal("permute", ops.permute(spread_rows(x), row_token, token_rows), permuted)
    combined = ops.combine(y, None, token_rows)
    assert_equal("combine", ops.combine(spread_rows(y), None, token_rows), combined)
    for num_tokens in (20, 200):
        for problem in both_problems(device, dtype, num_tokens, hidden_size=24):
            plain = problem.y()
            for name in problem.tensors if dtype == torch.float32 else ("x",):
                spread = problem.y(**{name: spread_rows(problem.tensors[name])})
                torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-5)
