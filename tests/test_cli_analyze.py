# SPDX-License-Identifier: Apache-2.0
"""`sparse-unified analyze`: one command from a model directory to tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import analysis_models as models
import pytest
from PIL import Image

from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint

SMALL = ["--size", "32x32", "--steps", "3", "--max-tokens", "5", "--repeats", "1", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(models.GOLDEN / "t2i_dense", tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def samples(tmp_path: Path) -> list[str]:
    models.pictures(tmp_path / "images", 2)
    (tmp_path / "prompts.txt").write_text("make it red\na boat\n")
    return ["--prompts", f"{tmp_path}/prompts.txt", "--images", f"{tmp_path}/images"]


def analyze(model: Path, out: Path, *arguments: str) -> int:
    return main(["analyze", str(model), "--out", str(out), *SMALL, *arguments])


def test_all_tasks_and_axes_in_one_command(
    model: Path, samples: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        *samples,
        *("--task", "generation,understanding,editing", "--component", "und,gen"),
        *("--axis", "depth,width,heads", "--ratios", ".5"),
        *("--json", f"{tmp_path}/result.json"),
    ]
    assert analyze(model, out, *arguments) == 0
    printed = capsys.readouterr().out
    for word in ("generation", "latent_distance", "velocity_error", "perplexity", "und", "heads"):
        assert word in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((out / "results.json").read_text())
    assert {name: len(task["points"]) for name, task in result["tasks"].items()} == {
        "generation": 6,
        "understanding": 3,
        "editing": 6,
    }
    report = (out / "report.md").read_text()
    assert report.count("\n## ") == 3
    plots = {path.stem: Image.open(path).size for path in (out / "plots").iterdir()}
    for task in result["tasks"]:
        for kind in ("sensitivity", "similarity", "activation", "overlap"):
            assert min(plots[f"{kind}-{task}"]) > 300
    maps = {found["component"]: found for found in result["tasks"]["editing"]["activation"]}
    assert maps["gen"]["ranges"][0] == "1-0.875"  # from noise to image
    assert maps["gen"]["ranges"][-1] == "no time"  # the picture that is edited
    for found in maps.values():
        assert all(0 <= rate <= 1 for row in found["firing"] for rate in row if rate is not None)
        assert all(0 < share <= 1 for share in found["overlap"])
    # A second run finds everything done.
    assert analyze(model, out, *arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert analyze(model, out, *arguments, "--seed", "1") == 1
    assert "must be of the same run, or another folder, got sweep.seed 0" in capsys.readouterr().err


def test_editing_needs_no_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "editing", "--samples", "1", "--component", "gen", "--axis", "width"]
    arguments += ["--ratios", ".5", "--no-plots", "--json"]
    assert analyze(model, tmp_path / "out", *arguments) == 0
    (point,) = json.loads(capsys.readouterr().out)["tasks"]["editing"]["points"]
    assert point["metrics"]["latent_distance"] > 0
    assert analyze(model, tmp_path / "out", *arguments) == 0  # drawn anew, and the same run


def test_statistics_of_one_run_serve_another(
    model: Path, samples: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*samples, "--task", "generation", "--component", "gen", "--axis", "width"]
    common += ["--ratios", ".5", "--no-plots", "--json"]
    assert analyze(model, tmp_path / "a", *common) == 0
    first = json.loads(capsys.readouterr().out)["tasks"]["generation"]
    file = tmp_path / "a" / "statistics-generation.safetensors"
    assert analyze(model, tmp_path / "b", *common, "--stats", str(file)) == 0
    second = json.loads(capsys.readouterr().out)["tasks"]["generation"]
    assert second["points"][0]["metrics"] == first["points"][0]["metrics"]
    assert second["activation"] == first["activation"]
    assert not (tmp_path / "b" / "statistics-generation.safetensors").exists()
    others = write_checkpoint(models.GOLDEN / "edit", tmp_path / "other")
    assert analyze(others, tmp_path / "c", *common, "--stats", str(file)) == 1
    assert "statistics" in capsys.readouterr().err


def test_built_in_prompts_evaluators_of_ones_own_and_geneval(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def parameters(pipeline):\n"
        "    return {'parameters': sum(p.numel() for p in pipeline.model.parameters())}\n"
        "parameters.better = {'parameters': 'lower'}\n"
        "def score(folder):\n"
        "    return {'score': len(list(folder.glob('*/samples/*.png')))}\n"
        "score.better = {'score': 'higher'}\n"
    )
    metadata = {
        "tag": "single",
        "include": [{"class": "cup", "count": 1}],
        "prompt": "a cup",
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(metadata))
    out = tmp_path / "out"
    status = analyze(
        model,
        out,
        *("--task", "generation", "--component", "gen", "--axis", "width", "--ratios", ".5"),
        *("--criterion", "magnitude", "--samples", "1", "--no-plots", "--json"),
        *("--evaluator", f"{file}:parameters", "--geneval", f"{tmp_path}/metadata.jsonl"),
        *("--geneval-images", "2", "--geneval-scorer", f"{file}:score"),
    )
    assert status == 0
    task = json.loads(capsys.readouterr().out)["tasks"]["generation"]
    (point,) = task["points"]
    assert point["metrics"]["parameters"] == point["after"]["parameters"]
    assert task["dense"]["parameters"] == point["before"]["parameters"]
    assert task["dense"]["score"] == point["metrics"]["score"] == 2
    for name in ("generation-dense", "generation-gen-width-0.5"):
        assert (out / "geneval" / name / "00000" / "samples" / "00001.png").exists()
    assert not (out / "plots").exists()


def test_tasks_can_have_samples_of_their_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.pictures(tmp_path, 1)
    (tmp_path / "e.jsonl").write_text('{"prompt": "make it red", "source": "0.png"}\n')
    status = analyze(
        model,
        tmp_path / "out",
        *("--task", "understanding,editing", "--component", "und", "--axis", "depth"),
        *("--ratios", "1", "--prompts", f"editing={tmp_path}/e.jsonl", "--no-plots", "--json"),
    )
    assert status == 0
    tasks = json.loads(capsys.readouterr().out)["run"]["tasks"]
    assert (len(tasks["understanding"]["samples"]), len(tasks["editing"]["samples"])) == (8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--component", "vision"], "component must be one of und, gen, got 'vision'"),
        (["--layers", "1-9"], "layers must lie in 0 to 2, got 3"),
        (["--block-size", "8"], "block_size must be 1 or 16 to 128, got 8"),
        (["--block-size", "64"], "block_size must divide the 96 neurons"),
        (["--evaluator", "no_such:f"], "module no_such must be importable"),
        (["--samples", "99"], "must hold --samples = 99 prompts, got 8"),
    ],
)
def test_what_the_model_cannot_do_ends_in_one_line(
    model: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert analyze(model, tmp_path / "out", "--task", "generation", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
