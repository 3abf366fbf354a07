# SPDX-License-Identifier: Apache-2.0
"""Layers of transformers and of the kernels package run on our ops, forward and backward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from kernels.layer.layer import _validate_layer
from refusals import refused
from torch import Tensor, nn

from sparse_unified.engines import kernels as layers
from sparse_unified.engines.kernels import BACKENDS, write_kernel_repository
from sparse_unified.engines.transformers import NAME, experts_forward, register
from sparse_unified.nn import SparseMoE

# kernels

HIDDEN, EXPERTS, WIDTH, TOP_K = 16, 4, 8, 2


class PlainFFN(nn.Module):
    """A sparse FFN of somebody else, in plain torch, made extensible as kernels asks for it."""

    kernel_layer_name = "SparseFFN"

    def __init__(self, top_k: int = TOP_K) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_proj = nn.Parameter(torch.randn(EXPERTS * WIDTH, HIDDEN) / 4)
        self.up_proj = nn.Parameter(torch.randn(EXPERTS * WIDTH, HIDDEN) / 4)
        self.down_proj = nn.Parameter(torch.randn(HIDDEN, EXPERTS * WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).topk(self.top_k, dim=-1)
        hidden = F.silu(x @ self.gate_proj.T) * (x @ self.up_proj.T)
        own = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, 1 + weights)
        return (hidden * own.repeat_interleave(WIDTH, dim=-1)) @ self.down_proj.T


class PlainFFNWithLogits(PlainFFN):
    kernel_layer_name = "SparseFFNWithLogits"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.gate(x).reshape(-1, EXPERTS)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel_repository(tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize("host", [PlainFFN, PlainFFNWithLogits])
def test_layers_meet_the_rules_of_kernels(host: type[PlainFFN], repository: Path) -> None:
    name = host.kernel_layer_name
    source = LocalLayerRepository(repository, layer_name=name)
    layer = source.load()
    assert layer is getattr(layers, name)
    _validate_layer(check_cls=host, cls=layer, repo=source)


def outputs(model: nn.Module, x: Tensor, *, train: bool) -> list[Tensor]:
    """Returns what a model gives and, where it trains, the gradients of x and the parameters."""
    x = x.clone().requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = model(x)
    found = [out] if isinstance(out, Tensor) else [*out]
    if not train:
        return found
    model.zero_grad()
    found[0].square().sum().backward()
    return [*found, *(leaf.grad for leaf in (x, *model.parameters()) if leaf.grad is not None)]


@pytest.mark.parametrize(
    "mode", [Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE]
)
@pytest.mark.parametrize("host", [PlainFFN, PlainFFNWithLogits])
def test_a_kernelized_model_computes_the_same(
    host: type[PlainFFN], mode: Mode, repository: Path
) -> None:
    name, train = host.kernel_layer_name, mode == Mode.TRAINING
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), host())
    x = torch.randn(3, 7, HIDDEN)
    expected = outputs(model, x, train=train)
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)}}
    with use_kernel_mapping(mapping):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert model[1].forward.__func__ is getattr(layers, name).forward
    for own, other in zip(outputs(model, x, train=train), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_layer_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    model = PlainFFN()
    compiled = torch.compile(
        lambda x: layers.SparseFFN.forward(model, x), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_is_our_block_bit_for_bit() -> None:
    block = SparseMoE(HIDDEN, EXPERTS * WIDTH, EXPERTS, TOP_K)
    with torch.no_grad():
        block.gate.weight.normal_()
        x = torch.randn(5, HIDDEN)
        for own, other in zip(layers.SparseFFNWithLogits.forward(block, x), block(x), strict=True):
            assert torch.equal(own, other)


def test_a_repository_has_a_variant_for_each_backend(repository: Path) -> None:
    assert repository.name == "build"
    assert {path.name for path in repository.iterdir()} == {f"torch-{name}" for name in BACKENDS}
    for backend in BACKENDS:
        metadata = json.loads((repository / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
    ids = {json.loads(p.read_text())["id"] for p in repository.glob("*/metadata.json")}
    assert len(ids) == len(BACKENDS)


# transformers


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
    transformers = pytest.importorskip("transformers", minversion="5.0")
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


def test_experts_compile_as_one_graph() -> None:
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
