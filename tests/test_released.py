# SPDX-License-Identifier: Apache-2.0
"""Checkpoints laid out as the released sparse ones load, by path and by hub id, into any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released_files import SMALL, Released, make_tensor, write_released
from surgery_models import Bare, Model, TensorMLP, TupleMLP, tokens
from torch import nn

from sparse_unified import load_moe_, restore_
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import info
from sparse_unified.nn import SparseMoE

KINDS = {"16to8": (16, 8), "32to16": (32, 16)}
HUB_ID = "LLM-Drop/BAGEL-MoE-7B-GEN-16to8"


def small(kind: str, dtype: torch.dtype = torch.float32) -> Released:
    num_experts, top_k = KINDS[kind]
    return Released(num_experts=num_experts, top_k=top_k, dtype=dtype, **SMALL)


def host(released: Released, mlp: type[TensorMLP] = TensorMLP, dtype: Any = None) -> Model:
    """A dense model with the official structure; layers that stay dense have a small FFN."""
    model = Model(mlp, released.layers).to(dtype or released.dtype)
    for layer in released.sparse:
        with torch.device("meta"):
            ffn = mlp(released.hidden, released.width)
        ffn = ffn.to(released.dtype).to_empty(device="cpu")
        for weight in ffn.parameters():
            nn.init.constant_(weight, 0.01)
        model.layers[layer].mlp_moe_gen = ffn
    return model.eval()


def test_the_released_shapes_are_those_of_the_model_card() -> None:
    at = "language_model.model.layers.13.mlp_moe_gen.experts"
    for num_experts, top_k, width in ((16, 8, 1184), (32, 16, 592)):
        shapes = Released(num_experts=num_experts, top_k=top_k).shapes()
        assert shapes[f"{at}.0.gate_proj.weight"] == (width, 3584)
        assert shapes[f"{at}.{num_experts - 1}.down_proj.weight"] == (3584, width)
        assert f"{at}.{num_experts}.up_proj.weight" not in shapes


@pytest.mark.parametrize(
    ("kind", "dtype", "num_shards"),
    [
        ("16to8", torch.bfloat16, 3),
        ("16to8", torch.float32, 0),
        ("32to16", torch.bfloat16, 0),
        ("32to16", torch.float32, 2),
    ],
)
def test_all_layers_load_as_a_model_and_into_a_dense_one(
    kind: str, dtype: torch.dtype, num_shards: int, tmp_path: Path
) -> None:
    released = small(kind, dtype)
    directory = write_released(tmp_path / kind, released, num_shards=num_shards)
    shapes = released.shapes()
    report = info(directory)
    assert not report.problems
    gen = next(c for c in report.components if c.name == "gen")
    assert gen.sparse_layers == released.sparse

    pipeline = BagelPipeline.from_pretrained(directory)
    state = pipeline.model.state_dict()
    assert state.keys() == shapes.keys()
    for key, shape in shapes.items():
        assert torch.equal(state[key], make_tensor(key, shape, dtype)), key
    result = pipeline.generate("a", seed=0, num_timesteps=2, size=(32, 32), progress=False)
    assert all(latent.isfinite().all() for latent in result.latents)

    model = host(released, TupleMLP if num_shards else TensorMLP)
    entries = load_moe_(model, directory).parts
    assert [entry.layer for entry in entries] == list(released.sparse)
    assert {(e.num_experts, e.top_k, e.expert_width) for e in entries} == {
        (*KINDS[kind], released.expert_width)
    }
    prefix = "language_model.model.layers.26.mlp_moe_gen."
    block = model.layers[26].mlp_moe_gen
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[prefix + key])
    x = tokens(5, released.hidden).to(dtype)
    ours = pipeline.model.language_model.model.layers[26].mlp_moe_gen
    outputs = [out[0] if isinstance(out, tuple) else out for out in (block(x), ours(x))]
    assert torch.equal(*outputs)
    restore_(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_full_width_loads(kind: str, tmp_path: Path) -> None:
    num_experts, top_k = KINDS[kind]
    sizes = {name: size for name, size in SMALL.items() if name.startswith(("voc", "vit"))}
    released = Released(num_experts=num_experts, top_k=top_k, layers=1, sparse=(0,), **sizes)
    whole = num_experts == 16  # of the other one the generation FFN alone, to save time
    directory = write_released(
        tmp_path / kind,
        released,
        num_shards=2 * whole,
        part="" if whole else "mlp_moe_gen",
    )
    prefix = "language_model.model.layers.0.mlp_moe_gen."
    block: Any
    if whole:
        block = BagelPipeline.from_pretrained(directory).model.language_model.model.layers[0]
        block = block.mlp_moe_gen
    else:
        model = host(released)
        load_moe_(model, directory, keep_dense=False)
        block = model.layers[0].mlp_moe_gen
    assert (block.num_experts, block.top_k, block.layout.expert_width) == (
        num_experts, top_k, released.expert_width
    )  # fmt: skip
    assert block.gate_proj.shape == (18944, 3584)
    views = block.official_views()
    for key in (
        "gate.weight",
        "experts.0.gate_proj.weight",
        f"experts.{num_experts - 1}.down_proj.weight",
    ):
        shape = released.shapes()[prefix + key]
        assert torch.equal(views[key], make_tensor(prefix + key, shape, torch.bfloat16))
    x = tokens(2, 3584).bfloat16()
    y = block(x)
    assert (y[0] if isinstance(y, tuple) else y).isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"top_k": None}, "top_k must"),
        ({"top_k": 17}, "top_k must .*1 to 16.*got 17"),
        ({"top_k": 8, "num_experts_per_tok": 50}, "top_k must .*1 to 16.*got 8, 50"),
        ({"num_experts": 32}, "num_experts must be 16.*got 32"),
        ({"num_shared_experts": 1}, "num_shared_experts must give the 0 shared.*got 1"),
        ({"transformed_gen": False}, r"transformed_gen must be \[1, 2, 3.*got False"),
        ({"transformed_gen": list(range(28))}, "transformed_gen must be"),
        ({"transformed_und": True}, "transformed_und must be"),
    ],
)
def test_a_config_that_contradicts_the_keys_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    released = small("16to8")
    directory = write_released(tmp_path / "model", released)
    config = {k: v for k, v in (released.config() | change).items() if v is not None}
    (directory / "llm_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load_moe_(host(released), directory)
    with pytest.raises(ValueError, match=match):
        BagelPipeline.from_pretrained(directory)


def put_in_hub_cache(cache: Path, directory: Path, name: str) -> None:
    """Lays a model out as the hub's cache does: blobs, and a snapshot of links to them."""
    commit = "0" * 40
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(directory.iterdir())):
        blob = repo / "blobs" / str(number)
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)


def test_a_hub_id_loads_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    released = small("16to8")
    put_in_hub_cache(tmp_path / "cache", write_released(tmp_path / "model", released), HUB_ID)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    model = host(released)
    assert len(load_moe_(model, HUB_ID).parts) == 26
    assert isinstance(model.layers[1].mlp_moe_gen, SparseMoE)
    pipeline = BagelPipeline.from_pretrained(HUB_ID)
    assert pipeline.model.config.llm.sparse_layers("gen").keys() == set(released.sparse)


def test_a_hub_id_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    match = (
        rf"^{{}}: model must be a directory or a hub id that can be downloaded, got '{HUB_ID}': "
    )
    with pytest.raises(ValueError, match=match.format("load_moe_")) as caught:
        load_moe_(host(small("16to8")), HUB_ID)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=match.format("from_pretrained")):
        BagelPipeline.from_pretrained(HUB_ID)


def test_a_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in (Path("owner/name"), tmp_path / "no", "no"):
        with pytest.raises(ValueError, match="checkpoint must be a directory"):
            load_moe_(Bare(), name)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"owner/name: directory must hold ema\.safetensors"):
        load_moe_(Bare(), "owner/name")
