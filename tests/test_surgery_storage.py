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
from sparse_unified.nn.expert_state import is_packed, unpacked
from sparse_unified.surgery.storage import ffn_bytes

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
@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP, MergedMLP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_ffns_compute_nearly_the_same(storage: str, mlp: Any, dtype: torch.dtype) -> None:
    model = model_of(mlp, dtype)
    x = tokens(5, 64).to(dtype)
    expected, module, size = output(ffn(model, 1), x), ffn(model, 1), ffn_bytes(ffn(model, 1))
    report = quantize_weights_(model, QuantizeConfig(storage=storage))
    assert ffn(model, 1) is module
    assert [entry.layer for entry in report.layers] == [0, 1, 2, 3]
    assert report.layers[1].bytes_before == size
    assert report.layers[1].bytes_after < size * (0.6 if dtype is torch.bfloat16 else 0.3)
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
    assert [entry.layer for entry in report.layers] == [1, 2]
    assert ffn(model, 1) is block
    assert torch.equal(block(x)[1], logits)
    assert 1e-4 < error(block(x)[0].float(), expected.float()) < ERROR[storage]
    plain = SparseMoE(64, 192, 4, 2, shared, dtype=torch.bfloat16)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x)[0], plain(x)[0])  # the same kernels on the unpacked weights
    assert block.active_backend == plain.active_backend
    assert torch.equal(copy.deepcopy(block)(x)[0], plain(x)[0])


def test_what_was_replaced_before_comes_back_whole() -> None:
    model = model_of()
    before = snapshot(model)
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    counts = count_parameters(model)["gen"]
    report = quantize_weights_(model, QuantizeConfig(component="both"))
    saved = sum(e.bytes_before - e.bytes_after for e in report.layers if e.component == "gen")
    after = count_parameters(model)["gen"]
    assert (after.bytes, after.parameters) == (counts.bytes - saved, counts.parameters)
    assert {entry.component for entry in report.layers} == {"und", "gen"}
    assert "8 FFNs stored as int8" in str(report)
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
        (lambda layer: setattr(layer, "mlp_moe_gen", Bare(fc1=nn.Linear(2, 2))), "FFN must have"),
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


def test_plain_weights_unpack_to_themselves() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    assert unpacked(weight) is weight
