# SPDX-License-Identifier: Apache-2.0
"""What fits where, computed from headers of true size in files without data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from released_files import GOLDEN, Released

from sparse_unified.bagel import AutoEncoder, BagelPipeline, VAEConfig
from sparse_unified.checkpoint.safetensors_io import build_header
from sparse_unified.convert.info import memory
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.surgery.report import stored_bytes

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
    assert len(rows) == 8
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


def test_weights_are_those_of_the_model_that_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    directory = write_checkpoint(GOLDEN / "t2i_moe", tmp_path)
    for row in memory(directory).rows:
        options: dict[str, Any] = dict(re.findall(r"(\w+)='(\w+)'", row.options))
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
        # Of the row a packed weight has a scale alone, and the table counts the zero point too.
        spare = 0.05 * every if "storage" in options else 0
        assert 0 <= row.weights + row.host - every <= spare, row.options
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
