# SPDX-License-Identifier: Apache-2.0
"""Counts of choices are those the blocks make, per time, and what follows from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from refusals import refused
from surgery_models import Model, TensorMLP, TupleMLP, ffn
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.analysis import (
    Settings,
    Task,
    built_in_samples,
    expert_usage,
)
from sparse_unified.analysis.expert_usage import layer_usage, watch_experts
from sparse_unified.analysis.plots import usage_figure
from sparse_unified.bagel import BagelPipeline
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

QUICK = Settings(size=(32, 32), num_timesteps=6, max_length=4)


# What follows from the counts


def test_measures_of_known_loads() -> None:
    load = torch.tensor([[0, 0, 0, 0], [4, 0, 0, 0], [0, 4, 0, 0], [2, 2, 0, 0]])
    usage = layer_usage("gen", 0, 1, load)
    assert usage["tokens"] == [0, 4, 4, 4]
    assert usage["share"] == [0.5, 0.5, 0, 0]
    assert usage["dead_experts"] == [2, 3]
    assert usage["entropy"] == pytest.approx(0.5)  # log 2 / log 4
    assert usage["range_entropy"] == [None, pytest.approx(0), pytest.approx(0), pytest.approx(0.5)]
    assert usage["change"] == [1, 0.5]
    even = layer_usage("gen", 0, 2, torch.tensor([[2, 2, 2, 2]] * 3))
    assert even["entropy"] == pytest.approx(1)
    assert even["share"] == [0.5] * 4
    assert even["change"] == [0]
    empty = layer_usage("gen", 0, 1, torch.zeros(2, 2, dtype=torch.int64))
    assert even["dead_experts"] == empty["dead_experts"] == []
    assert empty["entropy"] is None
    assert empty["share"] == [None, None]
    json.dumps(empty, allow_nan=False)


# What is counted


def sparse_model(mlp: type[TensorMLP], component: str) -> Model:
    torch.manual_seed(0)
    model = Model(mlp)
    how: Any = {"component": component, "router_init": "random"}
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, **how))
    return model


def choices(block: SparseMoE, x: Tensor, router: Tensor) -> Tensor:
    topk_idx = reference.route_topk(x, router, block.top_k)[2]
    return torch.bincount(topk_idx.flatten().long(), minlength=block.num_experts)


@torch.no_grad()
def test_counts_are_the_choices_of_the_block_in_the_range_of_the_time() -> None:
    model = sparse_model(TensorMLP, "gen")
    block = ffn(model, 1)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    x = torch.randn(3, 5, 8)
    with watch_experts(model, num_time_ranges=2) as watch:
        block(x)
        watch.set_time(0.9)
        block(x[:1])
        watch.set_time(0.5)
        block(x[1:])
    block(x)  # no longer watched
    (first, second) = watch.usage().layers
    assert (first["layer"], second["layer"]) == (1, 2)
    assert first["tokens"] == [15, 10, 5]
    for row, part in enumerate((x, x[1:], x[:1])):
        expected = choices(block, part.reshape(-1, 8), block.gate.weight)
        assert first["load"][row] == expected.tolist()
    assert not any(second["tokens"])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@torch.no_grad()
def test_vit_tokens_of_und_are_counted_by_their_own_router() -> None:
    model = sparse_model(TupleMLP, "und")
    block = ffn(model, 1, "und")
    block.gate_img.weight.neg_()
    x = torch.randn(6, 8)
    text, vit = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    with watch_experts(model) as watch:
        watched_y = block(x, packed_text_indexes=text, packed_vit_token_indexes=vit)[0]
    expected = choices(block, x[text], block.gate.weight)
    expected += choices(block, x[vit], block.gate_img.weight)
    assert watch.usage().layers[0]["load"][0] == expected.tolist()
    assert torch.equal(block(x, text, vit)[0], watched_y)  # watching changes nothing


def test_what_cannot_be_counted_is_refused() -> None:
    dense, sparse = Model(TensorMLP), sparse_model(TensorMLP, "gen")
    for model, samples, options, message in (
        (dense, [1], {"run": print}, "model must have sparse FFNs of und or gen"),
        (sparse, [1], {"run": lambda _: None}, "any must send tokens through a sparse FFN of gen"),
        (sparse, [], {"run": print}, "samples must be at least one"),
        (sparse, [1], {}, "model must be a BagelPipeline, or come with run"),
        (sparse, [1], {"run": print, "num_time_ranges": 0}, "num_time_ranges must be"),
    ):
        refused(message, expert_usage, model, "any", samples, **options)


# A pipeline


def test_generation_moves_through_the_times(golden: Any) -> None:
    pipeline = BagelPipeline.from_pretrained(golden("t2i_moe"))
    seen: list[tuple[int, int]] = []
    samples = built_in_samples(Task.GENERATION, 2)
    how: Any = {"settings": QUICK, "num_time_ranges": 2, "progress": lambda *at: seen.append(at)}
    usage = expert_usage(pipeline, "generation", samples, **how)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    for own in usage.layers:
        assert [sum(row) for row in own["load"]] == [own["top_k"] * n for n in own["tokens"]]
        if own["component"] == "gen":
            assert own["tokens"][0] == 0
            assert all(own["tokens"][1:])
    with pytest.raises(ValueError, match=r"task must be one of generation, .*got 'talk'"):
        expert_usage(pipeline, "talk", samples)
    figure = usage_figure(usage)
    panels = [axes for axes in figure.axes if axes.images and axes.get_ylabel() == "layer"]
    assert len(panels) == 2 * len({own["component"] for own in usage.layers})
    drawn = panels[0].images[0].get_array()[0]
    assert drawn.sum() == pytest.approx(usage.layers[0]["num_experts"])  # 1 each when even
