# SPDX-License-Identifier: Apache-2.0
"""Decoders of transformers that were changed: what they compute stays, on disk and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_unified import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.analysis import StatisticsConfig, collect, score
from sparse_unified.surgery import from_pretrained, save_pretrained

IDS = torch.arange(3, 15)[None]
MOE = MoEConfig(component="und", num_experts=4, top_k=2, layers="all")


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def skip(model: Any, part: str) -> Any:
    config = SkipLayersConfig(component="und", layers=[1], part=part)
    return skip_layers_(model, config, forward=lambda: model(input_ids=IDS))


CHANGES = {
    "moe": lambda m: apply_moe_(m, MOE),
    "shared": lambda m: apply_moe_(
        m, MoEConfig(component="und", num_experts=5, top_k=2, num_shared_experts=1, layers=[0, 2])
    ),
    "width": lambda m: prune_width_(m, PruneWidthConfig(component="und", keep_ratio=0.5)),
    "heads": lambda m: prune_heads_(m, PruneHeadsConfig(component="und", keep_ratio=0.5)),
    "block": lambda m: skip(m, "block"),
    "attention": lambda m: skip(m, "attention"),
    "ffn": lambda m: skip(m, "ffn"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_decoder_comes_back_from_disk_and_is_restored(name: str, tmp_path: Path) -> None:
    model = qwen2()
    dense = logits(model)
    CHANGES[name](model)
    with torch.no_grad():  # as trained since
        for n, parameter in model.named_parameters():
            if "gate.weight" in n:
                parameter.normal_()
    expected = logits(model)
    assert not torch.equal(expected, dense)
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    # With its caches too.
    ids = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*ids)
    save_pretrained(loaded, tmp_path / "again")
    files = [load_file(tmp_path / p / "model.safetensors") for p in ("saved", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    restore_(model)
    assert torch.equal(logits(model), dense)


def test_heads_of_a_decoder_pass_over_blocks_that_are_left_out() -> None:
    model = qwen2()
    skip(model, "block")
    heads = PruneHeadsConfig(component="und", keep_ratio=0.5, layers="all")
    layers = {part.layer for part in prune_heads_(model, heads).parts}
    assert layers == set(range(len(model.model.layers))) - {1}
    with pytest.raises(ValueError, match="layers must have a und attention, got 1, which skip it"):
        prune_heads_(model, PruneHeadsConfig(component="und", layers=[1]))


def test_every_parameter_of_a_text_decoder_is_used() -> None:
    """A parameter without a gradient stops DDP."""
    model = qwen2()
    apply_moe_(model, MOE)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_scores_of_a_decoder_go_into_the_transforms_as_they_are() -> None:
    model = qwen2()
    with torch.no_grad(), collect(model, "text", config=StatisticsConfig()) as collector:
        collector.begin("all")
        model(input_ids=IDS)
    scores = score("wanda", model, collector.statistics())
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5), scores)
    apply_moe_(model, MoEConfig(component="und", num_experts=4, top_k=4, layers="all"))


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    model = qwen2()
    with pytest.raises(ValueError, match="component must be 'und' for a decoder of one component"):
        prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    apply_moe_(model, MOE)
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "experts.3" in key)
    save_file({k: t for k, t in tensors.items() if k != key}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensors must be those of the model, got .*{key}"):
        from_pretrained(tmp_path)
    (tmp_path / "sparse_unified_decoder.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="must be as save_pretrained writes it"):
        from_pretrained(tmp_path)
