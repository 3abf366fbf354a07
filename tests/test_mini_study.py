# SPDX-License-Identifier: Apache-2.0
"""The trained models of the miniature, and the study that is made with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from miniature.__main__ import main
from miniature.data import training_data
from miniature.evaluate import EvaluationConfig, evaluate, generate, velocity_error
from miniature.report import BEGIN, END, Verdict, fill_page, read_records, verdicts
from miniature.study import StudyConfig, run_study
from sparse_unified.bagel.packing import LatentSegment, TextSegment, VitSegment
from sparse_unified.checkpoint import convert
from sparse_unified.mini.model import WEIGHTS, MiniTask, load_pipeline, write_model
from sparse_unified.nn import SparseMoE

SMALL = StudyConfig(seeds=(0,), steps=2, batch_size=16, questions=6, velocities=6, pictures=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    return {task: write_model(task, root / task.value) for task in MiniTask}


@pytest.mark.parametrize("task", MiniTask)
def test_sequences_are_functions_of_index_and_generator(task):
    data = training_data(task)
    kinds = set()
    for index in (0, 1, 2, 3, len(data) - 2, len(data) - 1):
        first, again = (data.sequence(index, torch.Generator().manual_seed(7)) for _ in range(2))
        assert [type(segment) for segment in first] == [type(segment) for segment in again]
        for one, other in zip(first, again, strict=True):
            kinds.add(type(one))
            if isinstance(one, LatentSegment):
                assert index % 2 == 0
                assert torch.equal(one.latent, other.latent)
                assert torch.equal(one.noise, other.noise)
                assert one.time == other.time
            elif isinstance(one, VitSegment):
                assert index % 2 == 1
                assert torch.equal(one.pixels, other.pixels)
            else:
                assert one == other
    assert kinds == {LatentSegment, VitSegment, TextSegment}


@pytest.mark.parametrize("task", MiniTask)
def test_what_is_shipped_says_how_it_was_made_and_is_small(task):
    folder = WEIGHTS / task.value
    assert (folder / "ema.safetensors").stat().st_size <= 4 * 2**20
    about = json.loads((folder / "training.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert about["command"] == f"python examples/miniature train {task.value} OUT"
    assert log[-1]["step"] == about["training"]["steps"]
    assert log[-1]["loss"] < log[0]["loss"] / 4
    with safe_open(folder / "ema.safetensors", "pt") as file:
        counted = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert counted == about["parameters"]


def test_the_trained_model_of_digits_reads_and_draws(dense):
    model = load_pipeline(dense[MiniTask.DIGITS]).model
    found = evaluate(model, MiniTask.DIGITS, EvaluationConfig(questions=100, pictures=3))
    assert found["understanding"] >= 0.93
    assert found["velocity"] <= 0.31
    assert found["generation"] >= 0.5


def test_the_trained_model_of_scenes_reads_and_draws(dense):
    model = load_pipeline(dense[MiniTask.SCENES]).model
    found = evaluate(model, MiniTask.SCENES, EvaluationConfig(questions=90, pictures=4))
    assert found["velocity"] <= 0.16
    assert found["question_colour"] >= 0.85
    assert found["question_count"] >= 0.75
    assert found["generation"] >= 0.5


@pytest.mark.parametrize("task", MiniTask)
def test_all_experts_together_are_the_dense_model(task, dense, tmp_path):
    convert(dense[task], tmp_path / "sparse", num_experts=32, top_k=32, layers="all")
    models = [load_pipeline(path).model for path in (dense[task], tmp_path / "sparse")]
    assert sum(isinstance(m, SparseMoE) for m in models[1].modules()) == 6
    few = EvaluationConfig(velocities=20)
    errors = [velocity_error(model, task, few) for model in models]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    prompts = ["the digit two", "a red square"]
    pictures = [generate(model, task, prompts, [0, 1]) for model in models]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)


def test_the_study_runs_and_goes_on_where_it_stopped(tmp_path):
    names = ("dense", "sparse-16-8", "coactivation-16-8")
    options = {"tasks": (MiniTask.DIGITS,), "names": names}
    run: list[str] = []
    files = run_study(tmp_path, SMALL, **options, progress=lambda p, *_: run.append(p.name))
    assert run == list(names)
    kept = [file.read_bytes() for file in files]
    files[0].unlink()
    run_study(tmp_path, SMALL, **options, progress=lambda p, *_: run.append(p.name))
    assert run[3:] == ["dense"]
    assert [file.read_bytes() for file in files] == kept
    snake, together = (json.loads(file.read_text())["results"] for file in files[1:])
    assert set(snake) == {"zero", "untrained", "router", "expert_frozen", "full"}
    with pytest.raises(ValueError, match="config must be that of this study"):
        run_study(tmp_path, StudyConfig(seeds=(0,), steps=3), **options)

    records = read_records(tmp_path)
    assert {v.result for v in verdicts(records) if v.task == "scenes"} == {"not run"}
    compared = [v for v in verdicts(records) if v.task == "digits" and "coactivation" in v.text]
    for verdict, stage in zip(compared, ("untrained", "full"), strict=True):
        gain = snake[stage]["velocity"] - together[stage]["velocity"]
        assert gain != 0
        assert verdict.differences == (gain,)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    fill_page(page, records)
    assert "control: static half, untrained | 0 | not run" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    main(["report", str(tmp_path), "--json", str(tmp_path / "all.json")])
    assert read_records(tmp_path / "all.json") == records


def test_a_verdict_needs_every_seed():
    def result(*differences: float) -> str:
        return Verdict(task="digits", text="", differences=differences).result

    assert result(0.1, 0.2) == "holds"
    assert result(0.1, -0.2) == "undecided"
    assert result(-0.1, 0.0) == "does not hold"
    assert result() == "not run"
