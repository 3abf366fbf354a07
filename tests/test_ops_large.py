# SPDX-License-Identifier: Apache-2.0
"""Element offsets beyond 2^31: on spread-out rows at no cost, and once on real rows."""

from __future__ import annotations

import dataclasses
import mmap
import os

import pytest
import torch
from op_cases import ffn_case
from torch import Tensor

from sparse_unified import ops

LIMIT = 2**31


def spread_rows(tensor: Tensor) -> Tensor:
    """The same matrix with its last row more than 2^31 elements behind its first.

    Memory of the system is only taken for pages that are written.
    """
    rows, columns = tensor.shape
    stride = LIMIT // (rows - 1) + 1
    stride += columns
    length = (rows - 1) * stride + columns
    try:
        memory = mmap.mmap(-1, length * tensor.element_size())
    except OSError as error:
        pytest.skip(f"the system refuses {length * tensor.element_size() >> 30} GiB: {error}")
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    spread = flat.as_strided((rows, columns), (stride, 1))
    spread.copy_(tensor)
    assert (rows - 1) * spread.stride(0) > LIMIT
    return spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_of_inputs_pass_2_to_the_31(dtype: torch.dtype) -> None:
    case = ffn_case(20, 24, 3, 8, 2, dtype)
    gate = torch.randn(5, 24).to(dtype)
    y = torch.randn(40, 24).to(dtype)
    for own, expected in (
        (ops.route_topk(spread_rows(case.x), gate, 2), ops.route_topk(case.x, gate, 2)),
        (ops.route_topk(case.x, spread_rows(gate), 2), ops.route_topk(case.x, gate, 2)),
    ):
        for one, other in zip(own, expected, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(
        ops.permute(spread_rows(case.x), case.row_token, case.token_rows),
        ops.permute(case.x, case.row_token, case.token_rows),
    )
    assert torch.equal(
        ops.combine(spread_rows(y), case.weights, case.token_rows),
        ops.combine(y, case.weights, case.token_rows),
    )


# NOTE: torch's own bf16 product of 40 rows crashes on weights spread so far (torch 2.13, AVX-512),
# without any op of ours; so weights are spread in fp32 alone.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("x", "gate_proj", "up_proj", "down_proj")]
    + [("x", torch.bfloat16)],
)
@pytest.mark.parametrize("num_tokens", [20, 200])
def test_offsets_of_expert_inputs_pass_2_to_the_31(
    name: str, dtype: torch.dtype, num_tokens: int
) -> None:
    case = ffn_case(num_tokens, 24, 3, 8, 2, dtype)
    spread = dataclasses.replace(case, **{name: spread_rows(getattr(case, name))})
    torch.testing.assert_close(
        ops.grouped_ffn(*spread.arguments), ops.grouped_ffn(*case.arguments), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ops.grouped_ffn_combine(*spread.fused_arguments),
        ops.grouped_ffn_combine(*case.fused_arguments),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("x", "gate_proj", "up_proj", "down_proj")]
    + [("x", torch.bfloat16)],
)
@pytest.mark.parametrize("num_tokens", [5, 40])
def test_offsets_of_pruned_inputs_pass_2_to_the_31(
    name: str, dtype: torch.dtype, num_tokens: int
) -> None:
    case = ffn_case(num_tokens, 24, 3, 16, 2, dtype)
    own = {
        "x": case.x,
        **dict(zip(("gate_proj", "up_proj", "down_proj"), case.experts, strict=True)),
    }
    kept = torch.tensor([2, 0], dtype=torch.int32)

    def run(**tensors: Tensor) -> Tensor:
        x, *weights = tensors.values()
        return ops.pruned_ffn(x, kept, *weights, 16)

    spread = run(**{**own, name: spread_rows(own[name])})
    torch.testing.assert_close(spread, run(**own), rtol=1e-5, atol=1e-5)


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(available_bytes() < 7 * 2**30, reason="needs 7 GiB of free memory")
def test_more_than_2_to_the_31_row_elements() -> None:
    num_tokens, top_k, hidden_size = 3, 683, 2**20  # 2^31 + 2^20 elements, 4.3 GB
    topk_idx = torch.arange(num_tokens * top_k, dtype=torch.int32).view(num_tokens, top_k) % 7
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, 7)
    x = torch.randint(-3, 4, (num_tokens, hidden_size)).bfloat16()
    y = ops.permute(x, row_token, token_rows)
    assert y.numel() > LIMIT
    for row in (0, 1023, 2047, 2048):
        assert torch.equal(y[row], x[row_token[row]])
    # Sums of 683 small integers are exact in fp32 and rounded once.
    assert torch.equal(ops.combine(y, None, token_rows), (top_k * x.float()).bfloat16())
