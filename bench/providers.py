# SPDX-License-Identifier: Apache-2.0
"""The modules of a case: our block, and those that are measured beside it without any package."""

from __future__ import annotations

import torch
from torch import nn

from sparse_unified.nn import SparseMoE

from .cases import Case
from .peers import PEERS, Setting, draw_weights

BLOCK_PROVIDERS = ("dense", "dense_half", "expert_loop", "sparse_unified")


def sparse_block(
    case: Case, dtype: torch.dtype, seed: int = 0, *, device: torch.device | str = "cpu"
) -> SparseMoE:
    """Our block with random experts and a random router, whose logits have unit variance."""
    torch.manual_seed(seed)
    block = SparseMoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        return_router_logits=False,
        device=device,
        dtype=dtype,
    )
    nn.init.normal_(block.gate.weight, std=case.hidden_size**-0.5)
    return block


def block_providers(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The block on the CPU by those who need torch alone; `dense` first, the baseline of ratios."""
    setting = Setting(case=case, dtype=dtype, device=torch.device("cpu"))
    weights = draw_weights(case, dtype)
    return {name: PEERS[name].build(setting, weights) for name in BLOCK_PROVIDERS}
