# SPDX-License-Identifier: Apache-2.0
"""Every command and every piece of Python in the documents is run, on models of a few kilobytes.

A document is read from the top in a folder of its own, where the models, images and files that it
names lie. What makes it small is stated below and nothing else is changed: REPLACED in what is
written, ADDED to the options, and NOT_RUN, the commands that are only looked up, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import analysis_models
import full_scale
import pytest
import torch
from moe_cases import GOLDEN

from miniature.__main__ import main as miniature
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import convert, prune
from sparse_unified.cli import build_parser, main
from sparse_unified.cli.console import split_json_flag
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.surgery import MoEConfig, SkipLayersConfig, apply_moe_

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "api.md"),
]

TORCHRUN = "torchrun --nproc-per-node 8 -m sparse_unified.cli"
# A document's sizes -> those of the tiny models; a GPU -> the CPU; a hub id -> a directory.
REPLACED = (
    ("LLM-Drop/BAGEL-MoE-7B-GEN-16to8", "BAGEL-16to8"),
    ('device="cuda"', 'device="cpu"'),
    ("--device cuda", "--device cpu"),
    (TORCHRUN, "sparse-unified"),
    ("size=(512, 512)", "size=(32, 32), num_timesteps=3"),
    ("--size 512x512", "--size 32x32"),
    ("--steps 1000", "--steps 2"),
    ("steps=1000, batch_size=8", "steps=2, batch_size=1"),
    ("--warmup 50", "--warmup 1"),
    ("--eval-data held-out", "--eval-data images"),
    ("warmup_steps=50", "warmup_steps=1"),
    ("--checkpoint-every 100", "--checkpoint-every 1"),
    ("--samples 32", "--samples 1"),
    ("--samples 8 --inputs 512", "--samples 1 --inputs 64"),
    ("num_inputs=512", "num_inputs=64"),
    ("--layers 1-26", "--layers 1"),
    ('layers="20-23"', 'layers="1"'),
    ("bagel-16to8-T4096", "odd-5to2-T1"),
    ("docs/study.", "study."),
    ('"num_timesteps": 20', '"num_timesteps": 2'),
    ("timeit(5)", "timeit(1)"),
)
SMALL = ("--steps", "3", "--size", "32x32")
ADDED: dict[str, tuple[str, ...]] = {
    "generate": SMALL,
    "calibrate": SMALL,
    "expert-usage": ("--samples", "1", *SMALL),
    "analyze": ("--samples", "1", *SMALL, "--max-tokens", "3", "--repeats", "1", "--no-plots"),
    "evaluate": ("--samples", "1", *SMALL, "--max-tokens", "3"),
    "adapt": ("--batch-size", "1", "--max-side", "32"),
    "bench": ("--repeats", "1", "--dtype", "float32"),
}
# What a synopsis leaves open and its axes need.
OPEN: dict[str, tuple[str, ...]] = {"prune": ("--skip-layers", "1", "--keep-ratio", ".5")}
# First words of commands that are looked up and not run -> why.
NOT_RUN = {
    "make": "a target of the Makefile, which runs this test or what CI runs beside it",
    "pip install": "changes the environment; tests/wheel_smoke.py installs into one of its own",
    "python experiments/full_scale.py": "writes a model of 29 GB",
    "python examples/miniature train": "takes half an hour",
    "python examples/miniature autoencoder": "takes ten minutes",
    "torchrun --nproc-per-node 8 examples/automodel.py": "tests/test_automodel.py runs it, tiny",
    "sparse-unified decoder": "tests/test_cli_decoder.py runs it on a tiny text encoder",
    "sparse-unified doctor": "tests/test_doctor.py runs it on a few of the checks",
    "sparse-unified app": "serves until interrupted; tests/test_cli_generate.py opens the page",
    "sparse-unified push": "uploads; tests/test_bagel_hub.py does",
    "pytest": "BAGEL_REPO names a checkout that is not here; tests/test_surgery_official.py is run",
}
LANGUAGES = ("", "sh", "bash")
PROGRAMS = ("sparse-unified", "python", "torchrun", "make", "pip", "pytest")


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(path: Path) -> list[str]:
    """The commands of a document in order, a continued one in one line, without comments.

    `NAME="..."` on a line of its own is put in for `$NAME` below.
    """
    found: list[str] = []
    variables: dict[str, str] = {}
    for text in blocks(path, *LANGUAGES):
        continued = False
        for line in text.splitlines():
            bare = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
            if stated := re.match(r'([A-Z]+)="(.*)"', line):
                variables[stated[1]] = stated[2]
            if bare.split(" ")[0] in PROGRAMS:
                bare = string.Template(bare).safe_substitute(variables)
                found.append(re.sub(r"\s+#.*", "", bare))
                continued = True
            elif continued and line.startswith("    "):
                found[-1] += " " + line.strip()
            else:
                continued = False
    return found


def named(path: Path) -> list[str]:
    """The commands of a document that are only looked at: those in its tables, with arguments."""
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return re.findall(r"`(sparse-unified [^` ]+ [^`]+)`", "\n".join(rows))


def shrink(text: str) -> str:
    for large, small in REPLACED:
        text = text.replace(large, small)
    return text


def not_run(command: str) -> str | None:
    """The entry of NOT_RUN that a command falls under."""
    return next((words for words in NOT_RUN if command.startswith(words)), None)


def arguments_of(command: str) -> list[str]:
    """The arguments of one run: a synopsis is run without what its brackets leave open."""
    text = shrink(command)
    while (bare := re.sub(r"\[[^][]*\]", "", text)) != text:
        text = bare
    words = shlex.split(text)[1:]
    words += OPEN.get(words[0], ()) if "[" in command else ()
    return [*words, *ADDED.get(words[0], ())]


def options_named(command: str) -> list[str]:
    return re.findall(r"(?<!\w)--[a-z][a-z-]*", command)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the documents name, to be copied."""
    root = tmp_path_factory.mktemp("models")
    dense = write_checkpoint(GOLDEN / "t2i_dense", root / "BAGEL-7B-MoT")
    convert(dense, root / "BAGEL-16to8", num_experts=16, top_k=8)
    prune(dense, root / "PRUNED", [SkipLayersConfig(component="und", layers=[1])])
    for name in ("MODEL", "DENSE"):
        shutil.copytree(dense, root / name)
    for picture in analysis_models.pictures(root / "images", 2, size=(48, 32)):
        picture.with_suffix(".txt").write_text("a bench")
    shutil.copy(root / "images" / "0.png", root / "room.png")
    for name in ("FILE", "prompts.txt", "wise.txt"):
        (root / name).write_text("a bench\na dog\n")
    (root / "questions.jsonl").write_text('{"prompt": "what is it", "source": "room.png"}')
    row = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
    (root / "evaluation_metadata.jsonl").write_text(json.dumps(row))
    (root / "my_scorer.py").write_text(
        "def score(folder):\n    return {'geneval': 0.5}\n\nscore.better = {'geneval': 'higher'}\n"
    )
    for name in ("study.json", "study.md"):
        shutil.copy(ROOT / "docs" / name, root / name)
    return root


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(models, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def label(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if commands(p)], ids=label)
def test_the_commands_of_a_document_run(path: Path, folder: Path, capsys: Any) -> None:
    made: set[str] = set()
    for command in commands(path):
        if not_run(command) is not None:
            continue
        arguments = arguments_of(command)
        if arguments[0] == "examples/miniature":
            miniature(arguments[1:])
            made.add("miniature")
            continue
        writes = arguments[0] in ("convert", "prune", "invert", "adapt")
        if writes and (folder / arguments[2]).exists():
            shutil.rmtree(arguments[2])  # of the command before, or there for documents without it
            shutil.rmtree(f"{arguments[2]}.training", ignore_errors=True)
        status = main(arguments)
        output = capsys.readouterr()
        assert status == 0, f"{command}\n{shlex.join(arguments)}\n{output.out}{output.err}"
        made.add(arguments[0])
    assert made or all(not_run(command) for command in commands(path))


