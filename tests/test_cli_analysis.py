# SPDX-License-Identifier: Apache-2.0
"""calibrate, analyze and expert-usage: from a model directory to statistics, tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch
from PIL import Image

from sparse_unified.analysis import FfnStatistics, StatisticsConfig, score
from sparse_unified.analysis.criteria import Similarity
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor
from sparse_unified.cli import main

SMALL = ["--size", "32x32", "--steps", "4", "--max-tokens", "5", "--quiet"]


@pytest.fixture(scope="module")
def model(golden: Any) -> Path:
    return golden("t2i_dense")


# calibrate


def run_calibrate(model: Path, out: Path, *arguments: str) -> int:
    return main(["calibrate", str(model), "--out", str(out), *SMALL, *arguments])


def test_calibrate_writes_statistics_and_scores_that_prune_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scores = tmp_path / "s.safetensors", tmp_path / "scores.safetensors"
    more = ["--time-ranges", "3", "--threshold", "0.01", "--active-fraction", "0.5"]
    more += ["--task", "generation", "--samples", "2", "--scores", str(scores)]
    assert run_calibrate(model, out, *more) == 0
    printed = capsys.readouterr().out
    assert "generation: 2 samples" in printed
    assert f"{out}\n{scores}\n" in printed
    statistics = FfnStatistics.load(out)
    assert statistics.config == StatisticsConfig(
        threshold=0.01, active_fraction=0.5, num_time_ranges=3
    )
    expected = score("wanda", BagelPipeline.from_pretrained(model), statistics)
    header = read_header(scores)
    for component, keyed in expected.items():
        for layer, own in keyed.items():
            assert torch.equal(read_tensor(header.tensors[f"{component}.{layer}"]), own)
    pruned = ["prune", str(model), str(tmp_path / "pruned"), "--scores", str(scores), "--quiet"]
    assert main([*pruned, "--component", "gen", "--keep-ratio", "0.5"]) == 0
    # The file says what it is, and is refused by another model.
    recipe = (tmp_path / "pruned" / "sparse_unified.json").read_text()
    of_model = f"gen FFNs {statistics.model_hashes['gen']}"
    assert f"file scores.safetensors (wanda, 2 of generation, {of_model})" in recipe
    capsys.readouterr()
    again = ["prune", str(tmp_path / "pruned"), str(tmp_path / "again"), "--scores", str(scores)]
    for words in ("--axis width", "--axis depth"):
        named = [*again, "--component", "gen", "--keep-ratio", "0.5", *words.split(), "--quiet"]
        assert main(named) == 1
        assert "must be of this model, whose gen FFNs have" in capsys.readouterr().err
    # Layers go by the similarity that was measured.
    pruned[2] = str(tmp_path / "shallow")
    arguments = ["--component", "gen", "--axis", "depth", "--keep-ratio", "0.5"]
    assert main([*pruned, *arguments]) == 0
    similarity = Similarity.of_scores(scores)
    values = {e["layer"]: e["block"] for e in similarity.layers if e["component"] == "gen"}
    (step,) = json.loads((tmp_path / "shallow" / "sparse_unified.json").read_text())["steps"]
    count = len(values) - round(len(values) / 2)
    gone = sorted(sorted(values, key=lambda n: -values[n])[:count])
    assert step["config"]["layers"] == gone
    assert gone


def test_an_expert_without_tokens_has_no_score_and_statistics_stay(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse, out, scores = (tmp_path / name for name in ("sparse", "s.safetensors", "x.safetensors"))
    assert main(["convert", str(model), str(sparse), "--num-experts=4", "--top-k=1"]) == 0
    arguments = ["--task", "generation", "--samples", "1", "--component", "gen"]
    assert run_calibrate(sparse, out, *arguments, "--scores", str(scores)) == 1
    error = capsys.readouterr().err
    assert "layers.1.mlp_moe_gen.experts.1: tokens must be at least one, got none; " in error
    assert "--router-init activation" in error
    assert not scores.exists()
    assert len(FfnStatistics.load(out).of("generation", "gen")) == 2 + 4


def test_calibrate_merges_and_prints_json(model: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run_calibrate(model, first, "--task", "understanding", "--samples", "1") == 0
    more = ["--task", "generation", "--samples", "1", "--merge", str(first)]
    assert run_calibrate(model, second, *more) == 0
    assert FfnStatistics.load(second).tasks == ("generation", "understanding")
    capsys.readouterr()
    third = ["--task", "generation", "--samples", "2", "--seed", "9", "--merge", str(second)]
    assert run_calibrate(model, tmp_path / "c.safetensors", *third, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tasks"]["generation"]["samples"] == 3
    gen = facts["tasks"]["generation"]["components"]["gen"]
    assert gen["tokens"] > 0
    assert 0 < gen["sample_overlap"] <= 1


# analyze


def analyze(model: Path, out: Path, *arguments: str) -> int:
    return main(["analyze", str(model), "--out", str(out), *SMALL, "--repeats", "1", *arguments])


@pytest.mark.slow
def test_all_tasks_and_axes_in_one_command(model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    models.pictures(tmp_path / "images", 2)
    (tmp_path / "prompts.txt").write_text("make it red\na boat\n")
    arguments = [
        *("--prompts", f"{tmp_path}/prompts.txt", "--images", f"{tmp_path}/images"),
        *("--task", "generation,understanding,editing", "--component", "und,gen"),
        *("--axis", "depth,width,heads", "--ratios", ".5"),
        *("--json", f"{tmp_path}/result.json"),
    ]
    assert analyze(model, out, *arguments) == 0
    assert "Not swept: gen has no tokens in understanding" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads((out / "results.json").read_text())
    assert (out / "report.md").read_text().count("\n## ") == 3
    for task, metrics in {
        "generation": ["latent_distance", "image_distance", "velocity_error"],
        "understanding": ["text_agreement", "perplexity"],
        "editing": ["latent_distance", "image_distance"],
    }.items():
        own, is_drawn = result["tasks"][task], task != "understanding"
        assert list(own["better"]) == metrics
        assert own["idle"] == ([] if is_drawn else ["gen"])
        assert len(own["points"]) == (2 if is_drawn else 1) * 3
        for row in own["points"]:
            assert not is_drawn or row["metrics"]["latent_distance"] > 0
            assert row["after"]["flops"] < row["before"]["flops"]
        for kind in ("sensitivity", "similarity", "activation", "overlap"):
            assert min(Image.open(out / "plots" / f"{kind}-{task}.png").size) > 300
    maps = {found["component"]: found for found in result["tasks"]["editing"]["activation"]}
    assert maps["gen"]["ranges"][0] == "1-0.875"  # from noise to image
    assert maps["gen"]["ranges"][-1] == "no time"  # the image that is edited


def test_editing_needs_no_files(model: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--task", "editing", "--samples", "1", "--component", "gen", "--axis", "width"]
    arguments += ["--ratios", ".5", "--no-plots", "--json"]
    assert analyze(model, tmp_path / "out", *arguments) == 0
    (point,) = json.loads(capsys.readouterr().out)["tasks"]["editing"]["points"]
    assert point["metrics"]["latent_distance"] > 0
    assert analyze(model, tmp_path / "out", *arguments) == 0  # drawn anew, and the same run


def test_prompts_and_evaluators_of_ones_own_and_geneval_images_of_one_protocol(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a cup", "a boat"):
        metadata = {"tag": "single", "include": [{"class": name}], "prompt": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(metadata))
    (tmp_path / "p.txt").write_text("a bench\n")
    (tmp_path / "mine.py").write_text(
        "def parameters(pipeline):\n"
        "    return {'parameters': sum(p.numel() for p in pipeline.model.parameters())}\n"
        "parameters.better = {'parameters': 'lower'}\n"
        "def score(folder):\n"
        "    return {'score': len(list(folder.glob('*/samples/*.png')))}\n"
        "score.better = {'score': 'higher'}\n"
    )
    out = tmp_path / "out"
    arguments = [
        *("--task", "generation", "--component", "gen", "--axis", "width", "--ratios", ".5"),
        *("--criterion", "magnitude", "--prompts", f"generation={tmp_path}/p.txt"),
        *("--evaluator", f"{tmp_path}/mine.py:parameters", "--no-plots", "--json"),
    ]
    scored = ["--geneval-scorer", f"{tmp_path}/mine.py:score", "--geneval-images"]
    for _ in range(2):
        assert (
            analyze(model, out, *arguments, "--geneval", f"{tmp_path}/a cup.jsonl", *scored, "2")
            == 0
        )
        result = json.loads(capsys.readouterr().out)
    assert len(result["run"]["tasks"]["generation"]["samples"]) == 1
    task = result["tasks"]["generation"]
    (point,) = task["points"]
    assert point["metrics"]["parameters"] == point["after"]["parameters"]
    assert task["dense"]["parameters"] == point["before"]["parameters"]
    assert task["dense"]["score"] == point["metrics"]["score"] == 2
    names = {path.parent.parent.parent.name for path in out.glob("geneval/*/00000/samples/*1.png")}
    assert names == {"generation-dense", "generation-gen-width-0.5"}
    assert not (out / "plots").exists()
    for name, count in (("a boat", "2"), ("a cup", "1"), ("", "")):
        other = ["--geneval", f"{tmp_path}/{name}.jsonl", *scored, count] if name else []
        assert analyze(model, out, *arguments, *other) == 1
        assert "must be of the same run, or another folder, got " in capsys.readouterr().err


# Refusals

ANALYZE = ["analyze", "--task", "generation", "--out", "OUT", "--repeats", "1"]
CALIBRATE = ["calibrate", "--task", "generation", "--out", "OUT"]
USAGE = ["expert-usage", "--task", "generation"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (CALIBRATE, "--threshold -1", "threshold must be"),
        (CALIBRATE, "--merge none", "file must be readable"),
        (USAGE, "--component und", "must have sparse FFNs of und, got none"),
        (USAGE, "--plot none/x.png", "--plot: directory must be there and writable"),
        (ANALYZE, "--block-size 64", "block_size must divide the 96 neurons"),
        (ANALYZE, "--evaluator no_such:f", "module no_such must be importable"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    model: Path, command: list[str], options: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    out = str(tmp_path / "out")
    name, *own = [out if option == "OUT" else option for option in command]
    assert main([name, str(model), *own, *SMALL, *options.split()]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
