# SPDX-License-Identifier: Apache-2.0
"""The pipeline that torch alone allows: sort, gather, `grouped_mm`, SwiGLU, `grouped_mm`, combine.

Nothing is read back to the host. `grouped_mm` takes the end of each group as int32 on the device
and rows that start at multiples of 16 bytes (torch 2.10, documentation of
`torch.nn.functional.grouped_mm`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .protocol import Peer, Setting
from .stacked import StackedExperts


def find_grouped_mm() -> Callable[..., Tensor] | None:
    """The public function, or the private one of older releases."""
    found: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
    return found or getattr(torch, "_grouped_mm", None)


class GroupedMm(StackedExperts):
    """Rows in expert order through two grouped products."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        num_tokens = x.shape[0]
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None
        experts, slot_of_row = torch.sort(topk_idx.reshape(-1), stable=True)  # [R]
        ids = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(experts, ids, right=True, out_int32=True)  # [E]
        rows = x[slot_of_row // self.top_k]  # [R, D]
        gate, up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=x.device)
        of_token = out[row_of_slot].view(num_tokens, self.top_k, -1)  # [T, K, D]
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), of_token).squeeze(1)


def _unavailable(setting: Setting) -> str | None:
    if find_grouped_mm() is None:
        return f"torch {torch.__version__} has no grouped_mm"
    per_row = 16 // setting.dtype.itemsize
    if setting.case.hidden_size % per_row or setting.case.expert_width % per_row:
        return f"needs hidden size and expert width to be multiples of {per_row}"
    return None


PEER = Peer(name="grouped_mm", unavailable=_unavailable, build=GroupedMm)