def test_every_command_that_is_not_run_is_there() -> None:
    found = [command for path in DOCUMENTS for command in commands(path)]
    assert {not_run(command) for command in found} - {None} == set(NOT_RUN)
    assert sum(not_run(command) is None for command in found) >= 15


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_options_that_documents_name_are_taken_by_their_command(path: Path) -> None:
    parsers = next(
        action.choices for action in build_parser()._actions if hasattr(action, "choices")
        and isinstance(action.choices, dict)
    )  # fmt: skip
    tabled = named(path)
    for written in (*commands(path), *tabled):
        command = written.replace(TORCHRUN, "sparse-unified")
        words = command.split()
        if words[0] != "sparse-unified" or words[1] in ("bench", "mini"):
            continue
        parsers[words[1]].fill()
        known = parsers[words[1]]._option_string_actions
        assert [name for name in options_named(command) if name not in known] == [], command
        if written in tabled or not_run(command):  # others are run above
            build_parser().parse_args(split_json_flag(arguments_of(command)))


def test_the_command_that_writes_29_gb_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_scale.main(["--help"])
    known = set(options_named(capsys.readouterr().out))
    for command in (command for path in DOCUMENTS for command in commands(path)):
        if command.startswith("python experiments/full_scale.py DIR"):
            assert set(options_named(command)) <= known


