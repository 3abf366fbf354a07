# SPDX-License-Identifier: Apache-2.0
"""Narrower FFNs of a live model: what is kept, and what is computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from prune_models import (
    HIDDEN,
    LAYERS,
    SUFFIX,
    WIDTH,
    assert_close,
    layer_of,
    outputs,
    small_bagel,
)
from swap_models import Model, TensorMLP, TupleMLP, ffn, tokens
from torch import Tensor

from sparse_unified import (
    PruneWidthConfig,
    prune_width_,
)
from sparse_unified.experts import Budget, keep_units, magnitude_scores
from sparse_unified.nn import SwiGLU

COMPONENTS = pytest.mark.parametrize("component", ["gen", "und"])


def projections(module: Any) -> list[Tensor]:
    return [getattr(module, name).weight for name in ("gate_proj", "up_proj", "down_proj")]


@COMPONENTS
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_pruned_neurons_are_as_if_their_output_were_zero(component: str, block_size: int) -> None:
    model = small_bagel()
    scores = torch.rand(LAYERS, WIDTH)
    config = PruneWidthConfig(component=component, keep_ratio=0.6, block_size=block_size)
    zeroed = copy.deepcopy(model)
    kept = keep_units(
        dict(enumerate(scores)), keep_ratio=0.6, budget=Budget.UNIFORM, block_size=block_size
    )
    for i in range(LAYERS):
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept[i]] = False
        with torch.no_grad():
            getattr(layer_of(zeroed, i), f"mlp{SUFFIX[component]}").down_proj.weight[:, gone] = 0
    prune_width_(model, config, {component: scores})
    assert_close(outputs(model), outputs(zeroed))


def test_weights_are_physically_shorter_and_keep_their_order_bit_for_bit() -> None:
    model = small_bagel()
    dense = projections(layer_of(model, 1).mlp_moe_gen)
    order = magnitude_scores(*dense).argsort(descending=True)[:48].sort().values
    prune_width_(model, PruneWidthConfig(layers=[1]))
    gate_proj, up_proj, down_proj = projections(layer_of(model, 1).mlp_moe_gen)
    assert torch.equal(gate_proj, dense[0][order])
    assert torch.equal(up_proj, dense[1][order])
    assert torch.equal(down_proj, dense[2][:, order])
    assert down_proj.is_contiguous()
    assert layer_of(model, 0).mlp_moe_gen.gate_proj.weight.shape == (WIDTH, HIDDEN)


@pytest.mark.parametrize(
    ("ratio", "block_size", "kept"),
    [(1.0, 1, 96), (0.5, 1, 48), (0.001, 1, 1), (0.001, 16, 16), (0.6, 32, 64), (0.75, 48, 96)],
)
def test_kept_widths_are_rounded_to_blocks(ratio: float, block_size: int, kept: int) -> None:
    model = small_bagel()
    prune_width_(model, PruneWidthConfig(keep_ratio=ratio, block_size=block_size))
    widths = {len(projections(layer_of(model, i).mlp_moe_gen)[0]) for i in range(LAYERS)}
    assert widths == {kept}


def test_a_global_budget_goes_where_the_scores_are() -> None:
    scores = torch.rand(LAYERS, WIDTH) * torch.tensor([1.0, 100.0, 1.0, 1.0])[:, None]
    scores[2, 1:] = 0  # one neuron does everything in layer 2
    model = small_bagel()
    config = PruneWidthConfig(keep_ratio=0.5, budget="global")
    prune_width_(model, config, scores)
    widths = [len(projections(layer_of(model, i).mlp_moe_gen)[0]) for i in range(LAYERS)]
    assert sum(widths) == LAYERS * WIDTH // 2
    assert widths[2] == 1
    # The scale of a layer's scores is not its importance.
    assert max(widths[0], widths[1], widths[3]) - min(widths[0], widths[1], widths[3]) < 30


def test_no_layer_is_emptied_by_a_global_budget() -> None:
    scores = {0: torch.rand(32), 1: torch.full((32,), -5.0)}
    kept = keep_units(scores, keep_ratio=0.01, budget=Budget.GLOBAL)
    assert [len(index) for index in kept.values()] == [1, 1]


@pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])
@COMPONENTS
def test_models_of_another_make_keep_their_return_convention(mlp: Any, component: str) -> None:
    model = Model(mlp)
    before = model(tokens(), tokens())
    prune_width_(model, PruneWidthConfig(component=component, keep_ratio=0.5))
    after = model(tokens(), tokens())
    changed = component == "gen"
    assert torch.equal(before[not changed], after[not changed])
    assert not torch.allclose(before[changed], after[changed])
    assert isinstance(ffn(model, 0, component)(tokens()), tuple) == (mlp is TupleMLP)


def test_dtype_mode_and_requires_grad_are_kept() -> None:
    model = small_bagel(dtype=torch.bfloat16)
    layer_of(model, 1).mlp_moe_gen.up_proj.requires_grad_(False)
    prune_width_(model, PruneWidthConfig(layers=[1]))
    narrow = layer_of(model, 1).mlp_moe_gen
    assert type(narrow) is SwiGLU
    assert not narrow.training
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in projections(narrow)] == [True, False, True]
