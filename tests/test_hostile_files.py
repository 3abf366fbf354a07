# SPDX-License-Identifier: Apache-2.0
"""Every file that is read is attacked: what is damaged is refused in one sentence, or read right.

`python tests/test_hostile_files.py NAME COUNT` runs the first cases of one reader, as the tests do
for those that hand a file to other libraries, which may crash or hang.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import analysis_models
import numpy as np
import pytest
import torch
from checkpoint_files import make_dense, run_python
from hostile_cases import CORPUS, attack, read_all, refusal
from moe_cases import GOLDEN
from safetensors.torch import save
from tiers import IS_DEEP, num_cases

from sparse_unified.adapt import TrainingConfig
from sparse_unified.adapt.optimizer import Optimizer
from sparse_unified.adapt.records import open_records
from sparse_unified.adapt.run import read_log
from sparse_unified.adapt.saving import load_state, save_state
from sparse_unified.analysis import FfnStatistics, StatisticsConfig, collect
from sparse_unified.analysis.bagel_task import read_metadata
from sparse_unified.analysis.criteria import Similarity
from sparse_unified.analysis.samples import Task, read_samples
from sparse_unified.analysis.samples import read_lines as read_text_lines
from sparse_unified.analysis.store import open_store, read_records
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import open_image, to_rgb
from sparse_unified.bagel.loading import load_bagel
from sparse_unified.bagel.tokenizer import Tokenizer
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
from sparse_unified.checkpoint.scores import read_scores
from sparse_unified.convert.convert import SIDECAR, read_sidecar
from sparse_unified.fixtures import write_checkpoint, write_tokenizer

IMAGE = "0.png"
ANSWER = {"question": "what?", "answer": "a"}
SIZES: dict[str, Any] = {"num_layers": 3, "width": 16, "hidden": 4, "vocabulary": 2}
RUN = {"model": "a", "config": {"ratios": [0.5], "axes": ["depth"]}}
TRAINING = TrainingConfig(steps=4, batch_size=1, learning_rate=0.1)
TOKENS = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
FACTS = {"config": {"steps": 4, "schedule": "cosine"}, "data": "x", "step": 2}


@dataclass(frozen=True)
class Target:
    """One kind of file: `make` writes a whole one into a new directory, with what belongs to it,
    and `read` reads it, and raises where it does not mean what it says."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    cases: int = 2_000  # in a deep run
    links: bool = False  # the file must be a regular one, or a link to one
    lenient: bool = False  # damage may well leave a legal file
    alone: bool = False  # other libraries read it; tried in a process of its own


# Safetensors files, read as the official library does


def write(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir()
        (root / name).write_bytes(data)
        return root / name

    return make


TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.empty(0, 5, dtype=torch.float16),
    "scalar": torch.tensor(3),
}
HEADERS = {
    "tensors": Target(
        write("x.safetensors", save(TENSORS, {"format": "pt"})), read_all, 20_000, links=True
    ),
    "scores": Target(
        write("x.safetensors", save({"scores": torch.ones(3, 16)})), read_scores, 15_000
    ),
    "layers": Target(
        write("x.safetensors", save({"gen.1": torch.ones(16), "gen.1.heads": torch.ones(2)})),
        read_scores,
        15_000,
    ),
}


# Model directories: refused, or done right by everything that takes them


def make_model(root: Path, kind: str) -> Path:
    if kind in ("dense", "shards"):
        return make_dense(root, num_shards=2 * (kind == "shards"), **SIZES)
    with TemporaryDirectory() as folder:
        source, pruned = make_dense(Path(folder) / "dense", **SIZES), Path(folder) / "pruned"
        if kind == "sparse":
            convert(source, root, num_experts=4, top_k=2)
            return root
        # Experts of und on fewer neurons and one block skipped: every kind of step and file.
        modes = [
            PruneWidthConfig(component="und", keep_ratio=0.5),
            PruneHeadsConfig(component="gen", keep_ratio=1.0),
            SkipLayersConfig(component="und", layers=[1]),
        ]
        prune(source, pruned, modes)
        convert(pruned, root, num_experts=2, top_k=1, component="und", layers="all")
    return root


