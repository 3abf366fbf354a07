# SPDX-License-Identifier: Apache-2.0
"""The stateless layers, by the rules and through the functions of the kernels package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from kernels.layer.layer import _validate_layer
from torch import Tensor, nn

from sparse_unified.engines import kernels as layers
from sparse_unified.engines.kernels import BACKENDS, write_kernel_repository
from sparse_unified.nn import SparseMoE

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
