# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn, grouped_ffn_train and grouped_ffn_combine against fp32, on awkward shapes."""

from __future__ import annotations

import dataclasses

import torch
from device_cases import (
    HALVES,
    assert_equal,
    assert_ffn,
    assert_same,
    case_on,
    ffn_calls,
    grid,
    refusal,
)
from op_cases import ROUTINGS, layouts
from registry import Skip, check

from sparse_unified import ops


@check(
    *grid(dtype=HALVES, num_tokens=(0, 1, 37, 300), experts=((5, 2), (17, 8), (4, 4), (1, 1))),
)
def ffn_is_as_exact_as_torch(
    device: torch.device, dtype: torch.dtype, num_tokens: int, experts: tuple[int, int]
) -> None:
    assert_ffn(
        case_on(
            device, num_tokens=num_tokens, num_experts=experts[0], top_k=experts[1], dtype=dtype
        )
    )


@check(*grid(dtype=HALVES, routing=ROUTINGS, num_tokens=(37, 700)))
def ffn_of_extreme_routings(
    device: torch.device, dtype: torch.dtype, routing: str, num_tokens: int
) -> None:
    """Experts without a row; all rows on one, the first, the last."""
    case = case_on(
        device,
        num_tokens=num_tokens,
        num_experts=5,
        width=48,
        top_k=1 + num_tokens % 2,
        dtype=dtype,
        routing=routing,
    )
    assert_ffn(case)


@check(
    *grid(dtype=HALVES, width=(592, 1184), num_tokens=(41,), hidden_size=(64,)),
    *grid(dtype=HALVES, width=(592, 1184), num_tokens=(37, 1000), hidden_size=(3584,)),
    small=lambda hidden_size, **_: hidden_size < 100,
)
def ffn_of_bagel_widths(
    device: torch.device, dtype: torch.dtype, width: int, num_tokens: int, hidden_size: int
) -> None:
    case = case_on(
        device,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        num_experts=3,
        width=width,
        dtype=dtype,
    )
    assert_ffn(case)


@check(*grid(experts=((16, 1184, 8), (32, 592, 16)), num_tokens=(256, 4096)), small=False)
def ffn_of_bagel_layers(
    device: torch.device, experts: tuple[int, int, int], num_tokens: int
) -> None:
    num_experts, width, top_k = experts
    case = case_on(
        device,
        num_tokens=num_tokens,
        hidden_size=3584,
        num_experts=num_experts,
        width=width,
        top_k=top_k,
        dtype=torch.bfloat16,
    )
    assert_ffn(case)


@check(*grid(dtype=HALVES, sizes=((8, 8), (16, 8), (24, 40), (72, 56), (136, 16), (1000, 208))))
def ffn_of_sizes_that_fit_no_tile(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    """Multiples of 8, which is what 16-byte accesses need, and of nothing else."""
    for num_tokens in (3, 90, 257):
        case = case_on(
            device,
            num_tokens=num_tokens,
            hidden_size=sizes[0],
            num_experts=3,
            width=sizes[1],
            dtype=dtype,
        )
        assert_ffn(case)


@check()
def ffn_of_any_number_of_rows(device: torch.device) -> None:
    """Around the heights of tiles, all on the last expert."""
    for num_rows in (1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 385):
        case = case_on(
            device,
            num_tokens=num_rows,
            hidden_size=64,
            num_experts=2,
            width=32,
            top_k=1,
            dtype=torch.bfloat16,
            routing="last",
        )
        assert_ffn(case)


@check(*grid(dtype=HALVES, argument=("x", "gate_proj", "up_proj", "down_proj")))
def ffn_takes_any_layout(device: torch.device, dtype: torch.dtype, argument: str) -> None:
    case = case_on(device, num_tokens=100, num_experts=3, dtype=dtype)
    expected = {name: run() for name, run in ffn_calls(case)}
    for layout, view in layouts(getattr(case, argument)):
        other = dataclasses.replace(case, **{argument: view})
        for name, run in ffn_calls(other):
            for out, exact in zip(run(), expected[name], strict=True):
                if device.type == "cuda":
                    assert_equal(f"{name}, {argument}: {layout}", out, exact)
                else:  # the CPU's library chooses another kernel for another stride
                    torch.testing.assert_close(out, exact, rtol=2e-2, atol=3e-2)


@check(*grid(dtype=HALVES))
def ffn_repeats_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(
        device, num_tokens=700, hidden_size=136, num_experts=7, width=56, top_k=3, dtype=dtype
    )
    for name, run in ffn_calls(case):
        expected = run()
        for _ in range(20):
            assert_same(name, run, expected)


@check(*grid(dtype=HALVES))
def non_finite_tokens_touch_only_their_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(device, num_tokens=300, num_experts=5, dtype=dtype)
    clean_rows = ops.grouped_ffn(*case.arguments)
    clean = ops.grouped_ffn_combine(*case.fused_arguments)
    case.x[3] = torch.nan
    case.x[7, 5] = torch.inf
    bad = torch.zeros(300, dtype=torch.bool, device=device)
    bad[[3, 7]] = True
    rows = ops.grouped_ffn(*case.arguments)
    tokens = ops.grouped_ffn_combine(*case.fused_arguments)
    bad_rows = bad[case.row_token.long()]
    assert_equal("rows that stay finite", rows.isfinite().all(1), ~bad_rows)
    assert_equal("tokens that stay finite", tokens.isfinite().all(1), ~bad)
    assert_equal("rows", rows[~bad_rows], clean_rows[~bad_rows])
    assert_equal("tokens", tokens[~bad], clean[~bad])


@check(*grid(dtype=HALVES))
def tokens_in_another_order_give_the_same_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = case_on(device, num_tokens=333, hidden_size=64, num_experts=4, width=72, dtype=dtype)
    order = torch.randperm(333, device=device)
    idx = torch.empty(333 * 2, dtype=torch.int32, device=device)
    starts = case.expert_offsets.long()
    experts = torch.repeat_interleave(torch.arange(4, device=device), starts.diff())
    idx = experts[case.token_rows.long()].int()[order].contiguous()
    offsets, row_token, token_rows = ops.sort_by_expert(idx, 4)
    out = ops.grouped_ffn_combine(
        case.x[order], case.weights[order], row_token, token_rows, offsets, *case.experts
    )
    expected = ops.grouped_ffn_combine(*case.fused_arguments)[order]
    if device.type == "cuda":
        assert_equal("tokens", out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=3e-2)


@check(*grid(dtype=HALVES))
def empty_sums_are_zero(device: torch.device, dtype: torch.dtype) -> None:
    """Tokens of zeros, and weights of zeros."""
    case = case_on(device, num_tokens=100, num_experts=3, dtype=dtype)
    zeros = dataclasses.replace(case, x=torch.zeros_like(case.x))
    assert ops.grouped_ffn(*zeros.arguments).abs().max() == 0
    unused = dataclasses.replace(case, weights=torch.zeros_like(case.weights))
    assert ops.grouped_ffn_combine(*unused.fused_arguments).abs().max() == 0


@check()
def what_no_kernel_takes_is_refused(device: torch.device) -> None:
    """fp32, and widths that are no multiple of 8: an error that names the op."""
    if device.type != "cuda":
        raise Skip("the CPU takes everything")
    for sizes in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "width": 12}):
        case = case_on(device, **sizes)
        for name, run in ffn_calls(case):
            assert name in refusal(run)
