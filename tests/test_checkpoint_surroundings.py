# SPDX-License-Identifier: Apache-2.0
"""Whatever the model loader refuses around the FFNs, info lists and convert and prune refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_weights, make_autoencoder, make_dense
from prune_models import DEPTH, FEWER_HEADS, WIDTHS, load, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified import PruneWidthConfig
from sparse_unified.checkpoint import Checkpoint, convert, info, prune
from sparse_unified.convert.schema import check_model

VIT = "vit_model.vision_model.encoder.layers."
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


def renamed(weights: Weights, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


def without_vit_layer(directory: Path, layer: int) -> None:
    prefix = f"{VIT}{layer}."
    edit_weights(directory, lambda w: [w.pop(key) for key in list(w) if key.startswith(prefix)])


def narrower_keys(weights: Weights) -> None:
    key = "language_model.model.layers.2.self_attn.v_proj_moe_gen.weight"
    weights[key] = weights[key][:24].clone()


EDITS: list[tuple[Edit, str]] = [
    (lambda d: edit_config(d, num_attention_heads=4), "num_attention_heads must be 8 as the tens"),
    (lambda d: edit_config(d, num_attention_heads=16), "num_attention_heads must be 8 as the"),
    (lambda d: edit_config(d, num_attention_heads=7), "must be a multiple of num_attention_heads"),
    (lambda d: edit_config(d, num_attention_heads=None), "num_attention_heads must be a posit"),
    (lambda d: edit_config(d, num_key_value_heads=2), r"k_proj.weight \[32, 64\], not \[16, 64\]"),
    (lambda d: edit_config(d, num_key_value_heads=8), r"k_proj.weight \[32, 64\], not \[64, 64\]"),
    (lambda d: edit_config(d, num_key_value_heads=3), "must be a multiple of num_key_value_heads"),
    (lambda d: edit_config(d, num_key_value_heads=None), "num_key_value_heads must be a positive"),
    (lambda d: edit_weights(d, narrower_keys), r"v_proj_moe_gen.weight \[24, 64\], not \[32, 64\]"),
    (lambda d: edit_config(d, vocab_size=95), "vocab_size must be 96 as the tensors say, got 95"),
    (vit(num_hidden_layers=4), "num_hidden_layers must be 2 or 3 for weights of 2 layers, got 4"),
    (vit(num_hidden_layers=1), "num_hidden_layers must be 2 or 3 for weights of 2 layers, got 1"),
    (lambda d: without_vit_layer(d, 0), "vision transformer must be 0 to 1 .* got no 0"),
    (lambda d: (d / "vit_config.json").unlink(), "vit_config.json: file must be readable"),
    (
        vae(lambda w: renamed(w, "decoder.up.0.block.1.conv2.bias", "decoder.up.0.block.1.last.b")),
        "ae.safetensors: tensors must be .* got no decoder.up.0.block.1.conv2.bias",
    ),
    (
        vae(lambda w: renamed(w, "encoder.conv_in.weight", "encoder.stem.weight")),
        "ae.safetensors: encoder.conv_in.weight must be in the file",
    ),
    (
        vae(lambda w: renamed(w, "encoder.down.1.block.0.conv2.weight", "encoder.x")),
        "ae.safetensors: encoder.down.1.block.0.conv2.weight must be in the file",
    ),
    (
        vae(lambda w: w.update(more=torch.ones(1))),
        "ae.safetensors: tensors must be .* got more too",
    ),
    (
        vae(lambda w: w.update({"decoder.conv_out.bias": torch.ones(4)})),
        r"ae.safetensors: decoder.conv_out.bias must have shape \[3\], got \[4\]",
    ),
]


@pytest.mark.parametrize(("edit", "match"), EDITS)
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_what_the_loader_refuses_is_listed_and_not_converted(
    kind: str, edit: Edit, match: str, dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if kind == "dense":
        shutil.copytree(dense, source)
    else:
        prune(dense, source, [PruneWidthConfig(layers=[1], keep_ratio=0.5)])
    load(source)
    assert not info(source).problems
    edit(source)
    with pytest.raises(ValueError, match=r"."):
        load(source)
    if kind == "pruned" and "_proj" in match:
        match = "_proj.*: must have .* channels for the heads in sparse_unified.json, got shape"
    with pytest.raises(AssertionError, match=match):
        raise AssertionError("\n".join(info(source).problems))
    for write in (
        lambda: convert(source, tmp_path / "out", num_experts=4, top_k=2),
        lambda: prune(source, tmp_path / "out", [PruneWidthConfig(layers=[2])]),
    ):
        with pytest.raises(ValueError, match=r"must") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pruned_and_converted_checkpoints_stay_valid(dense: Path, tmp_path: Path) -> None:
    steps: list[list[Any]] = [WIDTHS, FEWER_HEADS, DEPTH, [*WIDTHS, *FEWER_HEADS, *DEPTH[:1]]]
    for number, modes in enumerate(steps):
        pruned = tmp_path / f"pruned{number}"
        prune(dense, pruned, modes)
        assert not check_model(Checkpoint(pruned))
        assert not info(pruned).problems
    convert(tmp_path / "pruned1", tmp_path / "sparse", num_experts=4, top_k=2)
    assert not info(tmp_path / "sparse").problems
    prune(tmp_path / "sparse", tmp_path / "again", DEPTH)
    assert not info(tmp_path / "again").problems


def test_a_file_that_holds_a_part_of_the_model_is_no_disagreement(
    dense: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    ffn = re.compile(r"language_model\..*\.mlp(_moe_gen)?\..*")
    edit_weights(source, lambda w: [w.pop(key) for key in list(w) if not ffn.fullmatch(key)])
    for name in ("vit_config.json", "ae.safetensors"):
        (source / name).unlink()
    edit_config(source, num_attention_heads=None, vocab_size=None)
    assert not info(source).problems


def test_unreadable_files_are_listed_once_beside_the_rest(dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    (source / "llm_config.json").write_text("{")
    (source / "ae.safetensors").write_bytes(b"cut")
    problems = info(source).problems
    assert sum("llm_config.json: file must be JSON" in problem for problem in problems) == 1
    assert sum("ae.safetensors" in problem for problem in problems) == 1


def test_every_missing_or_misshapen_tensor_of_an_autoencoder_is_seen(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", num_layers=1, width=16)
    whole = make_autoencoder()
    for key, tensor in whole.items():
        others = {name: other for name, other in whole.items() if name != key}
        for change in (
            {},
            {f"{key}x": tensor},
            {key: torch.ones(())},
            {key: torch.ones(5, *tensor.shape[1:])},
            {key: torch.ones(*tensor.shape, 1)},
        ):
            save_file(others | change, source / "ae.safetensors")
            problems = "\n".join(info(source).problems)
            assert "ae.safetensors: " in problems, (key, [*change])
            assert key in problems or key in change


def test_a_stray_number_in_a_key_makes_no_long_list(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", num_layers=1, width=16)
    for key in ("encoder.down.999999999.block.0.conv2.weight", "encoder.down.0.block.99999999.x"):
        save_file(make_autoencoder() | {key: torch.ones(32, 32, 3, 3)}, source / "ae.safetensors")
        assert info(source).problems == (
            f"ae.safetensors: tensors must be those of the model, got {key} too",
        )
