# SPDX-License-Identifier: Apache-2.0
"""Counts of choices are those the blocks make, per time, and what follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import analysis_models as models
import pytest
import torch
from surgery_models import Model, TensorMLP, TupleMLP, ffn
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.analysis import (
    Settings,
    Task,
    built_in_samples,
    expert_usage,
)
from sparse_unified.analysis.expert_usage import LayerUsage, watch_experts
from sparse_unified.analysis.plots import usage_figure, write_usage_plot
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

QUICK = Settings(size=(32, 32), num_timesteps=6, max_length=4)
SMALL = ["--size", "32x32", "--steps", "6", "--samples", "1", "--quiet"]


def layer_usage(load: list[list[int]], top_k: int = 1) -> LayerUsage:
    counts = torch.tensor(load)
    return LayerUsage(
        component="gen", layer=0, top_k=top_k, tokens=counts.sum(1) // top_k, load=counts
    )


# What follows from the counts


def test_measures_of_known_loads() -> None:
    usage = layer_usage([[0, 0, 0, 0], [4, 0, 0, 0], [0, 4, 0, 0], [2, 2, 0, 0]])
    assert usage.share().tolist() == [0.5, 0.5, 0, 0]
    assert usage.dead_experts() == [2, 3]
    assert usage.entropy() == pytest.approx(0.5)  # log 2 / log 4
    entropy = usage.range_entropy().tolist()
    assert math.isnan(entropy[0])
    assert entropy[1:] == pytest.approx([0, 0, 0.5])
    assert usage.change().tolist() == [1, 0.5]
    plain = json.loads(json.dumps(usage.to_dict(), allow_nan=False))
    assert plain["range_entropy"][0] is None
    assert plain["change"] == [1, 0.5]


def test_even_and_empty_loads() -> None:
    even, empty = layer_usage([[2, 2, 2, 2]] * 3, top_k=2), layer_usage([[0, 0], [0, 0]])
    assert even.entropy() == pytest.approx(1)
    assert even.share().tolist() == [0.5] * 4
    assert even.change().tolist() == [0]
    assert even.dead_experts() == empty.dead_experts() == []
    assert math.isnan(empty.entropy())
    assert empty.to_dict()["share"] == [None, None]


# What is counted


def sparse_model(mlp: type[TensorMLP], component: str) -> Model:
    torch.manual_seed(0)
    model = Model(mlp)
    apply_moe_(
        model,
        MoEConfig(num_experts=4, top_k=2, component=component, router_init="random"),  # type: ignore[arg-type]
    )
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
    assert (first.layer, second.layer) == (1, 2)
    assert first.tokens.tolist() == [15, 10, 5]
    for row, part in enumerate((x, x[1:], x[:1])):
        expected = choices(block, part.reshape(-1, 8), block.gate.weight)
        assert torch.equal(first.load[row], expected)
    assert not second.tokens.any()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@torch.no_grad()
def test_vit_tokens_of_und_are_counted_by_their_own_router() -> None:
    model = sparse_model(TupleMLP, "und")
    block = ffn(model, 1, "und")
    block.gate_img.weight.neg_()
    x = torch.randn(6, 8)
    text, vit = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
    with watch_experts(model) as watch:
        expected_y = block(x, packed_text_indexes=text, packed_vit_token_indexes=vit)[0]
    expected = choices(block, x[text], block.gate.weight)
    expected += choices(block, x[vit], block.gate_img.weight)
    assert torch.equal(watch.usage().layers[0].load.sum(0), expected)
    assert torch.equal(block(x, text, vit)[0], expected_y)  # watching changes nothing
    logits, _, topk_idx = block.route(x, text, vit)
    assert torch.equal(logits, block(x, text, vit)[1])
    assert topk_idx.shape == (6, 2)


def test_what_cannot_be_counted_is_refused() -> None:
    dense, sparse = Model(TensorMLP), sparse_model(TensorMLP, "gen")
    for model, samples, options, message in (
        (dense, [1], {"run": print}, "model must have sparse FFNs of und or gen"),
        (sparse, [1], {"run": lambda _: None}, "any must send tokens through a sparse FFN of gen"),
        (sparse, [], {"run": print}, "samples must be at least one"),
        (sparse, [1], {}, "model must be a BagelPipeline, or come with run"),
        (sparse, [1], {"run": print, "num_time_ranges": 0}, "num_time_ranges must be"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_usage(model, "any", samples, **options)


# A pipeline


def test_generation_moves_through_the_times(tmp_path: Path) -> None:
    pipeline = models.pipeline(tmp_path / "model", "t2i_moe")
    seen: list[tuple[int, int]] = []
    samples = built_in_samples(Task.GENERATION, 2)
    usage = expert_usage(
        pipeline,
        "generation",
        samples,
        settings=QUICK,
        num_time_ranges=2,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
    for entry in usage.layers:
        assert entry.load.sum(1).tolist() == (entry.top_k * entry.tokens).tolist()
        if entry.component == "gen":
            assert entry.tokens[0] == 0
            assert (entry.tokens[1:] > 0).all()
    with pytest.raises(ValueError, match=r"task must be one of generation, .*got 'talk'"):
        expert_usage(pipeline, "talk", samples)
    figure = usage_figure(usage)
    panels = [axes for axes in figure.axes if axes.images and axes.get_ylabel() == "layer"]
    components = {entry.component for entry in usage.layers}
    assert len(panels) == 2 * len(components)
    first = usage.of(panels[0].get_title())[0]
    drawn = panels[0].images[0].get_array()[0]
    assert drawn.sum() == pytest.approx(first.num_experts)  # 1 each when even
    write_usage_plot(usage, tmp_path / "u.png")
    assert (tmp_path / "u.png").read_bytes()[:4] == b"\x89PNG"
