# SPDX-License-Identifier: Apache-2.0
"""A stage trains exactly what it names, and what is frozen costs no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_unified.adapt.config import freeze
from sparse_unified.nn import SparseMoE, SwiGLU


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp_moe_gen = SparseMoE(16, 64, 4, 2, 1, shared_intermediate_size=16)
        self.mlp = SwiGLU(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_moe_gen(self.norm(x))[0] + self.mlp(x)


ROUTERS = {"mlp_moe_gen.gate.weight", "mlp_moe_gen.gate_shared.weight"}
EXPERTS = {f"mlp_moe_gen.{part}_proj" for part in ("gate", "up", "down")}


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        block.mlp_moe_gen.gate.weight.normal_()
    return block


def test_stages_train_exactly_what_they_name(block: Block) -> None:
    names = {name for name, _ in block.named_parameters()}
    for stage, wanted in (("router", ROUTERS), ("expert_frozen", names - EXPERTS), ("full", names)):
        assert set(freeze(block, stage)) == wanted
        assert {n for n, p in block.named_parameters() if p.requires_grad} == wanted
        block.zero_grad()
        block(torch.randn(9, 16)).square().sum().backward()
        assert {n for n, p in block.named_parameters() if p.grad is not None} == wanted


def kept_bytes(block: SparseMoE, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for backward, besides parameters and x."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = block(x)
    y.sum().backward()
    return sum(kept.values())


def test_frozen_experts_keep_no_more_than_their_input_gradient_needs() -> None:
    tokens, hidden, width, experts, top_k = 64, 32, 512, 4, 2
    block = SparseMoE(hidden, width, experts, top_k)
    nn.init.normal_(block.gate.weight)
    x = torch.randn(tokens, hidden, requires_grad=True)
    freeze(block, "expert_frozen")
    rows = tokens * top_k
    activations = 2 * rows * (width // experts) * 4  # of gate and up, for the gradient of x
    outputs = rows * hidden * 4  # of the experts, for the gradient of the router
    indices = 4 * (3 * rows + tokens * (experts + top_k) + experts + 1) + 8 * rows
    assert kept_bytes(block, x) <= activations + outputs + indices


def test_a_component_is_trained_alone_and_what_leaves_nothing_is_refused(block: Block) -> None:
    gen = {name for name, _ in block.named_parameters() if name.startswith("mlp_moe_gen")}
    assert set(freeze(block, "full", component="gen")) == gen
    for model, stage, component, rule in (
        (block, "router", "und", "component must have weights .* none in und"),
        (block, "router", "vit", "component must be gen, und or both, got 'vit'"),
        (block, "experts", "both", "stage must be one of router, expert_frozen"),
        (SwiGLU(8, 16), "expert_frozen", "both", "stage must be full for a model without"),
    ):
        with pytest.raises(ValueError, match=f"freeze: {rule}"):
            freeze(model, stage, component=component)
    assert {name for name, p in block.named_parameters() if p.requires_grad} == gen
    assert len(freeze(SwiGLU(8, 16), "full")) == 3
