# SPDX-License-Identifier: Apache-2.0
"""What fits where, computed from headers of true size in files without data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from released_files import GOLDEN, Released
from safetensors.torch import save_file

from sparse_unified.checkpoint.memory import memory
from sparse_unified.checkpoint.writer import build_header
from sparse_unified.cli import main
from sparse_unified.testing import read_case

RELEASED = Released(num_experts=16, top_k=8)
DENSE_FFN = 28 * 3 * 18944 * 3584 * 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released checkpoint at its true shapes: 29 GB of holes behind a header."""
    folder = tmp_path_factory.mktemp("holes")
    shapes = RELEASED.shapes()
    header = build_header([(key, torch.bfloat16, shape) for key, shape in shapes.items()]).encode()
    path = folder / "ema.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    nbytes = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    os.truncate(path, 8 + len(header) + nbytes)
    save_file(read_case(GOLDEN / "vae").weights, folder / "ae.safetensors")
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


def test_larger_images_and_more_of_them_need_more(directory: Path) -> None:
    working = [
        memory(directory, size=(side, side), images=images).rows[0].working
        for side, images in ((512, 1), (1024, 1), (1024, 4))
    ]
    assert working == sorted(set(working))


def test_arguments_are_checked(directory: Path) -> None:
    with pytest.raises(ValueError, match="memory: images must be at least 1, got 0"):
        memory(directory, images=0)
    with pytest.raises(ValueError, match="memory: size must be at least 1"):
        memory(directory, size=(0, 16))


def test_the_command_shows_the_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(directory), "--memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("computed, not measured")
    assert lines[1].split()[:1] == ["from_pretrained(...)"]
    assert len([line for line in lines if "fits" in line]) >= 6
