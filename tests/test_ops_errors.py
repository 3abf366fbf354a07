# SPDX-License-Identifier: Apache-2.0
"""Bad arguments of the ops: one sentence each, `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import FfnCase, ffn_case
from torch import Tensor

from sparse_unified import ops

UNSUPPORTED = (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64)
INT = torch.int32


def fails(pattern: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with pytest.raises(RuntimeError, match=pattern) as caught:
        function(*arguments, **named)
    first_line = str(caught.value).splitlines()[0]
    assert re.search(r"^\w+: [\w ]+ must .+, got .+", first_line), first_line


def x_and_gate() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8), torch.randn(5, 8)


@pytest.mark.parametrize("dtype", UNSUPPORTED)
def test_unsupported_dtypes_are_named(dtype: torch.dtype) -> None:
    x, gate = (torch.ones_like(t).to(dtype) for t in x_and_gate())
    name = str(dtype).removeprefix("torch.") if dtype not in (torch.bool, torch.complex64) else ""
    pattern = f"must be float32, bfloat16 or float16, got .*{name}"
    fails(f"route_topk: x {pattern}", ops.route_topk, x, gate, 2)
    rows, token_rows = torch.arange(6, dtype=INT), torch.arange(6, dtype=INT).view(6, 1)
    fails(f"permute: x {pattern}", ops.permute, x, rows, token_rows)
    fails(f"combine: y {pattern}", ops.combine, x, None, token_rows)
    offsets = torch.tensor([0, 6], dtype=INT)
    weights = (x[:2], x[:2], x[:2].t())
    fails(f"grouped_ffn: x {pattern}", ops.grouped_ffn, x, rows, offsets, *weights)


def test_bad_arguments_of_route_topk() -> None:
    x, gate = x_and_gate()
    fails("route_topk: x must have 2 dimensions, got shape", ops.route_topk, x[0], gate, 2)
    fails("route_topk: gate must have 2 dimensions", ops.route_topk, x, gate[0], 2)
    fails("route_topk: gate must have dtype float32", ops.route_topk, x, gate.bfloat16(), 2)
    fails("route_topk: gate must have the hidden size", ops.route_topk, x, gate[:, :7], 2)
    for top_k in (0, -1, 6):
        fails(
            f"route_topk: top_k must be from 1 to .*5, got {top_k}", ops.route_topk, x, gate, top_k
        )


def test_bad_arguments_of_sort_by_expert() -> None:
    idx = torch.zeros(4, 2, dtype=INT)
    fails(
        "sort_by_expert: topk_idx must have dtype int32, got int64",
        ops.sort_by_expert,
        idx.long(),
        3,
    )
    fails("sort_by_expert: topk_idx must have 2 dimensions", ops.sort_by_expert, idx[0], 3)
    fails("sort_by_expert: num_experts must be at least 1, got 0", ops.sort_by_expert, idx, 0)
    for bad in (-1, 3):
        wrong = idx.clone()
        wrong[2, 1] = bad
        pattern = f"sort_by_expert: topk_idx must .* from 0 to 2, got {bad} at position 5"
        fails(pattern, ops.sort_by_expert, wrong, 3)


def test_bad_arguments_of_permute_and_combine() -> None:
    x, weights = torch.randn(3, 8), torch.randn(3, 2)
    y = torch.randn(6, 8)
    token_rows = torch.arange(6, dtype=INT).view(3, 2)
    row_token = torch.tensor([0, 0, 1, 1, 2, 2], dtype=INT)
    fails("permute: row_token must have dtype int32", ops.permute, x, row_token.long(), token_rows)
    fails("permute: token_rows must", ops.permute, x, row_token, token_rows[:2])
    fails("permute: token_rows must", ops.permute, x, row_token[:5], token_rows)
    fails("permute: row_token must", ops.permute, x, row_token.clamp(min=1), token_rows)
    fails("combine: token_rows must", ops.combine, y[:5], weights, token_rows)
    fails(
        "combine: token_rows must .* got 9",
        ops.combine,
        y,
        weights,
        token_rows.clamp(min=0).where(token_rows < 5, 9),
    )
    fails("combine: token_rows must .* got -1", ops.combine, y, weights, token_rows - 1)
    fails("combine: weights must have dtype float32", ops.combine, y, weights.half(), token_rows)
    fails("combine: weights must have the shape", ops.combine, y, weights[:, :1], token_rows)
    fails("combine: y must have 2 dimensions", ops.combine, y[0], weights, token_rows)


def broken(case: FfnCase, position: int, value: Tensor) -> list[Tensor]:
    arguments = list(case.arguments)
    arguments[position] = value
    return arguments


def test_bad_arguments_of_grouped_ffn() -> None:
    case = ffn_case(6, 8, 3, 4, 2)
    x, row_token, offsets, gate, up, down = case.arguments
    not_from_zero, falling = offsets.clone(), offsets.clone()
    not_from_zero[0] = 1
    falling[1] = offsets[-1] + 1
    for position, value, pattern in (
        (0, x[0], "x must have 2 dimensions"),
        (1, row_token.long(), "row_token must have dtype int32"),
        (1, row_token + 6, "row_token must hold indices from 0 to 5"),
        (1, row_token[:-1], "expert_offsets must .* end at the number of rows"),
        (2, offsets[:1], "expert_offsets must have at least 2 entries"),
        (2, not_from_zero, "expert_offsets must start at 0"),
        (2, falling, "expert_offsets must not decrease"),
        (3, gate.half(), "gate_proj must have dtype float32, got float16"),
        (3, gate[:, :7], "gate_proj must have the hidden size"),
        (3, gate[:11], "gate_proj must have rows in equal numbers for 3 experts"),
        (4, up[:9], "up_proj must have the width of gate_proj"),
        (4, up.bfloat16(), "up_proj must have dtype float32, got bfloat16"),
        (5, down[:, :9], "down_proj must have the width of gate_proj"),
        (5, down[:7], "down_proj must have the hidden size"),
        (5, down[0], "down_proj must have 2 dimensions"),
    ):
        fails(f"grouped_ffn: {pattern}", ops.grouped_ffn, *broken(case, position, value))


@pytest.mark.parametrize("num_tokens", [6, 600])
def test_bad_arguments_of_grouped_ffn_combine(num_tokens: int) -> None:
    case = ffn_case(num_tokens, 8, 3, 4, 2)
    x, weights, row_token, token_rows, *rest = case.fused_arguments
    call = ops.grouped_ffn_combine
    name = "(grouped_ffn_combine|combine)"
    fails(f"{name}: weights must", call, x, weights.half(), row_token, token_rows, *rest)
    fails(f"{name}: weights must", call, x, weights[:, :1], row_token, token_rows, *rest)
    fails(f"{name}: token_rows must", call, x, weights, row_token, token_rows.long(), *rest)
    fails(f"{name}: token_rows must", call, x, weights, row_token, token_rows[:-1], *rest)
    fails(f"{name}: token_rows must", call, x, weights, row_token, token_rows + 1, *rest)
    fails("grouped_ffn_combine: x must", call, x[0], weights, row_token, token_rows, *rest)


def test_bad_arguments_of_the_backward_ops() -> None:
    case = ffn_case(6, 8, 3, 4, 2)
    ops_ = torch.ops.sparse_unified
    y = torch.randn(12, 8)
    grads = torch.randn(6, 8), y, case.weights, case.token_rows
    fails(
        "combine_backward: grad_out must",
        ops_.combine_backward,
        grads[0][:5],
        *grads[1:],
        True,
        True,
    )
    activations = torch.randn(12, 4), torch.randn(12, 4)
    fails(
        "grouped_ffn_backward: grad_y must",
        ops_.grouped_ffn_backward,
        y[:5],
        *case.arguments,
        *activations,
        True,
        True,
    )
    fails(
        "grouped_ffn_backward: gate_rows must",
        ops_.grouped_ffn_backward,
        y,
        *case.arguments,
        y,
        y,
        True,
        True,
    )
    x, gate = x_and_gate()
    fails(
        "route_topk_backward: grad_logits must",
        ops_.route_topk_backward,
        torch.randn(6, 4),
        torch.randn(6, 2),
        torch.zeros(6, 2, dtype=INT),
        x,
        gate,
        True,
        True,
    )


def test_arguments_on_two_devices_are_refused() -> None:
    x, gate = x_and_gate()
    fails("route_topk: arguments must .*one device", ops.route_topk, x, gate.to("meta"), 2)
    case = ffn_case(6, 8, 3, 4, 2)
    arguments = broken(case, 0, case.x.to("meta"))
    fails("grouped_ffn: arguments must .*one device", ops.grouped_ffn, *arguments)


@pytest.mark.parametrize("num_tokens", [5, 300])
def test_row_maps_that_contradict_each_other_are_refused(num_tokens: int) -> None:
    case = ffn_case(num_tokens, 16, 4, 8, 2)
    wrong = case.token_rows.flip(0).contiguous()  # every row once, but of other tokens
    message = "row_token must name the token whose rows token_rows lists"
    with pytest.raises(RuntimeError, match=f"permute: {message}"):
        ops.permute(case.x, case.row_token, wrong)
    with pytest.raises(RuntimeError, match=f"grouped_ffn: {message}"):
        ops.grouped_ffn(*case.arguments, wrong)
    with pytest.raises(RuntimeError, match=f"grouped_ffn_combine: {message}"):
        ops.grouped_ffn_combine(
            case.x, case.weights, case.row_token, wrong, case.expert_offsets, *case.experts
        )
