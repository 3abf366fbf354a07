# SPDX-License-Identifier: Apache-2.0
"""Adapters find layers, FFNs and components by structure, and say what they missed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import analysis_models as models
import pytest
import torch
from torch import nn

import sparse_unified
from sparse_unified.surgery.decoder import BlockNames, Layout, find_adapter


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
    assert adapter.components == ("text",)
    assert [ffn.module for ffn in adapter.ffns("text")] == [layer.mlp for layer in layers]
    assert host.get_submodule(adapter.ffns("text")[1].name) is layers[1].mlp
    assert adapter.block(0, "text").attention is layers[0].self_attn


def test_experts_of_a_mixture_are_ffns_of_their_own() -> None:
    model = models.Bailing()
    adapter = find_adapter(model)
    ffns = adapter.ffns("text")
    assert adapter.components == ("text",)
    assert adapter.block(1, "text").attention is model.model.layers[1].attention
    assert ffns[0].key == 0  # the first layer is dense
    in_layer_1 = [ffn for ffn in ffns if ffn.layer == 1]
    names = [*(f"model.layers.1.mlp.experts.{i}" for i in range(models.EXPERTS))]
    assert [ffn.key for ffn in in_layer_1] == [
        *((1, name) for name in names),
        (1, "model.layers.1.mlp.shared_experts"),
    ]
    assert all(ffn.module is model.get_submodule(ffn.name) for ffn in ffns)
    assert [ffn.intermediate_size for ffn in in_layer_1] == [models.WIDTH] * 4 + [2 * models.WIDTH]


def test_an_adapter_of_ones_own_is_a_few_lines() -> None:
    inner = models.Bailing()
    renamed = nn.Module()
    renamed.blocks = nn.ModuleList()
    for layer in inner.model.layers:
        block = nn.Module()
        block.attn, block.ff = layer.attention, layer.mlp
        block.norm1, block.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        renamed.blocks.append(block)
    names = BlockNames(ffn="ff", attention="attn", input_norm="norm1", post_attention_norm="norm2")
    layout = Layout(name="mine", paths=("blocks",), components={"text": names})
    adapter = find_adapter(renamed, [layout])
    assert adapter.ffns("text")[0].name == "blocks.0.ff"
    assert find_adapter(adapter) is adapter


def test_what_fits_nothing_or_is_not_there_is_an_error_that_names_what_was_found() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"model must .*mlp_moe_gen") as caught:
        find_adapter(model)
    assert "layers: 2 x Linear (none)" in str(caught.value)
    with pytest.raises(ValueError, match="got a int"):
        find_adapter(3)
    whole = models.bagel()
    adapter = find_adapter(whole)
    with pytest.raises(ValueError, match="component must be one of und, gen, got 'vision'"):
        adapter.ffns("vision")
    sparse_unified.skip_layers_(whole, sparse_unified.SkipLayersConfig(layers=[1]))
    with pytest.raises(ValueError, match=r"layer 1 .*must have the modules mlp, self_attn"):
        adapter.block(1, "und")
    fused = models.Bailing()
    fused.model.layers[1].mlp.experts = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="experts must be a list of modules, got a Linear"):
        find_adapter(fused).ffns("text")


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
