# SPDX-License-Identifier: Apache-2.0
"""The block of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SparseMoE

from .protocol import Peer, Provider, Setting, gradient
from .weights import Weights


class Ours(Provider):
    """`SparseMoE` on the kernels of the device; composed torch ops are not what is measured."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.block = SparseMoE(
            case.hidden_size,
            case.intermediate_size,
            case.num_experts,
            case.top_k,
            return_router_logits=False,
            strict=True,
            device="meta",
            dtype=setting.dtype,
        )
        self.block.gate.weight = nn.Parameter(weights.gate.clone())
        self.block.gate_shared.weight = nn.Parameter(torch.zeros_like(weights.gate[:1]))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self.block, name, nn.Parameter(getattr(weights, name).clone()))

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, topk_logits, topk_idx = ops.route_topk(x, self.block.gate.weight, self.block.top_k)
        return 1 + topk_logits, topk_idx

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y

    def expert_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        block = self.block
        return gradient(block.gate_proj), gradient(block.up_proj), gradient(block.down_proj)


def _unavailable(setting: Setting) -> str | None:
    """Asks a block without storage what would run it."""
    if setting.device.type == "cpu":
        return None
    case = setting.case
    probe = SparseMoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        device=setting.device,
        dtype=setting.dtype,
    )
    backend = probe.active_backend
    return backend if backend.startswith("torch") else None


PEER = Peer(name="sparse_unified", unavailable=_unavailable, build=Ours)