def describe(directory: Path) -> None:
    """What disagrees in a directory must be worded as an error is."""
    report = info(directory)
    report.to_text().encode()
    report.to_json().encode()
    for problem in report.problems:
        refusal(lambda p=problem: (_ for _ in ()).throw(ValueError(p)), "")  # type: ignore[misc]


def use_model(path: Path) -> None:
    """Does with a model directory what can be done; raises the last refusal."""
    directory = path.parent
    out = directory.with_name("out")
    options: dict[str, Any] = {"num_experts": 2, "top_k": 1, "layers": "all"}
    steps: list[Callable[[], object]] = [
        lambda: Checkpoint(directory).shapes,
        lambda: describe(directory),
        lambda: prune(directory, out, [PruneWidthConfig(component="gen")]),
        lambda: convert(directory, out, component="gen", **options),
    ]
    if (directory / SIDECAR).exists():
        steps[2:] = [lambda: invert(directory, out)]
    messages = []
    for step in steps:
        messages.append(refusal(step, ""))
        if out.exists():
            assert len(steps) == 3 or verify(out, directory).ok
            shutil.rmtree(out)
    if any(messages):
        raise ValueError(next(filter(None, messages)))


FILES = {
    "dense": ("llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors"),
    "sparse": ("llm_config.json", "ema.safetensors", "sparse_unified.json", SIDECAR),
    "both": ("llm_config.json", "sparse_unified.json"),
    "shards": ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
}
MODELS = {
    f"{kind} {name}": Target(
        lambda root, kind=kind, name=name: make_model(root, kind) / name,  # type: ignore[misc]
        use_model,
        100,
        links=True,
    )
    for kind, names in FILES.items()
    for name in names
}
MODELS["sidecar"] = Target(MODELS[f"sparse {SIDECAR}"].make, read_sidecar, 10_000, links=True)


# Files that users give, and runs leave


def lines(*records: dict[str, Any], images: int = 0) -> Callable[[Path], Path]:
    """Makes a file of JSON lines, beside images."""

    def make(root: Path) -> Path:
        root.mkdir()
        analysis_models.pictures(root, images)
        path = root / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return make


def make_statistics(root: Path) -> Path:
    root.mkdir()
    host = analysis_models.Bailing()
    config = StatisticsConfig(num_time_ranges=2, num_inputs=3)
    with torch.no_grad(), collect(host, "text", config=config) as collector:
        collector.begin("a")
        host(torch.arange(3, 9)[None])
    collector.statistics().save(root / "statistics.safetensors")
    return root / "statistics.safetensors"


COST = {"parameters": 3, "weight_bytes": 12, "flops": 6, "seconds": 0.1, "peak_bytes": 24}
COST["seconds_range"] = [0.1, 0.2]
POINT = {
    **{"name": "text-und-depth-0.5", "task": "text", "component": "und", "axis": "depth"},
    **{"keep_ratio": 0.5, "change": "one layer less", "skipped_layers": [1]},
    **{"metrics": {"loss": 1.5}, "before": COST, "after": COST},
}


LAYER = {"component": "und", "layer": 0, "tokens": 3, "block": 0.5, "attention": 0.5, "ffn": 1}


def read_points(path: Path) -> None:
    data = path.read_bytes()
    try:
        read_records(path)
    finally:  # it cuts off what an interruption tore
        path.write_bytes(data)


def make_run(root: Path) -> Path:
    with open_store(root, RUN):
        return next(root.glob("*.json"))


def open_run(path: Path) -> None:
    with open_store(path.parent, RUN):
        pass


def optimizer() -> Optimizer:
    torch.manual_seed(0)
    return Optimizer(torch.nn.Linear(3, 2), TRAINING)


def make_state(root: Path, name: str) -> Path:
    save_state(root, optimizer(), FACTS)
    return root / name


def load_training_state(path: Path) -> None:
    load_state(path.parent, optimizer(), FACTS)


