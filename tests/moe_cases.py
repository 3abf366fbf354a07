# SPDX-License-Identifier: Apache-2.0
"""Blocks for the module tests, and the official semantics stated in plain torch, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.nn import SparseMoE
from sparse_unified.testing import read_case

GOLDEN = Path(__file__).parent / "golden"


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def golden_block(name: str) -> tuple[SparseMoE, dict[str, Tensor]]:
    """The recorded block with its weights, and the recorded tensors."""
    case = read_case(GOLDEN / name)
    fields = case.fields
    shared = fields["shared_expert_intermediate_size"]
    moe = SparseMoE(
        fields["hidden_size"],
        fields["moe_intermediate_size"] * fields["num_experts"] + shared,
        fields["num_experts"],
        fields["top_k"],
        fields["num_shared_experts"],
        shared_intermediate_size=shared,
    )
    moe.load_state_dict(case.weights)
    return moe, dict(case.tensors)


def random_block(
    hidden_size: int = 24,
    intermediate_size: int = 60,
    num_experts: int = 5,
    top_k: int = 2,
    num_shared_experts: int = 0,
    gate_img: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: bool,
) -> SparseMoE:
    """A block with outputs of about unit size and routers that decide."""
    moe = SparseMoE(
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        num_shared_experts,
        gate_img=gate_img,
        dtype=dtype,
        **options,
    )
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
        moe.down_proj.mul_(3)
    return moe


def official_block(
    x: Tensor,
    weights: Mapping[str, Tensor],
    top_k: int,
    text_indexes: Tensor | None = None,
    vit_indexes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and logits [T, E] of the released block from its official state dict.

    Text tokens are routed by `gate`, ViT tokens by `gate_img` where the block has one; with ViT
    indices alone every token is a ViT token; a token in neither list has logits of zero.
    """

    def swiglu(owner: str, token: Tensor) -> Tensor:
        gate, up, down = (
            weights[f"{owner}.{projection}.weight"]
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        return down @ (F.silu(gate @ token) * (up @ token))

    gate = weights["gate.weight"]
    vit = set() if vit_indexes is None else set(vit_indexes.tolist())
    text = set(range(len(x))) if text_indexes is None else set(text_indexes.tolist())
    if "gate_img.weight" not in weights or vit_indexes is None:
        vit, text = set(), set(range(len(x)))
    elif text_indexes is None:
        vit, text = set(range(len(x))), set()
    outputs, all_logits = [], []
    for position, token in enumerate(x):
        if position in vit:
            logits = weights["gate_img.weight"] @ token
        elif position in text:
            logits = gate @ token
        else:
            logits = 0 * (gate @ token)
        order = [expert for _, expert in sorted((-v, e) for e, v in enumerate(logits.tolist()))]
        chosen = order[:top_k]
        y = sum((1 + logits[e]) * swiglu(f"experts.{e}", token) for e in chosen)
        if "shared_expert.up_proj.weight" in weights:
            y = y + (1 + weights["gate_shared.weight"] @ token) * swiglu("shared_expert", token)
        outputs.append(y)
        all_logits.append(logits)
    return torch.stack(outputs), torch.stack(all_logits)


def double_state(moe: SparseMoE) -> dict[str, Tensor]:
    return {key: value.double() for key, value in moe.state_dict().items()}
