# SPDX-License-Identifier: Apache-2.0
"""Who computes the sparse FFN: our block, the dense FFN it replaces, the official expert loop.

Each provider is a module built for a case, x [T, D] -> y [T, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.nn import SparseMoE, SwiGLU

from .cases import Case


def sparse_block(case: Case, dtype: torch.dtype, seed: int = 0) -> SparseMoE:
    """Our block with random experts and a random router, whose logits have unit variance."""
    torch.manual_seed(seed)
    block = SparseMoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        return_router_logits=False,
        dtype=dtype,
    )
    nn.init.normal_(block.gate.weight, std=case.hidden_size**-0.5)
    return block


def dense_ffn(case: Case, dtype: torch.dtype, share: float = 1.0) -> SwiGLU:
    """The eager dense FFN, at `share` of the width."""
    return SwiGLU(case.hidden_size, int(case.intermediate_size * share), dtype=dtype)


class ExpertLoop(nn.Module):
    """The official style: a module per expert, a Python loop, one `index_add_` per expert."""

    def __init__(self, block: SparseMoE) -> None:
        super().__init__()
        self.top_k = block.top_k
        self.gate = block.gate
        self.experts = nn.ModuleList()
        views = block.official_views()
        for expert in range(block.num_experts):
            ffn = SwiGLU(block.hidden_size, block.layout.expert_width, dtype=block.gate_proj.dtype)
            ffn.load_state_dict(
                {
                    f"{name}.weight": views[f"experts.{expert}.{name}.weight"]
                    for name in ("gate_proj", "up_proj", "down_proj")
                }
            )
            self.experts.append(ffn)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)  # [T, E]
        chosen = torch.topk(logits, self.top_k, dim=-1).indices
        weights = logits.gather(1, chosen)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)  # [E, K, T]
        y = torch.zeros_like(x)
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            rows = self.experts[expert](x[token])
            y.index_add_(0, token, rows + rows * weights[token, slot, None])
        return y


def block_providers(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every provider of the whole block; `dense` first, the baseline of the ratios."""
    block = sparse_block(case, dtype)
    return {
        "dense": dense_ffn(case, dtype),
        "dense_half": dense_ffn(case, dtype, case.top_k / case.num_experts),
        "expert_loop": ExpertLoop(block),
        "sparse_unified": block,
    }
