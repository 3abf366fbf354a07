# SPDX-License-Identifier: Apache-2.0
"""FFN weights in 8 bits: dense and sparse FFNs compute nearly the same in half the bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from surgery_models import (
    Bare,
    EngineMLP,
    MergedMLP,
    Model,
    TensorMLP,
    TupleMLP,
    assert_same,
    ffn,
    foreign_model,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from sparse_unified import (
    MoEConfig,
    PruneWidthConfig,
    QuantizeConfig,
    apply_moe_,
    count_parameters,
    prune_width_,
    quantize_weights_,
    restore_,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import is_packed

pytest.importorskip("torchao")
# Half a step of 127 over the largest of a row, relative to the rms: about 1 % a matrix; fp8 has 3
# bits behind the leading one, so up to 1/16 and about 2.6 % a matrix; three matrices each.
ERROR = {"int8": 0.03, "fp8": 0.09}
STORAGES = pytest.mark.parametrize("storage", ["int8", "fp8"])
SIZES = (64, 192)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def model_of(mlp: Any = TensorMLP, dtype: torch.dtype = torch.bfloat16) -> Model:
    return foreign_model(mlp, *SIZES).to(dtype).eval().requires_grad_(False)


def output(module: Any, x: Tensor) -> Tensor:
    out = module(x)
    return (out[0] if isinstance(out, tuple) else out).float()


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@STORAGES
@pytest.mark.parametrize(
    ("mlp", "dtype", "least"),
    [
        (TensorMLP, torch.float32, 0.3),
        (TupleMLP, torch.bfloat16, 0.6),
        (MergedMLP, torch.bfloat16, 0.6),
    ],
)
def test_dense_ffns_compute_nearly_the_same(
    storage: str, mlp: Any, dtype: torch.dtype, least: float
) -> None:
    model = model_of(mlp, dtype)
    x = tokens(5, 64).to(dtype)
    expected, module = output(ffn(model, 1), x), ffn(model, 1)
    report = quantize_weights_(model, QuantizeConfig(storage=storage))
    assert ffn(model, 1) is module
    assert [entry.layer for entry in report.parts] == [0, 1, 2, 3]
    assert report.parts[1].after.startswith("192 neurons, ")
    assert report.after["gen"].bytes < least * report.before["gen"].bytes
    assert report.after["gen"].parameters == report.before["gen"].parameters
    assert 1e-4 < error(output(module, x), expected) < ERROR[storage]
    assert not is_packed(ffn(model, 1, "und").down_proj.weight)


@STORAGES
@pytest.mark.parametrize("shared", [0, 2])
def test_sparse_ffns_route_the_same_and_compute_nearly_the_same(storage: str, shared: int) -> None:
    model = model_of()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, num_shared_experts=shared))
    block = ffn(model, 1)
    nn.init.normal_(block.gate.weight, std=0.05)
    block.return_router_logits = True
    x = tokens(9, 64).bfloat16()
    expected, logits = block(x)
    report = quantize_weights_(model, QuantizeConfig(storage=storage, layers="middle"))
    assert [entry.layer for entry in report.parts] == [1, 2]
    assert ffn(model, 1) is block
    assert torch.equal(block(x)[1], logits)
    assert 1e-4 < error(block(x)[0].float(), expected.float()) < ERROR[storage]
    plain = SparseMoE(64, 192, 4, 2, shared, dtype=torch.bfloat16).requires_grad_(False)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x)[0], plain(x)[0])  # the same kernels on the unpacked weights
    assert block.active_backend == plain.active_backend
    assert torch.equal(copy.deepcopy(block)(x)[0], plain(x)[0])


def test_what_was_replaced_before_comes_back_whole() -> None:
    model = model_of()
    before = snapshot(model)
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    report = quantize_weights_(model, QuantizeConfig(component="both"))
    assert str(report).startswith("quantize_weights_: 8 parts changed (und ffn 0-3; gen ffn 0-3)")
    assert report.after == count_parameters(model)
    restore_(model)
    assert_same(before, snapshot(model))


def test_packed_weights_go_into_no_other_transform_and_take_no_state() -> None:
    model = model_of()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[1]))
    state = ffn(model, 1).state_dict()
    quantize_weights_(model, QuantizeConfig())
    with pytest.raises(ValueError, match=r"layer 2 .*gate_proj.weight must be a plain tensor"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[2]))
    for layers in ([1], [2]):
        with pytest.raises(ValueError, match=r"must be .*plain tensor.*Int8Tensor"):
            quantize_weights_(model, QuantizeConfig(layers=layers))
    with pytest.raises(RuntimeError, match=r"gate_proj must be a plain tensor to load into"):
        ffn(model, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="plain tensors to be viewed"):
        ffn(model, 1).official_views()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layer: setattr(layer, "mlp_moe_gen", EngineMLP(*SIZES)), "must be an nn.Linear"),
        (lambda layer: layer.mlp_moe_gen.to("meta"), "plain tensors in memory, got meta tensors"),
        (
            lambda layer: setattr(layer, "mlp_moe_gen", Bare(fc1=nn.Linear(2, 2))),
            "FFN must be dense",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is(change: Any, match: str) -> None:
    model = model_of()
    change(model.layers[2])
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        quantize_weights_(model, QuantizeConfig())
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="storage must be one of int8, fp8, got 'int4'"):
        QuantizeConfig(storage="int4")
    with pytest.raises(ValueError, match="component must be one of und, gen, both, got 'vit'"):
        QuantizeConfig(component="vit")
