# SPDX-License-Identifier: Apache-2.0
"""A damaged file of a user - samples, statistics, states, results - is refused in one sentence.

Each reader gets its own file again and again, damaged from a seed, and must read it or name the
file, the rule and the value. What once went wrong lies in tests/corpus/readers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import analysis_models
import pytest
import torch
from checkpoint_files import GOLDEN, make_dense
from hostile_cases import CORPUS, change_bytes, change_file, change_json, refusal
from tiers import num_cases

from sparse_unified.adapt import TrainingConfig
from sparse_unified.adapt.data import open_records
from sparse_unified.adapt.optimizer import Optimizer
from sparse_unified.adapt.report import read_lines
from sparse_unified.adapt.saving import load_state, save_state
from sparse_unified.analysis import FfnStatistics, StatisticsConfig, collect
from sparse_unified.analysis.geneval import read_metadata
from sparse_unified.analysis.records import open_store, read_records
from sparse_unified.analysis.samples import Task, read_samples
from sparse_unified.analysis.similarity import LayerSimilarity, Similarity
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.loading import load_bagel
from sparse_unified.checkpoint import Checkpoint, convert, info
from sparse_unified.cli.generate import _read_prompts
from sparse_unified.fixtures import write_checkpoint

CASES = num_cases(400)
HERE = CORPUS / "readers"
RUN = {"model": "a", "config": {"ratios": [0.5], "axes": ["depth"]}}
TRAINING = TrainingConfig(steps=4, batch_size=1, learning_rate=0.1)
TOKENS = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
FACTS = {"config": {"steps": 4, "schedule": "cosine"}, "data": "x", "step": 2}


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def load_training_state(path: Path) -> None:
    load_state(path.parent, Optimizer(tiny(), TRAINING), FACTS)


def open_run(path: Path) -> None:
    with open_store(path.parent, RUN):
        pass


def load_model(path: Path) -> None:
    load_bagel(path.parent, special_tokens=TOKENS)


def write_lines(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_statistics(root: Path) -> Path:
    model = analysis_models.Bailing()
    config = StatisticsConfig(num_time_ranges=2, num_inputs=3)
    with torch.no_grad(), collect(model, "text", config=config) as collector:
        collector.begin("a")
        model(torch.arange(3, 9)[None])
    collector.statistics().save(root / "statistics.safetensors")
    return root / "statistics.safetensors"


def make_samples(root: Path) -> Path:
    picture = analysis_models.pictures(root, 1)[0].name
    return write_lines(
        root / "samples.jsonl",
        {"prompt": "a bench", "image": picture, "source": [picture], "answer": "yes"},
        {"prompt": "a dog", "source": picture},
    )


def make_data(root: Path) -> Path:
    picture = analysis_models.pictures(root, 1)[0].name
    return write_lines(
        root / "data.jsonl",
        {"image": picture, "text": "a bench"},
        {"image": picture, "question": "what?", "answer": "a bench"},
    )


def make_geneval(root: Path) -> Path:
    include = [{"class": "bench", "count": 1}]
    return write_lines(
        root / "geneval.jsonl", {"tag": "single_object", "include": include, "prompt": "a bench"}
    )


def make_points(root: Path) -> Path:
    cost = {"parameters": 3, "weight_bytes": 12, "flops": 6, "seconds": 0.1, "peak_bytes": 24}
    dense = {"name": "text-dense", "metrics": {"loss": 1.0}, "cost": cost}
    point = {
        **{"name": "text-und-depth-0.5", "task": "text", "component": "und", "axis": "depth"},
        **{"keep_ratio": 0.5, "change": "one layer less", "skipped_layers": [1]},
        **{"metrics": {"loss": 1.5}, "before": cost, "after": cost},
    }
    return write_lines(root / "points.jsonl", dense, point)


def make_similarity(root: Path) -> Path:
    layer = LayerSimilarity(component="und", layer=0, tokens=3, block=0.5, attention=0.5, ffn=1)
    path = root / "similarity.json"
    path.write_text(Similarity(layers=(layer,)).to_json())
    return path


def make_run(root: Path) -> Path:
    with open_store(root / "run", RUN):
        return next((root / "run").glob("*.json"))


def make_state(root: Path, name: str) -> Path:
    save_state(root / "state", Optimizer(tiny(), TRAINING), FACTS)
    return root / "state" / name


def make_model(root: Path, name: str) -> Path:
    model = write_checkpoint(GOLDEN / "t2i_moe", root / "model")
    stated = {"vae_config": {"z_channels": 4, "downsample": 2}, "max_latent_size": 8}
    if name == "config.json":
        (model / name).write_text(json.dumps(stated))
    return model / name


def make_text(root: Path) -> Path:
    (root / "prompts.txt").write_text("a bench\na dog\n")
    return root / "prompts.txt"


def make_log(root: Path) -> Path:
    return write_lines(root / "log.jsonl", {"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5})


Reader = tuple[Callable[[Path], Path], Callable[[Path], object]]
READERS: dict[str, Reader] = {
    "statistics": (make_statistics, FfnStatistics.load),
    "samples": (make_samples, lambda path: read_samples(path, None, Task.EDITING)),
    "prompts": (make_text, lambda path: read_samples(path, None, Task.GENERATION)),
    "lines": (make_text, lambda path: _read_prompts(str(path))),
    "data": (make_data, open_records),
    "log": (make_log, read_lines),
    "geneval": (make_geneval, read_metadata),
    "points": (make_points, read_records),
    "similarity": (make_similarity, Similarity.load),
    "run": (make_run, open_run),
    "state": (lambda root: make_state(root, "training.json"), load_training_state),
    "moments": (lambda root: make_state(root, "training.safetensors"), load_training_state),
    "llm": (lambda root: make_model(root, "llm_config.json"), load_model),
    "vit": (lambda root: make_model(root, "vit_config.json"), load_model),
    "vae": (lambda root: make_model(root, "ae.safetensors"), load_model),
    "config": (lambda root: make_model(root, "config.json"), load_model),
}
SLOW = {"llm", "vit", "vae", "config"}


def change(path: Path, data: bytes, source: random.Random) -> None:
    """Writes a damaged copy of a file of any kind."""
    if path.suffix == ".safetensors":
        path.write_bytes(change_file(data, source))
    elif path.suffix == ".txt" or source.randrange(4) == 0:
        path.write_bytes(change_bytes(data, source))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_json(json.loads(data), source)))
    else:
        lines = data.decode().splitlines()
        at = source.randrange(len(lines))
        lines[at] = json.dumps(change_json(json.loads(lines[at]), source))
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_read(name: str, tmp_path: Path) -> None:
    make, read = READERS[name]
    path = make(tmp_path)
    read(path)
    data = path.read_bytes()
    refused = 0
    cases = CASES // 16 if name in SLOW else CASES
    for seed in range(cases):
        change(path, data, random.Random(f"{name} {seed}"))
        try:
            refused += refusal(lambda: read(path), "") is not None
        except BaseException as error:
            raise AssertionError(
                f"{name} {seed}: {type(error).__name__}: {error}"[:3000]
            ) from error
    assert refused > 0 or name in ("lines", "log")


@pytest.mark.parametrize("file", sorted(HERE.iterdir()), ids=lambda p: p.name)
def test_files_of_the_corpus_are_refused(file: Path, tmp_path: Path) -> None:
    make, read = READERS[file.name.partition("-")[0]]
    path = make(tmp_path)
    shutil.copy(file, path)
    assert refusal(lambda: read(path), str(path.parent if path.suffix == ".safetensors" else path))


# What a path may be


def test_links_that_end_nowhere_or_in_a_device_are_refused(tmp_path: Path) -> None:
    for name in ("llm_config.json", "ema.safetensors", "ae.safetensors"):
        for target in ("loop", "gone", "/dev/zero", "fifo", "."):
            root = tmp_path / f"{name}-{target.strip('/').replace('/', '-')}"
            model = make_dense(root / "dense", num_layers=2, width=8, hidden=4, vocabulary=2)
            path = model / name
            path.unlink()
            if target == "fifo":
                os.mkfifo(root / "fifo")
            path.symlink_to(path if target == "loop" else root / target)
            if name != "ae.safetensors":
                assert refusal(lambda p=model: Checkpoint(p).experts, name), target  # type: ignore[misc]
            elif refusal(lambda p=model: info(p), name) is None:  # type: ignore[misc]
                assert any(name in problem for problem in info(model).problems), target
            out = root / "out"
            assert refusal(
                lambda p=model, o=out: convert(p, o, num_experts=2, top_k=1, layers="all"),  # type: ignore[misc]
                name,
            ), target
            assert not out.exists()


def test_links_to_files_elsewhere_are_followed_as_the_hub_makes_them(tmp_path: Path) -> None:
    model = make_dense(tmp_path / "dense", num_layers=2, width=8, hidden=4, vocabulary=2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    files = sorted(path for path in model.rglob("*") if path.is_file())
    for index, path in enumerate(files):
        path.rename(blobs / str(index))
        path.symlink_to(blobs / str(index))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    convert(model, tmp_path / "out", num_experts=2, top_k=1, layers="all")
    assert all(not path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "a\0b"]
)
def test_an_index_names_files_of_its_own_directory_alone(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "width": 8, "hidden": 4, "vocabulary": 2}
    model = make_dense(tmp_path / "model", num_shards=2, **sizes)
    make_dense(tmp_path / "other", **sizes)
    shutil.copy(tmp_path / "other" / "ema.safetensors", tmp_path / "out.safetensors")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for key in content["weight_map"]:
        content["weight_map"][key] = name
    index.write_text(json.dumps(content))
    assert refusal(lambda: Checkpoint(model), str(index))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    model = make_dense(
        tmp_path / "model", num_shards=2, num_layers=2, width=8, hidden=4, vocabulary=2
    )
    first, second = sorted(model.glob("model-*.safetensors"))
    shutil.copy(first, second)
    assert refusal(lambda: Checkpoint(model), str(model))
