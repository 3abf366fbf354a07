# SPDX-License-Identifier: Apache-2.0
"""Inputs for the op tests, torch's own computation of each op, and the tolerance rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTINGS = ("random", "repeated", "first", "last", "one", "gaps")


def assert_as_good_as_torch(out: Tensor, torch_out: Tensor, ref32: Tensor) -> None:
    """max|out - ref32| <= 2 * max|torch_same_dtype - ref32| + 1e-5, at a realistic output size."""
    assert out.shape == ref32.shape
    assert out.dtype == torch_out.dtype
    if ref32.numel() == 0:
        return
    ref = ref32.float()
    size = ref.abs().max().item()
    few = ref.numel() < 1024  # their size, and who rounds worst, is a matter of chance
    assert few or size > 0.2, "outputs so small would hide a mistake in the tolerance"
    error = (out.float() - ref).abs().max().item()
    allowed = 2 * (torch_out.float() - ref).abs().max().item() + 1e-5
    if few:
        allowed += torch.finfo(out.dtype).eps * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def draw_routing(kind: str, num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """topk_idx [T, K] int32: distinct random experts a token, or an extreme."""
    shape = (num_tokens, top_k)
    if kind == "random":
        return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].int().contiguous()
    if kind == "repeated":  # the ops allow an expert twice in a token
        return torch.randint(num_experts, shape, dtype=torch.int32)
    if kind == "gaps":  # every second expert is empty
        return 2 * torch.randint((num_experts + 1) // 2, shape, dtype=torch.int32)
    expert = {"first": 0, "last": num_experts - 1, "one": num_experts // 2}[kind]
    return torch.full(shape, expert, dtype=torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnCase:
    """Arguments of grouped_ffn with outputs of about unit size, and combine's weights."""

    x: Tensor  # [T, D]
    weights: Tensor  # [T, K] fp32
    expert_offsets: Tensor
    row_token: Tensor
    token_rows: Tensor
    gate_proj: Tensor  # [E * h, D]
    up_proj: Tensor  # [E * h, D]
    down_proj: Tensor  # [D, E * h]

    @property
    def experts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """As grouped_ffn takes them, without token_rows."""
        return (self.x, self.row_token, self.expert_offsets, *self.experts)

    @property
    def fused_arguments(self) -> tuple[Tensor, ...]:
        """As grouped_ffn_combine takes them."""
        return (
            self.x,
            self.weights,
            self.row_token,
            self.token_rows,
            self.expert_offsets,
            *self.experts,
        )


def ffn_case(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_experts: int = 5,
    width: int = 24,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    routing: str = "random",
) -> FfnCase:
    topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
    neurons = num_experts * width
    return FfnCase(
        x=torch.randn(num_tokens, hidden_size).to(dtype),
        weights=(1 + torch.randn(num_tokens, top_k)) * top_k**-0.5,
        expert_offsets=expert_offsets,
        row_token=row_token,
        token_rows=token_rows,
        gate_proj=(torch.randn(neurons, hidden_size) * max(hidden_size, 1) ** -0.5).to(dtype),
        up_proj=(torch.randn(neurons, hidden_size) * max(hidden_size, 1) ** -0.5).to(dtype),
        down_proj=(torch.randn(hidden_size, neurons) * 0.5 * max(width, 1) ** -0.5).to(dtype),
    )


def torch_grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """What torch computes in the dtype of x, one rounding per op."""
    num_experts = expert_offsets.shape[0] - 1
    rows = x[row_token.long()].split(expert_offsets.diff().tolist())
    weights = (gate_proj.chunk(num_experts), up_proj.chunk(num_experts))
    columns = down_proj.chunk(num_experts, dim=1)
    return torch.cat(
        [
            F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
            for own, gate, up, down in zip(rows, *weights, columns, strict=True)
        ]
    )


def torch_combine(y: Tensor, weights: Tensor | None, token_rows: Tensor) -> Tensor:
    """What torch computes in the dtype of y."""
    rows = y[token_rows.long()]
    if weights is not None:
        rows = rows * weights.to(y.dtype).unsqueeze(-1)
    return rows.sum(1)


def each_thread_count() -> Iterator[int]:
    """Sets 1, 2 and 3 threads in turn; the fixture of conftest.py sets the number back."""
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        yield count


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields matrices of equal value and other layouts: padded, misaligned, strided, transposed."""
    rows, columns = tensor.shape
    padded = tensor.new_full((rows, columns + 5), torch.nan)
    padded[:, :columns] = tensor
    yield "padded rows", padded[:, :columns]
    shifted = tensor.new_full((rows, columns + 5), torch.nan)
    shifted[:, 1 : columns + 1] = tensor
    yield "misaligned columns", shifted[:, 1 : columns + 1]
    flat = tensor.new_empty(rows * columns + 1)
    flat[1:] = tensor.reshape(-1)
    yield "misaligned start", flat[1:].view(rows, columns)
    every_second = tensor.new_full((rows, 2 * columns), torch.nan)
    every_second[:, ::2] = tensor
    yield "strided columns", every_second[:, ::2]
    every_third = tensor.new_full((3 * rows, columns), torch.nan)
    every_third[::3] = tensor
    yield "strided rows", every_third[::3]
    yield "transposed", tensor.t().contiguous().t()
