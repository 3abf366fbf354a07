# SPDX-License-Identifier: Apache-2.0
"""Descriptions: shapes decide, JSON is checked against them, illegal values are refused."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from bagel_models import SPECIAL
from moe_cases import GOLDEN
from refusals import refused

from sparse_unified.bagel import AutoEncoder, BagelConfig, LLMConfig, VAEConfig
from sparse_unified.bagel.config import SpecialTokens, read_config, vae_config
from sparse_unified.checkpoint.model_dir import LayerShape
from sparse_unified.testing import build_vae, read_case

CASE = read_case(GOLDEN / "t2i_moe")
LLM, VIT = CASE.fields["llm_config"], CASE.fields["vit_config"]
WHOLE = LLMConfig.from_json(LLM)
HEADS = LayerShape(ffn=8, kv_heads=(0,), query_groups=(0,))
SPARSE = WHOLE.with_experts("gen", [1], num_experts=4, top_k=2).layer(1, "gen")


def describe(
    specs: Any = MappingProxyType({}),
    llm: Any = MappingProxyType({}),
    vit: Any = MappingProxyType({}),
    *,
    layers: Any = MappingProxyType({"gen": {1: SPARSE}}),
    top_k: int | None = 2,
    latent_channels: int = 4,
    **options: Any,
) -> BagelConfig:
    checkpoint = SimpleNamespace(
        specs={key: own for key, own in {**CASE.weights, **specs}.items() if own is not None},
        llm_config={**LLM, **llm},
        vit_config={**VIT, **vit},
        shapes=layers,
        top_k=top_k,
        directory="model",
    )
    vae = VAEConfig(z_channels=latent_channels)
    return read_config(checkpoint, vae, **{"special_tokens": SPECIAL, **options})


def first(**change: Any) -> LLMConfig:
    """A model whose first und layer is odd."""
    return replace(WHOLE, layers={"und": {0: replace(HEADS, **change)}})


def test_shapes_say_what_json_does_not() -> None:
    config = describe()
    assert (config.latent_patch_size, config.max_latent_size) == (2, 8)
    assert config.vit_max_num_patch_per_side == 8
    assert config.vision.num_hidden_layers == 2
    assert (config.latent_downsample, config.token_channels) == (16, 16)
    assert config.llm.sparse_layers("gen") == {1: SPARSE.ffn}
    assert config.llm.layers == {"gen": {1: SPARSE}}
    whole = {n: WHOLE.layer(n, "und") for n in range(3)}
    assert describe(layers={"und": whole}).llm.layers == {}
    # The file may count the layer that is left out.
    assert describe(vit={"num_hidden_layers": 3}).vision.num_hidden_layers == 2
    source = {key: value for key, value in LLM.items() if key != "rope_theta"}
    nested = LLMConfig.from_json({**source, "rope_parameters": {"rope_theta": 5e5}})
    assert nested.rope_theta == 5e5


def test_autoencoder_is_read_off_its_shapes() -> None:
    for config in (
        build_vae(read_case(GOLDEN / "vae")).config,
        VAEConfig(ch=32, ch_mult=(1, 2, 4), num_res_blocks=2, z_channels=5),
    ):
        vae = AutoEncoder(config, device="meta")
        assert vae_config(vae.state_dict()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: describe(llm={"hidden_act": "gelu"}), "hidden_act must be 'silu', got 'gelu'"),
        (lambda: describe(llm={"rope_scaling": {"factor": 2}}), "rope_scaling must be None"),
        (lambda: describe(llm={"use_sliding_window": True}), "use_sliding_window must be False"),
        (lambda: describe(llm={"rope_theta": None}), "llm_config.json: rope_theta must be given"),
        (lambda: describe(llm={"hidden_size": 0}), "hidden_size must be an integer"),
        (lambda: describe(llm={"num_key_value_heads": 3}), "multiple of num_key"),
        (lambda: describe(llm={"hidden_size": 36}), "must be even"),
        (lambda: describe(vit={"hidden_act": "relu"}), "hidden_act must be 'gelu_pytorch_tanh'"),
        (lambda: describe(vit={"num_hidden_layers": 4}), "num_hidden_layers must be 2 or 3"),
        (lambda: describe(vit={"patch_size": None}), "vit_config.json: patch_size must be given"),
        (lambda: describe(stated={"max_latent_size": 64}), "must be 8 as .* got 64"),
        (lambda: describe(stated={"interpolate_pos": True}), "interpolate_pos must be False"),
        (lambda: describe(top_k=None), "top_k must be from 1 to the 4 experts of layer 1 of gen"),
        (lambda: describe(latent_channels=17), "latent_patch_size must be an integer from 1"),
        (lambda: describe({"vae2llm.weight": None}), r"vae2llm\.weight must be in the file"),
        (
            lambda: describe({"vae2llm.weight": CASE.weights["vae2llm.bias"]}),
            r"must have 2 dimensions .* \[32\]",
        ),
        (lambda: describe(special_tokens=SpecialTokens()), "bos must be an id below vocab_size"),
        (lambda: first(kv_heads=(9,)), "KV heads of layer 0 of und must be below"),
        (lambda: first(ffn=-1), "width of layer 0 of und must be 0 to"),
        (lambda: VAEConfig(ch=20), "multiples of 32, the groups of its norms"),
        (lambda: VAEConfig(ch_mult=()), "for at least one resolution, got 128 "),
        (lambda: describe().token_grid(60, 64), "height must be a positive multiple of 16"),
        (lambda: describe().token_grid(64, 144), "width must be .* up to 128, got 144"),
        (lambda: describe().token_grid(64.0, 64), "height must be a positive multiple of 16"),
    ],
)
def test_illegal_sizes_and_disagreements_are_refused(make: Any, message: str) -> None:
    refused(message, make)


def test_sparse_layers_are_copied_from_the_caller() -> None:
    layers = {1: replace(WHOLE.layer(1, "gen"), ffn=0)}
    config = replace(WHOLE, layers={"gen": layers})
    layers.clear()
    assert config.layer(1, "gen").width == 0
