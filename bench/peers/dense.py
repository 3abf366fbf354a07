# SPDX-License-Identifier: Apache-2.0
"""The dense FFN that the block replaces: eager, at the active width, and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.nn import SwiGLU

from .protocol import Peer, Provider, Setting, always, gradient
from .weights import Weights


class Dense(Provider):
    """The first `num_experts` experts as one dense FFN: each weighs 1 for every token."""

    def __init__(
        self, setting: Setting, weights: Weights, num_experts: int, compiled: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.all_experts = setting.case.num_experts
        width = num_experts * setting.case.expert_width
        self.ffn = SwiGLU(setting.case.hidden_size, width, device="meta", dtype=setting.dtype)
        for name, part in (
            ("gate_proj", weights.gate_proj[:width]),
            ("up_proj", weights.up_proj[:width]),
            ("down_proj", weights.down_proj[:, :width]),
        ):
            weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
            getattr(self.ffn, name).weight = weight
        if compiled:
            # Other sizes of the same function count against a limit of the compiler.
            torch.compiler.reset()
            self.ffn.compile(fullgraph=True, dynamic=False)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_idx = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
        return torch.ones_like(topk_idx, dtype=torch.float32), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)
        return y

    def expert_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        ffn = self.ffn
        gate, up, down = (gradient(p.weight) for p in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
        unused = gate.shape[0] // self.num_experts * (self.all_experts - self.num_experts)
        rows, columns = (0, 0, 0, unused), (0, unused)
        return F.pad(gate, rows), F.pad(up, rows), F.pad(down, columns)


PEERS = (
    Peer(
        name="dense",
        unavailable=always,
        build=lambda setting, weights: Dense(setting, weights, setting.case.num_experts),
        formula="dense_ffn",
    ),
    Peer(
        name="dense_half",
        unavailable=always,
        build=lambda setting, weights: Dense(setting, weights, setting.case.top_k),
        formula="half_ffn",
    ),
    Peer(
        name="dense_compile",
        unavailable=always,
        build=lambda setting, weights: Dense(
            setting, weights, setting.case.num_experts, compiled=True
        ),
        formula="dense_ffn",
    ),
)