# Python: each document's blocks share names, as a reader's session does.


def bagel_names() -> dict[str, Any]:
    pipeline = BagelPipeline.from_pretrained("BAGEL-7B-MoT")
    return {"pipeline": pipeline, "model": pipeline.model}


def decoder_names() -> dict[str, Any]:
    ids = torch.arange(3, 12)[None]
    return {"model": analysis_models.qwen(), "ids": ids, "kept_neurons": torch.arange(4)}


class MineBlock(torch.nn.Module):
    """A block with the names of the layout that docs/analysis.md describes."""

    def __init__(self) -> None:
        super().__init__()
        layer = analysis_models.qwen().model.language_model.layers[0]
        self.ff, self.attn = layer.mlp, layer.self_attn
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm


class Mine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.blocks = torch.nn.ModuleList(MineBlock() for _ in range(2))


def analysis_names() -> dict[str, Any]:
    return {**decoder_names(), "rate": lambda image: 1.0}


def adaptation_names() -> dict[str, Any]:
    from sparse_unified.analysis import Task, built_in_samples

    model = BagelPipeline.from_pretrained("BAGEL-16to8").model
    config = model.config
    patch, pixels = config.latent_patch_size, config.vision.patch_size
    latent = torch.randn(config.token_channels // patch**2, 2 * patch, 2 * patch)
    decoder = analysis_models.qwen()
    apply_moe_(decoder, MoEConfig(component="und", num_experts=4, top_k=2, layers="all"))
    return {
        "decoder": decoder,
        "ids": torch.arange(3, 12)[None],
        "pipeline": BagelPipeline.from_pretrained("BAGEL-7B-MoT"),
        "samples": built_in_samples(Task.GENERATION, 1),
        "model": model,
        "prompt": [11, 12],
        "question": [13],
        "answer": [14, 15],
        "latent": latent,
        "noise": torch.randn_like(latent),
        "pixels": torch.randn(3, 2 * pixels, pixels),
    }


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": bagel_names,
    "adaptation.md": adaptation_names,
    "analysis.md": analysis_names,
    "diffusers.md": bagel_names,
    "evaluation.md": dict,
    "hf-kernels.md": bagel_names,
    "hub.md": bagel_names,
    "kernels.md": dict,
    "quickstart.md": bagel_names,
    "serving.md": bagel_names,
    "transformers.md": dict,
}


def test_every_document_with_python_is_run() -> None:
    assert {path.name for path in DOCUMENTS if blocks(path, "python")} == set(NAMES)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name in NAMES], ids=label)
def test_the_python_of_a_document_runs(path: Path, folder: Path) -> None:
    for name in ("BAGEL-16to8", "BAGEL-pruned"):
        if f'"{name}", num_experts' in path.read_text():
            shutil.rmtree(folder / name)  # the document makes it
    names = NAMES[path.name]()
    for text in blocks(path, "python"):
        if "transformer.blocks" in text:  # the one block about a model of another make
            exec(compile(text, str(path), "exec"), {**names, "model": Mine()})
        else:
            exec(compile(shrink(text), str(path), "exec"), names)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(shrink("".join(cell["source"])), "tour.ipynb", "exec"), names)
    assert names["seconds"].keys() == {"dense", "sparse 16/8"}