READERS = {
    "statistics": Target(make_statistics, FfnStatistics.load),
    "samples": Target(
        lines(
            {"prompt": "a", "image": IMAGE, "source": [IMAGE], "answer": "yes"},
            {"prompt": "a dog", "source": IMAGE},
            images=1,
        ),
        lambda path: read_samples(path, None, Task.EDITING),
    ),
    "prompts": Target(
        write("prompts.txt", b"a bench\na dog\n"),
        lambda path: read_samples(path, None, Task.GENERATION),
    ),
    "lines": Target(
        write("prompts.txt", b"a bench\na dog\n"),
        lambda path: read_text_lines(path, "--prompts-file"),
        lenient=True,
    ),
    "data": Target(
        lines({"image": IMAGE, "text": "a"}, {"image": IMAGE, **ANSWER}, images=1), open_records
    ),
    "log": Target(
        lines({"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}), read_log, lenient=True
    ),
    "geneval": Target(
        lines({"tag": "a", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}),
        read_metadata,
    ),
    "points": Target(
        lines({"name": "text-dense", "metrics": {"loss": 1.0}, "cost": COST}, POINT), read_points
    ),
    "similarity": Target(
        write("x.json", Similarity(layers=(LAYER,)).to_json().encode()), Similarity.load
    ),
    "run": Target(make_run, open_run),
    "state": Target(lambda root: make_state(root, "training.json"), load_training_state),
    "moments": Target(
        lambda root: make_state(root, "shard-00001-model-00001-of-00001.safetensors"),
        load_training_state,
    ),
}


# What models are run with, which other libraries read


def make_golden(root: Path, name: str) -> Path:
    directory = write_checkpoint(GOLDEN / "t2i_moe", root)
    stated = {"vae_config": {"z_channels": 4, "downsample": 2}, "max_latent_size": 8}
    if name == "config.json":
        (directory / name).write_text(json.dumps(stated))
    return directory / name


def make_tokenizer(root: Path, name: str) -> Path:
    root.mkdir()
    write_tokenizer(root)
    return root / name


def make_image(root: Path, suffix: str) -> Path:
    root.mkdir()
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / f"x{suffix}")
    return root / f"x{suffix}"


MODEL_FILES = ("llm_config.json", "vit_config.json", "ae.safetensors", "config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff")
OTHERS = {
    **{
        f"loading {name}": Target(
            lambda root, name=name: make_golden(root, name),  # type: ignore[misc]
            lambda path: load_bagel(path.parent, special_tokens=TOKENS),
            200,
            links=True,
        )
        for name in MODEL_FILES
    },
    **{
        name: Target(
            lambda root, name=name: make_tokenizer(root, name),  # type: ignore[misc]
            lambda path: Tokenizer.from_directory(path.parent).encode("a bench"),
            400,
            links=True,
            alone=True,
        )
        for name in TOKENIZER_FILES
    },
    **{
        f"image{suffix}": Target(
            lambda root, suffix=suffix: make_image(root, suffix),  # type: ignore[misc]
            lambda path: to_rgb(open_image(path, where="image")),
            1_000,
            lenient=suffix == ".bmp",
            alone=True,
        )
        for suffix in SUFFIXES
    },
}
TARGETS = HEADERS | MODELS | READERS | OTHERS


def num_tried(name: str) -> int:
    return max(10, num_cases(TARGETS[name].cases) // (1 if IS_DEEP else 4))


def run(name: str, count: int, root: Path) -> None:
    target = TARGETS[name]
    path = target.make(root / "files")
    target.read(path)
    refused = attack(name, path, target.read, count, links=target.links, tell=target.alone)
    assert refused > 0 or target.lenient


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.alone])
def test_a_damaged_file_is_refused_or_read_right(name: str, tmp_path: Path) -> None:
    run(name, num_tried(name), tmp_path)


def test_a_damaged_file_of_other_libraries_ends_no_process() -> None:
    pytest.importorskip("transformers")
    alone = [name for name, target in TARGETS.items() if target.alone]
    done = run_python(__file__, *(a for n in alone for a in (n, num_tried(n))), timeout=600)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]


@pytest.mark.parametrize("file", sorted((CORPUS / "files").iterdir()), ids=lambda p: p.name)
def test_files_of_the_corpus_are_refused(file: Path, tmp_path: Path) -> None:
    target = TARGETS[file.name.partition("-")[0]]
    path = target.make(tmp_path / "files")
    shutil.copy(file, path)
    assert refusal(lambda: target.read(path), str(path))


if __name__ == "__main__":
    for each, count in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        with TemporaryDirectory() as folder:
            run(each, int(count), Path(folder))
