# SPDX-License-Identifier: Apache-2.0
"""DeepGEMM's grouped bf16 products on Hopper, between torch's gather, SwiGLU and combine.

`m_grouped_bf16_gemm_nt_contiguous(a [M, k], b [E, n, k], d [M, n], layout int32 [M])`: row m
belongs to expert layout[m], or to none where it is negative, and every expert starts at a multiple
of `get_mk_alignment_for_contiguous_layout()` (sgl-deep-gemm 0.1.5; its README, "contiguous
layout"). M is bounded without asking the device: R rows and a tile less one for each expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .protocol import Peer, Setting, missing_package, needs_cuda, needs_half
from .stacked import StackedExperts


def aligned_layout(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor]:
    """Places R = T * K slots in rows where every expert starts at a multiple of `alignment`.

    Returns:
        row of each slot [R] int64; expert of each row [M] int32, -1 behind the last expert.
    """
    flat = topk_idx.reshape(-1)
    device = flat.device
    experts, slot_of_rank = torch.sort(flat, stable=True)
    ids = torch.arange(num_experts, device=device)
    ends = torch.searchsorted(experts, ids, right=True)  # [E], of ranks
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    padded_ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
    shift = F.pad(padded_ends, (1, 0))[:-1] - (ends - counts)  # from rank to row, by expert
    row_of_rank = torch.arange(len(flat), device=device) + shift[experts]
    row_of_slot = torch.empty_like(row_of_rank)
    row_of_slot[slot_of_rank] = row_of_rank
    bound = -(-(len(flat) + num_experts * (alignment - 1)) // alignment) * alignment
    owner = torch.searchsorted(padded_ends, torch.arange(bound, device=device), right=True)
    owner = torch.where(owner < num_experts, owner, -1)
    return row_of_slot, owner.int()


class DeepGemm(StackedExperts):
    """Our router and torch's steps around two aligned products."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        import deep_gemm

        alignment = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
        row_of_slot, owner = aligned_layout(topk_idx, self.num_experts, alignment)
        num_rows, (_, double_width, hidden_size) = len(owner), self.gate_up_proj.shape
        rows = x.new_empty(num_rows, hidden_size)
        rows[row_of_slot] = x.repeat_interleave(self.top_k, dim=0)
        gate_up = x.new_empty(num_rows, double_width)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, self.gate_up_proj, gate_up, owner)
        gate, up = gate_up.chunk(2, dim=-1)
        out = x.new_empty(num_rows, hidden_size)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(F.silu(gate) * up, self.down_proj, out, owner)
        of_token = out[row_of_slot].view(x.shape[0], self.top_k, hidden_size)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), of_token).squeeze(1)


def _unavailable(setting: Setting) -> str | None:
    return (
        needs_cuda(setting, (9, 0))
        or needs_half(setting, torch.bfloat16)
        or missing_package("deep_gemm", "sgl-deep-gemm")
    )


PEER = Peer(name="deepgemm", unavailable=_unavailable, build=DeepGemm, trains=False)
