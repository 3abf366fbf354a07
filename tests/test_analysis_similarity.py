# SPDX-License-Identifier: Apache-2.0
"""Similarity is the cosine after the residual add, per component, and leaves the model alone."""

from __future__ import annotations

import analysis_models as models
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import nn

from sparse_unified.analysis import measure_similarity
from sparse_unified.analysis.similarity import Similarity


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
        x1 = x + layer.self_attn(normed)
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
    with measure_similarity(model, ["text"]) as measured:
        model(torch.arange(12)[None])
    result = measured.result()
    assert result.layers[1]["block"] == pytest.approx(1, abs=1e-6)
    assert result.redundant("text", 1) == (1,)
    assert result.redundant("text", 1, "ffn") == (1,)
    assert result.redundant("text", 3) == (0, 1, 2)
    assert result.redundant("text", 0) == ()
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
