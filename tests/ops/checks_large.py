# SPDX-License-Identifier: Apache-2.0
"""Element offsets beyond 2^31, where the memory allows them."""

from __future__ import annotations

import mmap

import torch
from problems import (
    FLOATS,
    assert_all_equal,
    assert_equal,
    both_problems,
    call,
    draw_routing,
    grid,
    grouped_problem,
    grouped_values,
)
from registry import CPU, CUDA, EVERYWHERE, Skip, backend_of, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

LIMIT = 2**31


def needs_memory(device: torch.device, num_bytes: int) -> None:
    """Skips what does not fit into the free memory of a GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < num_bytes:
        raise Skip(f"needs {num_bytes / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


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
    needs_memory(device, 12 * num_tokens * 2 * hidden_size * 2)
    sizes = (num_tokens, hidden_size, num_experts, width, 2)
    problem = grouped_problem(*sizes, torch.bfloat16, device=device)
    y, v = problem.call(), problem.values
    assert y.numel() > LIMIT
    starts = v["expert_offsets"].tolist()
    for expert in range(num_experts):
        own = slice(expert * width, (expert + 1) * width)
        weights = v["gate_proj"][own], v["up_proj"][own], v["down_proj"][:, own]
        for rows in (
            slice(starts[expert], starts[expert] + 64),
            slice(starts[expert + 1] - 64, starts[expert + 1]),
        ):
            tokens = v["x"][v["row_token"][rows].long()].float()
            expected = reference.swiglu(tokens, *(weight.float() for weight in weights))
            error = (y[rows].float() - expected).norm() / expected.norm()
            assert error < 0.02, f"expert {expert}: rows are off by {error:.2g}"


def spread_rows(tensor: Tensor) -> Tensor:
    """The same matrix with its last row more than 2^31 elements behind its first.

    Memory of the system is only taken for pages that are written.
    """
    rows, columns = tensor.shape
    stride = LIMIT // (rows - 1) // 8 * 8 + 8 + columns
    length = (rows - 1) * stride + columns
    if tensor.is_cuda:
        flat = torch.empty(length, dtype=tensor.dtype, device=tensor.device)
    else:
        try:
            memory = mmap.mmap(-1, length * tensor.element_size())
        except OSError as error:
            raise Skip(f"the system refuses {length >> 30} Gi elements: {error}") from error
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided((rows, columns), (stride, 1)).copy_(tensor)


# NOTE: torch's own bf16 product of 40 rows crashes on weights spread so far (torch 2.13, AVX-512),
# without any op of ours; so on the CPU weights are spread in fp32 alone.
@check(
    *grid(dtype=(torch.float32, torch.bfloat16)),
    on=lambda dtype: (CPU,) if dtype == torch.float32 else EVERYWHERE,
)
def rows_spread_over_2_to_the_31_elements(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda":
        needs_memory(device, 3 * LIMIT)
    v = grouped_values(20, 24, 5, 24, 2, dtype, device=device)
    pairs = (("route_topk", "x"), ("route_topk", "gate"), ("permute", "x"), ("combine", "y"))
    for op, name in pairs:
        found, expected = call(op, v | {name: spread_rows(v[name])}), call(op, v)
        if op != "route_topk":
            found, expected = [found], [expected]
        assert_all_equal(f"{op} of {name}", found, expected)
    any_tensor = dtype == torch.float32 or backend_of(device) != CPU
    for num_tokens in (20, 200):
        for problem in both_problems(device, dtype, num_tokens, hidden_size=24):
            plain = problem.call()
            for name in FLOATS if any_tensor else ("x",):
                spread = problem.call(**{name: spread_rows(problem.values[name])})
                torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-5)
