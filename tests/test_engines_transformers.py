# SPDX-License-Identifier: Apache-2.0
"""Models of transformers run their experts on our ops, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor

from sparse_unified.engines.transformers import NAME, experts_forward, register

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 56, "num_local_experts": 5},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 6, "head_dim": 12},
}


def tiny(name: str, **options: Any) -> Any:
    register()
    register()  # again changes nothing
    sizes = SIZES | MODELS.get(name, {}) | options
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def results(model: Any, ids: Tensor, implementation: str) -> list[Tensor]:
    """Logits without and with gradients, and the gradients of all parameters."""
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        logits = model(ids).logits
    model.zero_grad()
    trained = model(ids)
    trained.logits.square().mean().backward()
    return [logits, trained.logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("other", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_and_learns_what_it_does_without_us(name: str, other: str) -> None:
    model = tiny(name)
    ids = torch.randint(96, (3, 50))
    addresses = [p.data_ptr() for p in model.parameters()]
    for own, expected in zip(results(model, ids, NAME), results(model, ids, other), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_bf16_is_as_exact_as_grouped_mm() -> None:
    ids = torch.randint(96, (2, 40))
    exact = results(tiny("Mixtral"), ids, "eager")[0]
    model = tiny("Mixtral").bfloat16()
    own, theirs = (results(model, ids, name)[0].float() for name in (NAME, "grouped_mm"))
    assert (own - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_weights_are_not_copied() -> None:
    """A forward pass allocates less than the experts' weights."""
    model = tiny("Qwen3Moe", experts_implementation=NAME, num_experts=64)
    module = model.model.layers[0].mlp.experts
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    x, chosen = torch.randn(2, 48), torch.tensor([[0, 3], [1, 2]])
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        experts_forward(module, x, chosen, torch.rand(2, 2))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < weights / 4


def test_a_layer_compiles_as_one_graph() -> None:
    module = tiny("Mixtral", experts_implementation=NAME).model.layers[0].mlp
    x = torch.randn(1, 30, 48)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))


def test_experts_of_another_kind_are_refused() -> None:
    model = tiny("GptOss", num_local_experts=4, intermediate_size=16, head_dim=12)
    model.set_experts_implementation(NAME)
    refused(r"GptOssExperts must be SwiGLU .* got has_bias True", model, torch.randint(96, (1, 5)))
    gelu = tiny("Mixtral", hidden_act="gelu", experts_implementation=NAME)
    refused("activation", gelu, torch.randint(96, (1, 5)))
