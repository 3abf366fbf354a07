# SPDX-License-Identifier: Apache-2.0
"""What most peers share: a torch router, and experts stacked in two tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .protocol import Provider, Setting, gradient
from .weights import Weights


class StackedExperts(Provider):
    """A router of torch ops before experts `gate_up_proj` [E, 2h, D] and `down_proj` [E, D, h]."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.num_experts, self.top_k = case.num_experts, case.top_k
        self.gate = nn.Linear(
            case.hidden_size, self.num_experts, bias=False, device="meta", dtype=setting.dtype
        )
        self.gate.weight = nn.Parameter(weights.gate.clone())
        gate_up_proj, down_proj = weights.stacked(self.num_experts)
        self.gate_up_proj = nn.Parameter(gate_up_proj)
        self.down_proj = nn.Parameter(down_proj)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_logits, topk_idx = torch.topk(self.gate(x), self.top_k, dim=-1)
        return 1 + topk_logits.float(), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.routing(x))

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        """The experts: x [T, D], weights [T, K] fp32, topk_idx [T, K] int64 -> y [T, D]."""
        raise NotImplementedError

    def expert_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = gradient(self.gate_up_proj).chunk(2, dim=1)
        down = gradient(self.down_proj).transpose(0, 1)
        return gate.flatten(0, 1), up.flatten(0, 1), down.flatten(1)
