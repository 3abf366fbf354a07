# SPDX-License-Identifier: Apache-2.0
"""Whatever the model loader refuses, info lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_weights
from prune_models import load, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified import PruneWidthConfig
from sparse_unified.checkpoint import convert, info, prune

Weights = dict[str, Tensor]
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


def vit(**fields: Any) -> Edit:
    """Sets fields of vit_config.json."""

    def edit(directory: Path) -> None:
        path = directory / "vit_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def vae(change: Callable[[Weights], object]) -> Edit:
    """Changes the tensors of ae.safetensors."""

    def edit(directory: Path) -> None:
        weights = load_file(directory / "ae.safetensors")
        change(weights)
        save_file(weights, directory / "ae.safetensors")

    return edit


EDITS: dict[str, Edit] = {
    "must be a multiple of num_attention_heads = 7": lambda d: edit_config(
        d, num_attention_heads=7
    ),
    r"k_proj.weight \[32, 64\], not \[64, 64\]": lambda d: edit_config(d, num_key_value_heads=8),
    r"embed_tokens.weight \[96, 64\], not \[95, 64\]": lambda d: edit_config(d, vocab_size=95),
    "num_hidden_layers must be 2 or 3 for weights of 2 layers": vit(num_hidden_layers=4),
    "vit_config.json: file must be readable": lambda d: (d / "vit_config.json").unlink(),
    "got missing llm2vae.bias": lambda d: edit_weights(d, lambda w: w.pop("llm2vae.bias")),
    "got extra lora": lambda d: edit_weights(d, lambda w: w.update(lora=torch.ones(1))),
    "ae.safetensors: .* extra more": vae(lambda w: w.update(more=torch.ones(1))),
    "ae.safetensors: .* missing decoder": vae(lambda w: w.pop("decoder.norm_out.bias")),
}


@pytest.mark.parametrize("match", EDITS)
def test_what_the_loader_refuses_is_listed(match: str, dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    prune(dense, source, [PruneWidthConfig(layers=[1], keep_ratio=0.5)])
    load(source)
    assert not info(source).problems
    EDITS[match](source)
    with pytest.raises(ValueError, match=r"."):
        load(source)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError("\n".join(info(source).problems))


@pytest.mark.parametrize("count", [0, 10**9, "three", None])
def test_a_number_of_layers_that_is_none_is_refused(
    count: object, dense: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    config = json.loads((source / "llm_config.json").read_text())
    (source / "llm_config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    assert any("num_hidden_layers must be" in problem for problem in info(source).problems)
    with pytest.raises(ValueError, match="num_hidden_layers must be"):
        convert(source, tmp_path / "out", num_experts=4, top_k=2)
