# SPDX-License-Identifier: Apache-2.0
"""Oracle of every op in plain torch, fp32 inside (fp64 for fp64 input), autograd for free.

T tokens, D hidden size, E experts, h expert width, K top_k, R = T * K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def route_topk(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], gate [E, D] -> logits [T, E], topk_logits [T, K], topk_idx [T, K].

    Larger logits first, NaN before everything, equal logits by lower expert index.
    """
    logits = _wide(x) @ _wide(gate).t()  # [T, E]
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    topk_idx = order[:, :top_k]  # [T, K]
    return logits, logits.gather(1, topk_idx), topk_idx.int()


def sort_by_expert(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_idx [T, K] -> expert_offsets [E + 1], row_token [R], token_rows [T, K]."""
    flat = topk_idx.reshape(-1).long()
    slot_of_row = torch.argsort(flat, stable=True)  # [R]
    counts = torch.bincount(flat, minlength=num_experts)
    expert_offsets = F.pad(counts.cumsum(0), (1, 0))
    token_rows = torch.empty_like(slot_of_row)
    token_rows[slot_of_row] = torch.arange(flat.numel(), device=flat.device)
    row_token = slot_of_row // max(topk_idx.shape[1], 1)
    return expert_offsets.int(), row_token.int(), token_rows.view_as(topk_idx).int()


def permute(x: Tensor, row_token: Tensor) -> Tensor:
    """x [T, D], row_token [R] -> y [R, D] with y[r] = x[row_token[r]]."""
    return x[row_token.long()]


def combine(
    y: Tensor, weights: Tensor | None, token_rows: Tensor, weight_offset: float = 0
) -> Tensor:
    """y [R, D], weights [T, K], token_rows [T, K] -> [T, D], sum of (offset + weight) * row."""
    rows = _wide(y)[token_rows.long()]  # [T, K, D]
    if weights is not None:
        rows = rows * (weight_offset + weights).unsqueeze(-1)
    return rows.sum(1).to(y.dtype)


def swiglu(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x [n, D], gate_proj and up_proj [h, D], down_proj [D, h] -> [n, D]."""
    gate, up = _wide(x) @ _wide(gate_proj).t(), _wide(x) @ _wide(up_proj).t()
    return ((F.silu(gate) * up) @ _wide(down_proj).t()).to(x.dtype)


def grouped_ffn(
    x: Tensor,
    row_token: Tensor,
    expert_offsets: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """x [T, D], weights [E * h, D], [E * h, D], [D, E * h] -> y [R, D], rows grouped by expert."""
    num_experts = expert_offsets.shape[0] - 1
    width = gate_proj.shape[0] // num_experts
    rows = x[row_token.long()]  # [R, D]
    outputs = []
    for expert in range(num_experts):
        start, stop = expert_offsets[expert], expert_offsets[expert + 1]
        own = slice(expert * width, (expert + 1) * width)
        outputs.append(swiglu(rows[start:stop], gate_proj[own], up_proj[own], down_proj[:, own]))
    return torch.cat(outputs)


def scaled_grouped_mm(
    rows: Tensor,
    weights: Tensor,
    scales: Tensor,
    _recipe: object,
    weight_scales: Tensor,
    _weight_recipe: object,
    *,
    offs: Tensor,
) -> Tensor:
    """What torch computes by this name, row by row scaled: rows [R, k] and weights [E, k, n] in
    fp8, scales [R] and [E, n], ends of the experts offs [E] -> [R, n] bf16."""
    wide = weights.float() * weight_scales.unsqueeze(1)
    own = (rows.float() * scales.unsqueeze(1)).split(F.pad(offs, (1, 0)).diff().tolist())
    return torch.cat([x @ w for x, w in zip(own, wide, strict=True)]).bfloat16()


def pruned_ffn(
    x: Tensor,
    kept_blocks: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    block_size: int,
) -> Tensor:
    """x [T, D], kept_blocks [B], weights [I, D], [I, D], [D, I] -> y [T, D], kept neurons alone."""
    first = kept_blocks.long()[:, None] * block_size  # [B, 1]
    kept = (first + torch.arange(block_size, device=first.device)).reshape(-1)  # [J]
    return swiglu(x, gate_proj[kept], up_proj[kept], down_proj[:, kept])


def ffn_importance(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    threshold: float = 0.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [I, D] -> sum |h|, sum h^2, weight of the tokens with |h| > threshold."""
    hidden = F.silu(_wide(x) @ _wide(gate_proj).t()) * (_wide(x) @ _wide(up_proj).t())  # [T, I]
    weights = hidden.new_ones(len(x)) if token_weights is None else token_weights.to(hidden.dtype)
    hidden, weights = hidden[weights != 0], weights[weights != 0, None]
    fired = (hidden.abs() > threshold) * weights
    return (hidden.abs() * weights).sum(0), (hidden.square() * weights).sum(0), fired.sum(0)


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    top_k: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
) -> tuple[Tensor, Tensor]:
    """The whole block without a shared expert -> y [T, D], logits [T, E]."""
    logits, topk_logits, topk_idx = route_topk(x, gate, top_k)
    expert_offsets, row_token, token_rows = sort_by_expert(topk_idx, gate.shape[0])
    y = grouped_ffn(_wide(x), row_token, expert_offsets, gate_proj, up_proj, down_proj)
    return combine(y, topk_logits, token_rows, 1.0).to(x.dtype), logits
