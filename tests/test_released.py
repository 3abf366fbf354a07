# SPDX-License-Identifier: Apache-2.0
"""Checkpoints laid out as the released sparse ones load, and what of them fits where."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from released_files import SMALL, Released, make_tensor, write_released
from surgery_models import Bare, Model, TensorMLP, TupleMLP, tokens
from torch import nn

from sparse_unified import load_moe_, restore_
from sparse_unified.bagel import AutoEncoder, BagelPipeline, VAEConfig
from sparse_unified.checkpoint import info
from sparse_unified.checkpoint.safetensors_io import build_header
from sparse_unified.convert.info import memory
from sparse_unified.surgery.report import stored_bytes

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
    [("16to8", torch.bfloat16, 3), ("32to16", torch.float32, 0)],
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


def test_a_hub_id_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for name, load in (
        ("load_moe_", lambda: load_moe_(host(small("16to8")), HUB_ID)),
        ("from_pretrained", lambda: BagelPipeline.from_pretrained(HUB_ID)),
    ):
        match = f"{name}: model must be a directory or a hub id that can be downloaded, got '"
        refused(f"^{match}{HUB_ID}': ", load)


def test_a_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in (Path("owner/name"), tmp_path / "no", "no"):
        refused("checkpoint must be a directory", load_moe_, Bare(), name)
    for name in (__file__, "nowhere", "/nowhere/at/all", "../a/b", "a/", "models/mistyped"):
        refused("must be a directory or a hub id", BagelPipeline.from_pretrained, name)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    refused(r"owner/name: directory must hold ema\.safetensors", load_moe_, Bare(), "owner/name")


# What fits where, computed from headers of true size in files without data

RELEASED = Released(num_experts=16, top_k=8)
DENSE_FFN = 28 * 3 * 18944 * 3584 * 2


def write_holes(path: Path, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes a file of tensors that takes no room on the disk."""
    header = build_header([(key, dtype, shape) for key, shape in shapes.items()]).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    nbytes = sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())
    os.truncate(path, 8 + len(header) + nbytes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released checkpoint at its true shapes: 29 GB of holes behind a header."""
    folder = tmp_path_factory.mktemp("holes")
    write_holes(folder / "ema.safetensors", torch.bfloat16, RELEASED.shapes())
    vae = AutoEncoder(VAEConfig(), device="meta").state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in vae.items()}
    write_holes(folder / "ae.safetensors", torch.float32, shapes)
    (folder / "llm_config.json").write_text(json.dumps(RELEASED.config()))
    (folder / "vit_config.json").write_text(json.dumps(RELEASED.vit_config()))
    return folder


def test_weights_add_up_and_each_option_takes_its_part_away(directory: Path) -> None:
    report = memory(directory)
    rows = {row.options: row for row in report.rows}
    assert len(rows) == 10
    whole = rows["as it is"]
    files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert 0 <= files - whole.weights < 10**6  # the headers
    und = rows["offload='und'"]
    assert und.host == DENSE_FFN
    assert und.weights == whole.weights - DENSE_FFN
    packed = rows["storage='int8'"]
    assert whole.weights - packed.weights == pytest.approx(DENSE_FFN, rel=0.01)
    image = rows["task='image'"]
    head, last_ffn = 152064 * 3584 * 2, DENSE_FFN // 28
    vit = sum(
        2 * torch.Size(shape).numel()
        for key, shape in RELEASED.shapes().items()
        if key.startswith(("vit_", "connector."))
    )
    assert whole.weights - image.weights == head + last_ffn + vit + 3584 * 2
    assert all(
        row.fits == tuple(b for b in report.budgets if row.weights + row.working <= b * 1e9)
        for row in report.rows
    )
    assert 80 in whole.fits
    assert 24 not in whole.fits
    assert 24 in rows["task='image', offload='und'"].fits
    small = [row for row in report.rows if "nvfp4" in row.options]
    assert [row.fits[0] for row in small] == [12, 10]


def test_weights_are_those_of_the_model_that_is_loaded(golden: Any) -> None:
    pytest.importorskip("torchao")
    directory = golden("t2i_moe")
    for row in memory(directory).rows:
        given = "" if row.options == "as it is" else row.options.removesuffix(", tiled=True")
        options: dict[str, Any] = eval(f"dict({given})")
        pipeline = BagelPipeline.from_pretrained(directory, **options)
        und = {
            name: stored_bytes(weight)
            for name, weight in pipeline.model.named_parameters()
            if re.match(r"language_model\.model\.layers\.\d+\.mlp\.", name)
        }
        every = sum(
            stored_bytes(weight)
            for module in (pipeline.model, pipeline.vae)
            for weight in module.parameters()
        )
        # Of the row a packed weight has a scale alone, and the table counts the zero point too. The
        # scales of nvfp4 come in blocks for 128 rows, which these weights do not fill.
        spare = 0.05 * every if "storage" in options else 0
        least = -spare if "nvfp4" in given else 0
        assert least <= row.weights + row.host - every <= spare, row.options
        if "offload" in options:
            assert 0 <= row.host - sum(und.values()) <= spare
        else:
            assert row.host == 0


def test_the_table_of_the_document_is_the_one_that_is_computed(directory: Path) -> None:
    document = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    rows = {row.options: row for row in memory(directory).rows}
    pattern = r"^\| (defaults|`.*?`) \| (.*) GB \| (.*) GB \| (.*?) \| (.*) \|$"
    lines = re.findall(pattern, document, re.MULTILINE)
    names = {line[0]: line[0].strip("`").replace('"', "'") for line in lines}
    names["defaults"] = "as it is"
    assert set(names.values()) == set(rows)
    for name, weights, working, host, fits in lines:
        row = rows[names[name]]
        found = f"{row.weights / 1e9:.1f}", f"{row.working / 1e9:.1f}"
        assert (weights, working) == found
        assert host == ("-" if not row.host else f"{row.host / 1e9:.1f} GB")
        first, *_ = re.findall(r"\d+", fits)
        assert int(first) == row.fits[0]
