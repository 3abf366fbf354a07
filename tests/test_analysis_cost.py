# SPDX-License-Identifier: Apache-2.0
"""Costs are those of a real forward: what is not run is not counted, what is run is."""

from __future__ import annotations

from typing import Any

import analysis_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_unified
from sparse_unified.analysis.evaluators import ActivationMemory, measure_cost
from sparse_unified.nn import SparseMoE, SwiGLU


def cost_of(model: nn.Module, x: Tensor) -> Any:
    return measure_cost(model, lambda: lambda: model(x), repeats=1)


@pytest.mark.usefixtures("torch_products")
def test_flops_and_bytes_of_an_ffn_are_its_formula() -> None:
    dense = SwiGLU(32, 96)
    assert cost_of(dense, torch.randn(10, 32)).flops == 6 * 10 * 32 * 96  # in our own kernel
    found = cost_of(dense, torch.randn(7, 32))
    assert found.flops == 6 * 7 * 32 * 96
    assert found.parameters == 3 * 32 * 96
    assert found.weight_bytes == 4 * found.parameters
    assert found.seconds > 0
    # silu, up and their product, each [7, 96], are alive together; the gate's before it.
    assert found.peak_bytes == found.weight_bytes + 4 * 3 * 7 * 96


def test_idle_experts_are_not_counted() -> None:
    tokens = 37
    block = SparseMoE(32, 96, num_experts=4, top_k=2, return_router_logits=False)
    nn.init.normal_(block.gate_proj)
    found = cost_of(block, torch.randn(tokens, 32))
    assert found.flops == 6 * tokens * 2 * 24 * 32 + 2 * tokens * 4 * 32


def test_pruned_blocks_are_not_counted() -> None:
    class Pruned(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            kept = torch.tensor([0, 4], dtype=torch.int32)
            return sparse_unified.ops.pruned_ffn(x, kept, *weights, 16)

    assert cost_of(Pruned(32, 96), torch.randn(10, 32)).flops == 6 * 10 * 2 * 16 * 32


def test_attention_is_counted() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)

    found = cost_of(Attend(), torch.randn(1, 4, 7, 16))
    assert found.flops == 4 * 4 * 7 * 7 * 16
    assert found.parameters == 0


def test_bagel_forward_is_the_sum_of_its_parts() -> None:
    model = models.bagel()
    config = model.config.llm
    tokens, past = 16, 5

    def workload() -> Any:
        contexts = model.new_contexts(1)
        model.prefill_text(contexts, [[10] * (past - 2)])
        x = torch.randn(tokens, model.config.token_channels)
        return lambda: model.velocity([x], [(4, 4)], torch.tensor([0.5]), [contexts])

    found = measure_cost(model, workload, repeats=1)
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    rows = tokens + 2  # markers
    layer = 6 * rows * width * config.intermediate_size
    layer += 2 * rows * width * (2 * width + 2 * kv)
    layer += 4 * config.num_attention_heads * config.head_dim * rows * (rows + past)
    ends = 2 * 2 * tokens * model.config.token_channels * width
    time = 2 * (256 * width + width * width)
    assert found.flops == config.num_hidden_layers * layer + ends + time
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_memory_is_given_back_and_views_are_free() -> None:
    x = torch.randn(100)
    with ActivationMemory() as memory:
        y = x + 1  # 400 bytes
        z = y.view(10, 10).T
        del y, z
        w = x * 2  # another 400, after the first are gone
        w.add_(1)
        w.chunk(2)
    assert memory.peak == 400
    assert w.shape == (100,)
