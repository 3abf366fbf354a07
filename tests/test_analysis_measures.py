# SPDX-License-Identifier: Apache-2.0
"""Choices of experts, similarity of layers and costs are those of a real forward pass."""

from __future__ import annotations

import json
from typing import Any

import analysis_models as models
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from surgery_models import Model, TensorMLP, TupleMLP, ffn
from torch import Tensor, nn

import sparse_unified
from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.analysis import (
    Settings,
    Task,
    built_in_samples,
    expert_usage,
    measure_similarity,
)
from sparse_unified.analysis.criteria import Similarity
from sparse_unified.analysis.evaluators import ActivationMemory, measure_cost
from sparse_unified.analysis.expert_usage import layer_usage, watch_experts
from sparse_unified.analysis.plots import usage_figure
from sparse_unified.bagel import BagelPipeline
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.ops import reference

# Choices of experts

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


# Cosines after the residual add


@torch.no_grad()
def test_cosines_are_those_of_the_residual_stream_of_each_component() -> None:
    model = models.Official()
    x = torch.randn(7, models.HIDDEN)
    text, vae = torch.tensor([0, 1, 6]), torch.tensor([2, 3, 4, 5])
    with measure_similarity(model) as measured:
        expected_out = model(x, text, vae)
    result = measured.result()

    for index, layer in enumerate(model.language_model.model.layers):
        normed = torch.zeros_like(x)
        normed[text], normed[vae] = (
            layer.input_layernorm(x[text]),
            layer.input_layernorm_moe_gen(x[vae]),
        )
        x1 = x + layer.self_attn(normed[None])[0][0]
        y = layer(x, text, vae)
        for component, rows in (("und", text), ("gen", vae)):
            (entry,) = (
                e for e in result.layers if (e["component"], e["layer"]) == (component, index)
            )
            assert entry["tokens"] == len(rows)
            for part, pair in (("block", (x, y)), ("attention", (x, x1)), ("ffn", (x1, y))):
                cosine = F.cosine_similarity(*(own[rows] for own in pair), dim=-1).mean()
                assert entry[part] == pytest.approx(float(cosine), abs=1e-6)
        x = y
    assert torch.equal(x, expected_out)


@torch.no_grad()
def test_passes_add_up_to_the_mean_over_all_tokens() -> None:
    model = models.Bailing()
    ids = torch.randint(3, 60, (1, 9))
    runs = []
    for parts in ([ids, ids[:, :4]], [ids], [ids[:, :4]]):
        with measure_similarity(model) as measured:
            for part in parts:
                model(part)
        runs.append(measured.result().layers)
    for both, first, second in zip(*runs, strict=True):
        assert both["tokens"] == 13
        mean = (9 * first["block"] + 4 * second["block"]) / 13
        assert both["block"] == pytest.approx(mean, abs=1e-9)


@torch.no_grad()
def test_a_layer_that_adds_nothing_is_the_first_to_go() -> None:
    model = models.Bailing()
    for name, weight in model.model.layers[1].named_parameters():
        if "down_proj" in name or "dense" in name:
            weight.zero_()
    with measure_similarity(model, ["und"]) as measured:
        model(torch.arange(12)[None])
    result = measured.result()
    assert result.layers[1]["block"] == pytest.approx(1, abs=1e-6)
    assert result.redundant("und", 1) == (1,)
    assert result.redundant("und", 1, "ffn") == (1,)
    assert result.redundant("und", 3) == (0, 1, 2)
    assert result.redundant("und", 0) == ()
    assert "component  layer" in result.to_text()


@torch.no_grad()
def test_a_component_that_saw_nothing_is_left_out_and_hooks_are_gone() -> None:
    model = models.bagel()
    with measure_similarity(model) as measured:
        refused("model must run on tokens", measured.result)
        model.prefill_text(model.new_contexts(1), [[10, 11]])
    result = measured.result()
    assert {entry["component"] for entry in result.layers} == {"und"}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for other, components, message in (
        (model, ["vision"], "component must be one of und, gen"),
        (nn.Linear(2, 2), None, "model must have decoder layers"),
    ):
        with pytest.raises(ValueError, match=message), measure_similarity(other, components):
            pass
    own = measured.result().layers[0]
    broken = Similarity(layers=({**own, "block": float("nan")},))
    for count, message in ((-1, "count of layers"), (2, "count of layers"), (1, "must be finite")):
        refused(message, broken.redundant, "und", count)


# Costs


def cost_of(model: nn.Module, x: Tensor) -> Any:
    return measure_cost(model, lambda: lambda: model(x), repeats=1)


class Pruned(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return sparse_unified.ops.pruned_ffn(x, torch.tensor([0, 4]).int(), *weights, 16)


class Attend(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize(
    ("make", "shape", "flops"),
    [
        (lambda: SwiGLU(32, 96), (10, 32), 6 * 10 * 32 * 96),  # in our own kernel
        (lambda: SwiGLU(32, 96), (7, 32), 6 * 7 * 32 * 96),
        # Idle experts are not counted, nor are pruned blocks.
        (lambda: SparseMoE(32, 96, 4, 2), (37, 32), 6 * 37 * 2 * 24 * 32 + 2 * 37 * 4 * 32),
        (lambda: Pruned(32, 96), (10, 32), 6 * 10 * 2 * 16 * 32),
        (Attend, (1, 4, 7, 16), 4 * 4 * 7 * 7 * 16),
    ],
)
def test_flops_and_bytes_are_their_formula(make: Any, shape: Any, flops: int) -> None:
    model = make()
    found = cost_of(model, torch.randn(shape))
    assert found.flops == flops
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == 4 * found.parameters
    assert found.seconds > 0
    if shape == (7, 32):
        # silu, up and their product, each [7, 96], are alive together; the gate's before it.
        assert found.peak_bytes == found.weight_bytes + 4 * 3 * 7 * 96


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
