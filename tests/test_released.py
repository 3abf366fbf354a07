# SPDX-License-Identifier: Apache-2.0
"""Checkpoints laid out as the released sparse ones load, by path and by hub id, into any model."""

from __future__ import annotations

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
    parts = load_moe_(model, directory).parts
    assert [part.layer for part in parts] == list(released.sparse)
    prefix = "language_model.model.layers.26.mlp_moe_gen."
    block = model.layers[26].mlp_moe_gen
    sizes = (block.num_experts, block.top_k, block.layout.expert_width)
    assert sizes == (*KINDS[kind], released.expert_width)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[prefix + key])
    x = tokens(5, released.hidden).to(dtype)
    ours = pipeline.model.language_model.model.layers[26].mlp_moe_gen
    outputs = [out[0] if isinstance(out, tuple) else out for out in (block(x), ours(x))]
    assert torch.equal(*outputs)
    restore_(model)


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
    for name, load in (
        ("load_moe_", lambda: load_moe_(host(small("16to8")), HUB_ID)),
        ("from_pretrained", lambda: BagelPipeline.from_pretrained(HUB_ID)),
    ):
        match = f"{name}: model must be a directory or a hub id that can be downloaded, got '"
        with pytest.raises(ValueError, match=f"^{match}{HUB_ID}': ") as caught:
            load()
        assert "\n" not in str(caught.value)


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
