# SPDX-License-Identifier: Apache-2.0
"""A model directory with a damaged file is refused in one sentence, or does what it says."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import make_dense, snapshot
from hostile_cases import change_bytes, change_file, change_json, refusal
from tiers import num_cases

from sparse_unified.checkpoint import (
    Checkpoint,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    convert,
    info,
    invert,
    prune,
    verify,
)

NUM_CASES = num_cases(1_200)
SIZES: dict[str, Any] = {"num_layers": 3, "width": 16, "hidden": 4, "vocabulary": 2}


def read_layout(directory: Path) -> None:
    """Reads headers and JSON, as every operation does first."""
    checkpoint = Checkpoint(directory)
    _ = checkpoint.shapes, checkpoint.top_k, checkpoint.num_layers


def read_info(directory: Path) -> None:
    """Describes the directory; what disagrees in it must be worded as an error is."""
    report = info(directory)
    report.to_text().encode()
    report.to_json().encode()
    for problem in report.problems:
        refusal(lambda problem=problem: _raise(problem), "")  # type: ignore[misc]


def _raise(message: str) -> None:
    raise ValueError(message)


def change_model(path: Path, data: bytes, source: random.Random) -> None:
    """Writes a damaged copy of one file of a model."""
    if path.suffix == ".json":
        if source.randrange(4) == 0:
            path.write_bytes(change_bytes(data, source))
        else:
            path.write_text(json.dumps(change_json(json.loads(data), source)))
    else:
        path.write_bytes(change_file(data, source))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dense = make_dense(root / "dense", **SIZES)
    convert(dense, root / "sparse", num_experts=4, top_k=2)
    # Experts of und on top of fewer neurons and one block skipped: every kind of step and file.
    modes = [
        PruneWidthConfig(component="und", keep_ratio=0.5),
        PruneHeadsConfig(component="gen", keep_ratio=1.0),
        SkipLayersConfig(component="und", layers=[1]),
    ]
    prune(dense, root / "pruned", modes)
    convert(root / "pruned", root / "both", num_experts=2, top_k=1, component="und", layers="all")
    shards = make_dense(root / "shards", num_shards=2, **SIZES)
    return {path.name: path for path in (dense, root / "sparse", root / "both", shards)}


CASES = [
    ("dense", "llm_config.json"),
    ("dense", "vit_config.json"),
    ("dense", "ema.safetensors"),
    ("dense", "ae.safetensors"),
    ("sparse", "llm_config.json"),
    ("sparse", "ema.safetensors"),
    ("sparse", "sparse_unified.json"),
    ("sparse", "partition.safetensors"),
    ("both", "llm_config.json"),
    ("both", "sparse_unified.json"),
    ("shards", "model.safetensors.index.json"),
    ("shards", "model-00001-of-00002.safetensors"),
]


def damaged(
    models: dict[str, Path], model: str, name: str, root: Path
) -> Iterator[tuple[int, Path]]:
    """Yields a copy of a model again and again, each time with one file damaged otherwise."""
    directory = root / "model"
    shutil.copytree(models[model], directory)
    data = (directory / name).read_bytes()
    for seed in range(NUM_CASES // len(CASES)):
        change_model(directory / name, data, random.Random(f"{model} {name} {seed}"))
        yield seed, directory


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_model_with_a_damaged_file_is_refused_or_does_what_it_says(
    model: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for seed, directory in damaged(models, model, name, tmp_path):
        before = snapshot(directory)
        refusal(lambda d=directory: read_layout(d), "")  # type: ignore[misc]
        refusal(lambda d=directory: read_info(d), "")  # type: ignore[misc]
        steps: list[Callable[[], object]] = [lambda d=directory: invert(d, out)]  # type: ignore[misc]
        if model != "sparse":
            component = "gen" if model == "both" else "und"
            steps = [
                lambda d=directory, c=component: convert(  # type: ignore[misc]
                    d, out, num_experts=2, top_k=1, component=c, layers="all"
                ),
                lambda d=directory: prune(d, out, [PruneWidthConfig(component="gen")]),  # type: ignore[misc]
            ]
        for step in steps:
            if refusal(step, "") is None and model != "sparse":
                report = verify(out, directory)
                assert report.ok, f"{seed}: {report.to_text()}"
            left = {path.name for path in tmp_path.iterdir()} - {"model", "out"}
            assert not left, f"{seed}: {left}"
            shutil.rmtree(out, ignore_errors=True)
        assert snapshot(directory) == before
