# SPDX-License-Identifier: Apache-2.0
"""The official style: a module per expert, a Python loop, one `index_add_` per expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.nn import SwiGLU

from .protocol import Peer, Provider, Setting, always
from .weights import Weights


class ExpertLoop(Provider):
    """Asks the host which experts have tokens, and runs them one after the other."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.top_k = case.top_k
        options = {"device": "meta", "dtype": setting.dtype}
        self.gate = nn.Linear(case.hidden_size, case.num_experts, bias=False, **options)
        self.gate.weight = nn.Parameter(weights.gate.clone())
        self.experts = nn.ModuleList()
        width = case.expert_width
        for expert in range(case.num_experts):
            own = slice(expert * width, (expert + 1) * width)
            ffn = SwiGLU(case.hidden_size, width, device="meta", dtype=setting.dtype)
            for name, part in (
                ("gate_proj", weights.gate_proj[own]),
                ("up_proj", weights.up_proj[own]),
                ("down_proj", weights.down_proj[:, own]),
            ):
                weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
                getattr(ffn, name).weight = weight
            self.experts.append(ffn)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_logits, topk_idx = torch.topk(self.gate(x), self.top_k, dim=-1)
        return 1 + topk_logits.float(), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)  # [T, E]
        chosen = torch.topk(logits, self.top_k, dim=-1).indices
        weights = logits.gather(1, chosen)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)  # [E, K, T]
        y = torch.zeros_like(x)
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            rows = self.experts[expert](x[token])
            y = y.index_add(0, token, rows + rows * weights[token, slot, None])
        return y

    def expert_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        def gradient(name: str, dim: int) -> Tensor:
            found = []
            for expert in self.experts:
                weight = getattr(expert, name).weight
                found.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            return torch.cat(found, dim)

        return gradient("gate_proj", 0), gradient("up_proj", 0), gradient("down_proj", 1)


PEER = Peer(name="expert_loop", unavailable=always, build=ExpertLoop, waits=True)
