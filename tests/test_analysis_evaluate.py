# SPDX-License-Identifier: Apache-2.0
"""evaluate: models side by side, whole, in shards, and interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
from PIL import Image
from refusals import refused

from sparse_unified.analysis import Sample, Settings
from sparse_unified.analysis.evaluate import Evaluation, evaluate
from sparse_unified.checkpoint import PruneWidthConfig, prune
from sparse_unified.cli import main

GENEVAL = [{"tag": "one", "include": [{}], "prompt": text} for text in ("a bench", "two cups")]


@pytest.fixture(scope="module")
def dense(golden: Any) -> Path:
    return golden("t2i_dense")


@pytest.fixture
def arguments(dense: Path, tmp_path: Path) -> list[str]:
    """Returns arguments that evaluate the dense model and half of it."""
    prune(dense, tmp_path / "half", PruneWidthConfig(component="und", keep_ratio=0.5))
    models.pictures(tmp_path / "pictures", 1)
    picture = str(next((tmp_path / "pictures").iterdir()))
    drawn = [{"prompt": "a red bench", "image": picture}, {"prompt": "a boat", "image": picture}]
    asked = [{"prompt": "what is it", "source": picture, "answer": "a bench"}]
    for name, lines in (("gen", drawn), ("und", asked), ("meta", GENEVAL)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "mine.py").write_text(
        "def score(folder):\n    return {'score': len(list(folder.glob('*/samples/*.png')))}\n"
        "score.better = {'score': 'higher'}\n"
    )
    return [
        *("evaluate", str(tmp_path / "half"), "--reference", str(dense), "--quiet"),
        *("--task", "generation,understanding", "--size", "32x32", "--steps", "4"),
        *("--max-tokens", "5", "--batch-size", "1", "--cfg-text-scale", "2"),
        *("--prompts", f"generation={tmp_path}/gen.jsonl"),
        *("--prompts", f"understanding={tmp_path}/und.jsonl"),
        *("--geneval", f"{tmp_path}/meta.jsonl", "--geneval-images", "2"),
        *("--geneval-scorer", f"{tmp_path}/mine.py:score"),
    ]


def test_active_experts_are_those_asked_for(golden: Any, dense: Path, tmp_path: Path) -> None:
    samples = {"generation": [Sample(prompt="a bench", seed=0)]}
    sparse, size = golden("t2i_moe"), (32, 32)

    def run(name: str, **top_k: Any) -> tuple[Any, Any]:
        settings = Settings(size=size, num_timesteps=5, timestep_shift=1.0, **top_k)
        found = evaluate([sparse], tmp_path / name, samples, reference=dense, settings=settings)
        return found.models

    _, own = run("own")
    _, same = run("same", top_k=2)
    _, mixed = run("mixed", top_k=((1.0, 1), (0.5, 4)))
    _, all_of_them = run("all", top_k=4)
    assert own["metrics"] == same["metrics"] != mixed["metrics"] != all_of_them["metrics"]
    assert all_of_them["active"] == all_of_them["parameters"] != own["active"]
    # Two steps with one expert and two with four are 2.5 on average, and its own are 2.
    assert 4 * mixed["active"] == 3 * own["active"] + all_of_them["active"]
    given = ([dense], tmp_path / "no", samples)
    refused("top_k must come with a sparse", evaluate, *given, settings=Settings(top_k=2))


def test_the_report_names_the_settings_and_says_which_are_official() -> None:
    row = {"name": "a", "kind": "dense", "parameters": 1, "active": 1, "metrics": {}, "seconds": {}}
    for settings, is_official in ((Settings(top_k=2), True), (Settings(timestep_shift=1.0), False)):
        run = {"settings": settings.stated(), "dtype": "float32", "device": "cpu"}
        text = Evaluation(run=run, better={}, models=(row,), left=0).to_markdown()
        assert "num_timesteps 25" in text
        assert ("official guidance and shift" in text) is is_official
        assert ("timestep_shift 1.0" in text) is not is_official


def comparable(folder: Path) -> Any:
    found = json.loads((folder / "results.json").read_text())
    for row in found["models"]:
        assert row.pop("seconds")
    return found


def test_models_stand_side_by_side_whole_or_in_shards(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", [tmp_path / "a", tmp_path / "b"]
    assert main([*arguments, "--out", str(whole)]) == 0
    assert "not finished" not in capsys.readouterr().out
    found = comparable(whole)
    reference, half = found["models"]
    assert (reference["kind"], half["kind"]) == ("dense", "pruned")
    assert half["active"] < reference["active"]
    own = reference["metrics"]
    assert own["latent_distance"]["mean"] == own["image_distance"]["mean"] == 0
    assert own["text_agreement"]["mean"] == 1
    for name in ("latent_distance", "perplexity", "velocity_error"):
        assert half["metrics"][name] != own[name]
    assert half["metrics"]["latent_distance"]["n"] == 2
    assert half["metrics"]["answers"]["mean"] == 0
    assert half["metrics"]["score"]["mean"] == 4
    assert min(Image.open(whole / "collage-generation.png").size) > 300
    assert "half" in (whole / "report.md").read_text()
    (line,) = (whole / "answers.jsonl").read_text().splitlines()
    assert set(json.loads(line)["answers"]) == {found["run"]["reference"], "half"}
    # Two shards in two folders, which are then copied together.
    for number, out in enumerate(parts):
        assert main([*arguments, "--out", str(out), "--shard", f"{number}/2"]) == 0
        assert "not finished" in capsys.readouterr().out
        assert not (out / "results.json").exists()
    shutil.copytree(parts[1], parts[0], dirs_exist_ok=True)
    assert main([*arguments, "--out", str(parts[0])]) == 0
    assert comparable(parts[0]) == found


def test_a_run_goes_on_and_is_of_one_kind(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([*arguments, "--out", out]) == 0
    points = tmp_path / "out" / "points.jsonl"
    lines = points.read_text().splitlines()
    points.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])  # torn by a kill
    before = comparable(tmp_path / "out")
    assert main([*arguments, "--out", out]) == 0
    assert comparable(tmp_path / "out") == before
    assert main([*arguments, "--out", out, "--cfg-interval", "0,1"]) == 1
    assert "must be of the same run" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "other" / dense.name)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="directories must be one or more of different names"):
        evaluate([dense, tmp_path / "other" / dense.name], out, {})
    with pytest.raises(ValueError, match="samples must be given for a task, or geneval"):
        evaluate([dense], out, {})
    with pytest.raises(ValueError, match="shard must be i of n"):
        evaluate([dense], out, {"generation": []}, shard=(2, 2))
