# SPDX-License-Identifier: Apache-2.0
"""A damaged safetensors file is refused in one sentence, or is what the official library reads."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import make_dense
from hostile_cases import CORPUS, change_file, refusal
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from tiers import num_cases

from sparse_unified.checkpoint import convert
from sparse_unified.checkpoint.safetensors_io import (
    as_bytes,
    build_header,
    read_header,
    read_tensor,
)
from sparse_unified.checkpoint.scores import read_scores
from sparse_unified.checkpoint.sidecar import parse_dense_headers, read_sidecar

NUM_CASES = num_cases(20_000)


def read_all(path: Path) -> None:
    """Reads header and tensors as the package does, and compares with the official library."""
    header = read_header(path)
    data = path.read_bytes()
    official = dict(deserialize(data))
    assert set(official) == set(header.tensors)
    for key, spec in header.tensors.items():
        tensor = read_tensor(spec, what=str(path))
        assert list(tensor.shape) == list(official[key]["shape"])
        assert np.array_equal(as_bytes(tensor), np.frombuffer(official[key]["data"], np.uint8))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("samples")
    dense = make_dense(root / "dense", num_layers=3, width=16, hidden=4, vocabulary=2)
    convert(dense, root / "sparse", num_experts=4, top_k=2)
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b.weight": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 5, dtype=torch.float16),
        "scalar": torch.tensor(3),
    }
    return {
        "tensors": save(tensors, metadata={"format": "pt"}),
        "scores": save({"scores": torch.rand(3, 16)}),
        "layers": save({"gen.1": torch.rand(16), "gen.1.heads": torch.rand(2)}),
        "partition": (root / "sparse" / "partition.safetensors").read_bytes(),
    }


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_files_of_the_corpus_are_refused(path: Path) -> None:
    read = read_scores if path.stem.startswith("scores_") else read_all
    assert refusal(lambda: read(path), str(path))


@pytest.mark.parametrize("kind", ["tensors", "scores", "layers", "partition"])
def test_a_damaged_file_is_refused_or_read_as_the_official_library_does(
    kind: str, samples: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    refused = 0
    for seed in range(NUM_CASES // len(samples)):
        path.write_bytes(change_file(samples[kind], random.Random(f"{kind} {seed}")))
        try:
            refused += refusal(lambda: read_all(path), str(path)) is not None
        except SafetensorError as error:
            pytest.fail(f"{kind} {seed}: accepted, but the official library says {error}")
        except Exception as error:
            error.add_note(f"{kind} {seed}") if hasattr(error, "add_note") else None
            raise
        if kind in ("scores", "layers"):
            refusal(lambda: read_scores(path), str(path))
        elif kind == "partition":
            refusal(lambda: parse_dense_headers(path, read_sidecar(path)), str(path))
    assert 0.3 < refused / (NUM_CASES // len(samples)) < 1


def test_tensors_far_into_a_large_file_are_found(tmp_path: Path) -> None:
    nbytes = 6 << 30  # a hole: takes no room on the disk
    rows = nbytes // 4096
    entries = [("first", torch.float16, (rows, 2048)), ("second", torch.float32, (rows, 1024))]
    text = build_header(entries).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 2 * nbytes)
    specs = read_header(path).tensors
    assert [spec.start - 8 - len(text) for spec in specs.values()] == [0, nbytes]
    row = read_tensor(specs["second"].rows(rows - 1, rows), what="row")
    assert torch.equal(row, torch.zeros(1, 1024))
