# SPDX-License-Identifier: Apache-2.0
"""Decoders of any make are found by structure, and made smaller for as long as a block runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import analysis_models as models
import pytest
import torch
from refusals import refused
from torch import nn

import sparse_unified
from sparse_unified.surgery import PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig, changed
from sparse_unified.surgery.decoder import as_module, find_adapter
from sparse_unified.surgery.others import read_attention


def test_bagel_has_two_components_and_the_live_weights() -> None:
    model = models.bagel()
    adapter = find_adapter(model)
    assert adapter.components == ("und", "gen")
    layers = model.language_model.model.layers
    assert adapter.num_layers() == len(layers)
    for component, name in (("und", "mlp"), ("gen", "mlp_moe_gen")):
        for i, (ffn, layer) in enumerate(zip(adapter.ffns(component), layers, strict=True)):
            assert ffn.key == i
            assert ffn.module is getattr(layer, name) is model.get_submodule(ffn.name)
            for projection in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(ffn.module, projection).weight
                assert getattr(ffn, projection).data_ptr() == weight.data_ptr()
    block, layer = adapter.block(1, "gen"), layers[1]
    assert (block.attention, block.ffn) == (layer.self_attn, layer.mlp_moe_gen)
    assert block.input_norm is layer.input_layernorm_moe_gen
    assert block.post_attention_norm is layer.post_attention_layernorm_moe_gen
    official = models.Official()
    for host in (official, SimpleNamespace(model=official)):
        found = find_adapter(host).ffns("gen")[2].module
        assert found is official.language_model.model.layers[2].mlp_moe_gen


@pytest.mark.parametrize("path", ["", "model", "model.language_model"])
def test_qwen_is_one_component_from_wherever_it_is_held(path: str) -> None:
    model = models.qwen()
    host = model.get_submodule(path)
    adapter = find_adapter(host)
    layers = model.model.language_model.layers
    assert adapter.components == ("und",)
    assert [ffn.module for ffn in adapter.ffns("und")] == [layer.mlp for layer in layers]
    assert host.get_submodule(adapter.ffns("und")[1].name) is layers[1].mlp
    assert adapter.block(0, "und").attention is layers[0].self_attn


def test_experts_of_a_mixture_are_ffns_of_their_own() -> None:
    model = models.Bailing()
    adapter = find_adapter(model)
    ffns = adapter.ffns("und")
    assert adapter.components == ("und",)
    assert adapter.block(1, "und").attention is model.model.layers[1].attention
    assert ffns[0].key == 0  # the first layer is dense
    in_layer_1 = [ffn for ffn in ffns if ffn.layer == 1]
    names = [*(f"model.layers.1.mlp.experts.{i}" for i in range(models.EXPERTS))]
    assert [ffn.key for ffn in in_layer_1] == [
        *((1, name) for name in names),
        (1, "model.layers.1.mlp.shared_experts"),
    ]
    assert all(ffn.module is model.get_submodule(ffn.name) for ffn in ffns)
    assert [ffn.intermediate_size for ffn in in_layer_1] == [models.WIDTH] * 4 + [2 * models.WIDTH]


def test_what_fits_nothing_or_is_not_there_is_an_error_that_names_what_was_found() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"model must .*mlp_moe_gen") as caught:
        find_adapter(model)
    assert "layers: 2 x Linear (none)" in str(caught.value)
    refused("got a int", find_adapter, 3)
    whole = models.bagel()
    adapter = find_adapter(whole)
    refused("component must be one of und, gen, got 'vision'", adapter.ffns, "vision")
    sparse_unified.skip_layers_(whole, sparse_unified.SkipLayersConfig(layers=[1]))
    refused(r"layer 1 .*must have the modules mlp, self_attn", adapter.block, 1, "und")
    fused = models.Bailing()
    fused.model.layers[1].mlp.experts = nn.Linear(2, 2)
    refused(
        "experts must be a list of modules, got a Linear", lambda: find_adapter(fused).ffns("und")
    )


def test_experts_of_a_sparse_block_are_ffns_of_their_own() -> None:
    model = models.bagel()
    width = model.language_model.model.layers[1].mlp_moe_gen.gate_proj.out_features
    how = sparse_unified.MoEConfig(num_experts=3, top_k=1, num_shared_experts=1)
    sparse_unified.apply_moe_(model, how)
    adapter = find_adapter(model)
    block: Any = model.language_model.model.layers[1].mlp_moe_gen
    assert len(adapter.ffns("und")) == adapter.num_layers()
    assert adapter.block(1, "gen").ffn is block
    experts = [ffn for ffn in adapter.ffns("gen") if ffn.layer == 1]
    prefix = "language_model.model.layers.1.mlp_moe_gen."
    names = ["shared_expert", "experts.0", "experts.1", "experts.2"]
    assert [ffn.key for ffn in experts] == [(1, prefix + name) for name in names]
    assert all(ffn.module is block and ffn.intermediate_size == width // 4 for ffn in experts)
    joined = torch.cat([ffn.down_proj for ffn in experts], 1)
    assert torch.equal(joined, block.down_proj)
    experts[1].up_proj[0, 0] = 5
    assert block.up_proj[width // 4, 0] == 5


# Smaller for a while

IDS = torch.arange(3, 15)[None]
DECODERS = pytest.mark.parametrize("make", [models.qwen, models.Bailing])
HEADS = PruneHeadsConfig(component="und")
OUTPUTS = ("o_proj", "dense", "down_proj")  # what attentions and FFNs end in


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def next_tokens(model: Any, *, cached: bool) -> list[int]:
    """The likeliest continuation, with a cache token by token, or without one."""
    from transformers import DynamicCache

    ids, cache = IDS, DynamicCache() if cached else None
    given = ids
    for _ in range(5):
        with torch.no_grad():
            if isinstance(model, models.Bailing):
                logits = model(given, cache)
            else:
                logits = model(given, past_key_values=cache, use_cache=cached).logits
        token = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        given = token if cached else ids
    return ids[0, IDS.shape[1] :].tolist()


def state(model: nn.Module) -> dict[str, Any]:
    """Parameters with their identities, modules, and what attentions call their numbers."""
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
    }
    parameters = {name: (id(p), p.tolist()) for name, p in model.named_parameters()}
    return {"modules": dict(model.named_modules()), "numbers": numbers, "parameters": parameters}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def zero(module: nn.Module) -> None:
    """Makes an attention, a FFN or a layer one that adds nothing."""
    for name, part in module.named_modules():
        if name.endswith(OUTPUTS):
            nn.init.zeros_(part.weight)


@pytest.mark.parametrize(
    ("make", "config", "text"),
    [
        (models.qwen, PruneWidthConfig(component="und"), "24 neurons -> 12 neurons"),
        (
            models.Bailing,
            PruneWidthConfig(component="und"),
            "24 neurons -> 12 neurons, 48 neurons -> 24 neurons",
        ),
        (models.qwen, HEADS, "4 query heads, 2 key heads -> 2 query heads, 1 key heads"),
        (models.qwen, SkipLayersConfig(layers=[0, 1]), "0-1 skipped"),
        (models.Bailing, SkipLayersConfig(layers=[1], part="ffn"), "ffn of 1 skipped"),
        (models.Bailing, SkipLayersConfig(layers=[1], part="attention"), "attention of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen"), "96 neurons -> 48 neurons"),
        (
            models.bagel,
            PruneHeadsConfig(component="both"),
            "4 query heads, 2 key heads -> 2 query heads, 1 key heads",
        ),
        (models.bagel, SkipLayersConfig(layers=[1], part="attention"), "attention of 1 skipped"),
        (models.bagel, PruneWidthConfig(component="gen", keep_ratio=1), "nothing"),
    ],
)
def test_a_model_is_changed_for_as_long_as_the_block_runs(
    make: Any, config: Any, text: str
) -> None:
    model = make()
    before, whole = state(model), count(model)
    scores = None
    if config.mode == "width":
        ffns = find_adapter(model).ffns("gen" if make is models.bagel else "und")
        scores = {ffn.key: torch.rand(ffn.intermediate_size) for ffn in ffns}
    for given in (scores, None):
        with changed(model, config, given, forward=lambda: run(model)) as said:
            assert said == text
            assert (text == "nothing") == (count(model) == whole)
        assert state(model) == before
    with (
        pytest.raises(RuntimeError, match="stop"),
        changed(model, config, forward=lambda: run(model)),
    ):
        raise RuntimeError("stop")
    assert state(model) == before


@DECODERS
def test_narrower_ffns_are_those_with_the_other_neurons_at_zero(make: Any) -> None:
    model, masked = make(), make()
    ffns = find_adapter(model).ffns("und")
    scores = {ffn.key: torch.zeros(ffn.intermediate_size) for ffn in ffns}
    for ffn, same in zip(ffns, find_adapter(masked).ffns("und"), strict=True):
        scores[ffn.key][::3] = 1
        same.down_proj[:, scores[ffn.key] == 0] = 0
    dense, whole = run(model), count(model)
    of_ffns = sum(3 * ffn.intermediate_size * models.HIDDEN for ffn in ffns)
    with changed(model, PruneWidthConfig(component="und", keep_ratio=1 / 3), scores):
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert (run(model) - dense).abs().max() > 1e-4
        assert count(model) == whole - of_ffns * 2 // 3
    assert torch.equal(run(model), dense)


@DECODERS
@pytest.mark.parametrize("part", ["block", "attention", "ffn"])
@pytest.mark.parametrize("gone", [[0], [0, 2]])
def test_skipped_parts_are_not_run_and_add_nothing(make: Any, part: str, gone: list[int]) -> None:
    model = make()
    adapter = find_adapter(model)
    blocks = [adapter.block(i, "und") for i in range(models.LAYERS)]
    dense, ran = run(model), []
    for i, block in enumerate(blocks):
        modules = {
            "block": [block.layer_module],
            "attention": [block.attention, block.input_norm],
            "ffn": [block.ffn, block.post_attention_norm],
        }
        for module in modules[part]:
            module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with changed(model, SkipLayersConfig(layers=gone, part=part), forward=lambda: run(model)):
        ran.clear()
        without = run(model)
        assert set(ran) == set(range(models.LAYERS)) - set(gone)
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        if part != "block":
            assert [adapter.holds(i, "und") for i in range(3)] == [i not in gone for i in range(3)]
        if part == "ffn":
            assert {ffn.layer for ffn in adapter.ffns("und")} == set(range(3)) - set(gone)
    assert torch.equal(run(model), dense)
    for i in gone:
        zero(getattr(blocks[i], {"block": "layer_module"}.get(part, part)))
    torch.testing.assert_close(run(model), without, rtol=0, atol=1e-6)


@DECODERS
@pytest.mark.parametrize("kept", [0, 1])
def test_dropped_heads_are_those_with_their_output_at_zero(make: Any, kept: int) -> None:
    model, masked = make(), make()
    for each in (model, masked):
        for layer in (0, 2):  # the group that matters: values count
            attention = read_attention(find_adapter(each), "und", layer)
            assert (attention.groups, attention.queries) == (2, 2)
            linear, start = attention.inputs[2]
            rows = slice(start + kept * attention.size, start + (kept + 1) * attention.size)
            linear.weight.data[rows] *= 5
            if each is masked:
                attention.output.weight.data.unflatten(1, (2, -1))[:, 1 - kept] = 0
    dense, whole = run(model), count(model)
    with changed(model, PruneHeadsConfig(component="und", layers=[0, 2])):
        torch.testing.assert_close(run(model), run(masked), rtol=0, atol=1e-6)
        assert (run(model) - dense).abs().max() > 1e-4
        assert next_tokens(model, cached=True) == next_tokens(model, cached=False)
        smaller = read_attention(find_adapter(model), "und", 0)
        assert (smaller.groups, smaller.queries) == (1, 2)
        assert count(model) < whole
    assert torch.equal(run(model), dense)


def _several_kinds(attention: Any) -> None:
    attention.sliding_window = 8


@pytest.mark.parametrize(
    ("change", "config", "match"),
    [
        (None, SkipLayersConfig(layers="all"), "a layer must be left .* got 3 to leave out"),
        (None, SkipLayersConfig(layers="all", part="attention"), "an attention must be left"),
        (_several_kinds, SkipLayersConfig(layers=[1]), "attentions of one kind, because"),
        (_several_kinds, SkipLayersConfig(layers=[1], part="attention"), "attentions of one kind"),
        (lambda a: setattr(a, "gates", nn.Linear(4, 4)), HEADS, "layer 2: .* gates"),
        (lambda a: setattr(a, "head_dim", 3), HEADS, "whole groups of heads .*head_dim 3"),
        (lambda a: setattr(a, "q_proj", None), HEADS, r"must have .* in q_proj, k_proj"),
    ],
)
def test_what_cannot_be_done_is_refused(change: Any, config: Any, match: str) -> None:
    model = models.qwen()
    if change is not None:
        change(find_adapter(model).block(2, "und").attention)
    before = state(model)
    with pytest.raises(ValueError, match=match), changed(model, config, forward=lambda: run(model)):
        pass
    assert state(model) == before


def test_parts_that_are_not_run_are_refused() -> None:
    model, config = models.qwen(), SkipLayersConfig(layers=[1], part="ffn")
    for forward, match in ((None, "forward must be given"), (lambda: None, "must run every part")):
        with pytest.raises(ValueError, match=match), changed(model, config, forward=forward):
            pass
    assert as_module(SimpleNamespace(model=model)) is model
    refused("must be a module or hold one as `model`, got int", as_module, 3, error=TypeError)
