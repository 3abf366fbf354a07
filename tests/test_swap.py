# SPDX-License-Identifier: Apache-2.0
"""Sparse FFNs go into a live model with everything around them kept."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from swap_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Bare,
    Layer,
    Model,
    TensorMLP,
    TupleMLP,
    ffn,
    tokens,
)
from torch import nn

import sparse_unified
from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.experts import ExpertLayout, magnitude_scores, snake_partition
from sparse_unified.nn import SparseMoE

HALF = MoEConfig(num_experts=4, top_k=2)
MLPS = pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
COMPONENTS = pytest.mark.parametrize("component", ["gen", "und"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@MLPS
@COMPONENTS
@pytest.mark.parametrize("shared", [0, 2])
def test_all_experts_with_zero_router_equal_dense(
    mlp: type[TensorMLP], component: str, shared: int
) -> None:
    model = Model(mlp)
    und, gen = model(tokens(5), tokens(7))
    apply_moe_(
        model,
        MoEConfig(
            num_experts=4, top_k=4, num_shared_experts=shared, component=component, layers="all"
        ),
    )
    assert all(type(ffn(model, i, component)) is SparseMoE for i in range(LAYERS))
    sparse_und, sparse_gen = model(tokens(5), tokens(7))
    torch.testing.assert_close(sparse_und, und, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse_gen, gen, rtol=1e-5, atol=1e-6)


def test_middle_layers_of_gen_are_the_default() -> None:
    model = Model()
    apply_moe_(model, HALF)
    sparse = [n for n, m in model.named_modules() if isinstance(m, SparseMoE)]
    assert sparse == [f"language_model.model.layers.{i}.mlp_moe_gen" for i in (1, 2)]


def test_weights_are_permuted_bit_for_bit_by_magnitude() -> None:
    model = Model()
    dense = ffn(model, 1)
    weights = [getattr(dense, n).weight for n in ("gate_proj", "up_proj", "down_proj")]
    order = snake_partition(
        magnitude_scores(*weights), ExpertLayout(intermediate_size=WIDTH, num_experts=4)
    )
    apply_moe_(model, HALF)
    block = ffn(model, 1)
    assert torch.equal(block.gate_proj, weights[0][order])
    assert torch.equal(block.up_proj, weights[1][order])
    assert torch.equal(block.down_proj, weights[2][:, order])
    assert not block.gate.weight.any()
    assert not block.gate_shared.weight.any()


@pytest.mark.parametrize("form", ["tensor", "dict", "numpy"])
def test_given_scores_decide_the_partition(form: str) -> None:
    scores: Any = torch.rand(LAYERS, WIDTH)
    expected = snake_partition(scores[2], ExpertLayout(intermediate_size=WIDTH, num_experts=4))
    if form == "dict":
        scores = {1: scores[1], 2: scores[2]}
    if form == "numpy":
        scores = scores.double().numpy()
    model = Model()
    weight = ffn(model, 2).gate_proj.weight
    apply_moe_(model, HALF, scores)
    assert torch.equal(ffn(model, 2).gate_proj, weight[expected])


def test_scores_of_layers_that_stay_dense_are_not_looked_at() -> None:
    scores = torch.rand(LAYERS, WIDTH)
    scores[0] = float("nan")
    assert len(apply_moe_(Model(), HALF, scores).layers) == 2


@MLPS
@COMPONENTS
def test_return_convention_is_kept(mlp: type[TensorMLP], component: str) -> None:
    model = Model(mlp)
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component=component))
    out = ffn(model, 1, component)(tokens())
    if mlp is TupleMLP:
        y, router_logits = out
        assert router_logits.shape == (5, 4)
    else:
        y = out
    assert y.shape == (5, HIDDEN)
    model(tokens(5), tokens(7))


@COMPONENTS
def test_only_und_blocks_have_an_image_router(component: str) -> None:
    model = Model()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component=component))
    assert (ffn(model, 1, component).gate_img is not None) == (component == "und")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@MLPS
def test_dtype_mode_and_requires_grad_are_kept(dtype: torch.dtype, mlp: type[TensorMLP]) -> None:
    model = Model(mlp).to(dtype)
    ffn(model, 1).eval()
    ffn(model, 1).up_proj.requires_grad_(False)
    apply_moe_(model, HALF)
    block = ffn(model, 1)
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert not block.training
    assert not block.gate.training
    assert ffn(model, 2).training
    frozen = {name for name, p in block.named_parameters() if not p.requires_grad}
    assert frozen == {"up_proj"}


def test_frozen_experts_train_routers_alone() -> None:
    model = Model()
    model.requires_grad_(False)
    apply_moe_(model, HALF)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 2)[-2] for n in trained} == {"gate", "gate_shared"}
    model(tokens(), tokens())[1].sum().backward()
    assert ffn(model, 1).gate.weight.grad.any()
    assert ffn(model, 1).gate_proj.grad is None


def test_meta_weights_are_swapped_when_scores_are_given() -> None:
    with torch.device("meta"):
        model = Model(TupleMLP)
    report = apply_moe_(model, HALF, torch.rand(LAYERS, WIDTH))
    assert ffn(model, 1).gate_proj.is_meta
    assert ffn(model, 1).return_router_logits
    assert report.layers[0].backend == ffn(model, 1).active_backend


def test_the_swap_draws_no_random_numbers_and_leaves_buffers_alone() -> None:
    model = Model(TupleMLP)
    before = torch.get_rng_state()
    dense = ffn(model, 1)
    apply_moe_(model, HALF)
    assert torch.equal(before, torch.get_rng_state())
    assert dense.act_cnt == 0


@pytest.mark.parametrize("lead", ["pipeline", "language model", "decoder", "list", "wrapper"])
def test_layers_are_found_from_every_object_that_leads_to_them(lead: str) -> None:
    class Pipeline:
        def __init__(self, model: Model) -> None:
            self.model = model

    class Listed:
        def __init__(self, layers: Any) -> None:
            self.layers = list(layers)

    class Wrapper(nn.Module):
        def __init__(self, layer: Layer) -> None:
            super().__init__()
            self.wrapped = layer

        def __getattr__(self, name: str) -> Any:
            return self._modules[name] if name == "wrapped" else getattr(self.wrapped, name)

    model = Model()
    inner = list(model.layers)
    host: Any = {
        "pipeline": Pipeline(model),
        "language model": model.language_model,
        "decoder": model.language_model.model,
        "list": Listed(model.layers),
        "wrapper": Bare(layers=nn.ModuleList(map(Wrapper, inner))),
    }[lead]
    apply_moe_(host, HALF)
    assert [isinstance(layer.mlp_moe_gen, SparseMoE) for layer in inner] == [
        False,
        True,
        True,
        False,
    ]
    assert len(restore_(host).layers) == 2
    assert not any(isinstance(layer.mlp_moe_gen, SparseMoE) for layer in inner)


def test_report_says_what_changed() -> None:
    model = Model()
    report = apply_moe_(model, MoEConfig(num_experts=4, top_k=2, num_shared_experts=2))
    entry = report.layers[0]
    assert [e.layer for e in report.layers] == [1, 2]
    assert (entry.before, entry.after) == ("TensorMLP", "SparseMoE")
    assert entry.path == "language_model.model.layers.1.mlp_moe_gen"
    assert (entry.num_experts, entry.top_k, entry.num_shared_experts) == (4, 2, 2)
    assert (entry.expert_width, entry.shared_width) == (4, 8)
    assert entry.parameters_before == entry.active_before == 3 * HIDDEN * WIDTH
    assert entry.parameters_after == sum(p.numel() for p in ffn(model, 1).parameters())
    assert entry.active_after == entry.parameters_after - 2 * 3 * HIDDEN * 4
    assert entry.backend == "cpu"

    read = json.loads(report.to_json())
    assert read["action"] == "apply_moe_"
    assert read["layers"][1]["layer"] == 2
    text = str(report)
    assert text.startswith("apply_moe_: 2 FFNs changed (gen 1-2); parameters 1,152 -> ")
    assert len(text.splitlines()) == 5

    back = restore_(model).layers[0]
    assert (back.before, back.after, back.backend) == ("SparseMoE", "TensorMLP", "dense")
    assert (back.active_before, back.active_after) == (entry.active_after, entry.active_before)


def test_state_dict_of_a_swapped_model_loads_into_another_one() -> None:
    model, other = Model(), Model()
    apply_moe_(model, HALF)
    apply_moe_(other, HALF)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model(tokens(), tokens()), other(tokens(), tokens()), strict=True):
        assert torch.equal(a, b)


def test_top_level_names_are_there_and_cheap() -> None:
    assert set(sparse_unified.__all__) <= set(dir(sparse_unified))
    for name in sparse_unified.__all__:
        assert getattr(sparse_unified, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparse_unified.nonsense
    script = (
        "import sys, time, torch\n"
        "start = time.perf_counter(); import sparse_unified\n"
        "print(time.perf_counter() - start)\n"
        "assert 'sparse_unified.surgery' not in sys.modules\n"
        "assert sparse_unified.MoEConfig().num_experts == 16\n"
    )
    seconds = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert float(seconds) < 0.3
