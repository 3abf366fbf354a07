# SPDX-License-Identifier: Apache-2.0
"""One pass over samples of a task: what it counts, that it repeats, and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch

from sparse_unified.analysis import (
    Sample,
    Settings,
    StatisticsConfig,
    Task,
    built_in_samples,
    calibrate,
    score,
)

QUICK = Settings(size=(32, 32), num_timesteps=4, max_length=5)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield models.pipeline(tmp_path_factory.mktemp("calibrate"))
    torch.set_num_threads(threads)


def edits(folder: Path) -> list[Sample]:
    models.pictures(folder, 2)
    return [
        Sample(prompt=prompt, sources=(path,), seed=i)
        for i, (prompt, path) in enumerate(
            zip(("make it red", "a boat"), sorted(folder.iterdir()), strict=True)
        )
    ]


def samples_of(task: Task, folder: Path) -> list[Sample]:
    return edits(folder) if task is Task.EDITING else built_in_samples(task, 2, seed=3)


@pytest.mark.parametrize("task", list(Task))
def test_a_pass_repeats_bit_for_bit(pipeline: Any, task: Task, tmp_path: Path) -> None:
    samples = samples_of(task, tmp_path)
    files = []
    for name in ("a", "b"):
        statistics = calibrate(pipeline, task, samples, settings=QUICK)
        statistics.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert statistics.samples == {task.value: tuple(s.fingerprint() for s in samples)}
    statistics.check(pipeline)


def test_tasks_differ_in_who_works(pipeline: Any, tmp_path: Path) -> None:
    config = StatisticsConfig(num_time_ranges=3)
    found = {
        task: calibrate(pipeline, task, samples_of(task, tmp_path), settings=QUICK, config=config)
        for task in Task
    }
    layers = range(pipeline.model.config.llm.num_hidden_layers)
    understanding = found[Task.UNDERSTANDING].ffns["understanding"]
    assert list(understanding) == ["und"]
    for layer in layers:
        assert understanding["und"][layer].tokens[1:].tolist() == [0, 0, 0]
    generation = found[Task.GENERATION].ffns["generation"]
    editing = found[Task.EDITING].ffns["editing"]
    for layer in layers:
        # 32 x 32 pixels are four latent tokens; guidance adds a branch on some of three steps.
        tokens = generation["gen"][layer].tokens
        assert tokens[0] == 0
        assert 2 * 3 * 4 <= int(tokens.sum()) <= 2 * 2 * 3 * 4
        # A picture to edit is seen once as a finished image, without a time.
        assert editing["gen"][layer].tokens[0] > 0
        assert generation["und"][layer].tokens[0] > 0
    merged = found[Task.GENERATION].merge(found[Task.EDITING], found[Task.UNDERSTANDING])
    assert merged.tasks == ("generation", "editing", "understanding")
    assert list(score("activation", pipeline, merged)) == ["und"]
    assert list(score("activation", pipeline, merged, tasks=["editing"])) == ["und", "gen"]


@torch.no_grad()
def test_any_model_is_calibrated_by_how_it_is_run() -> None:
    model = models.Bailing()
    batches = [torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])]
    statistics = calibrate(model, "captions", batches, run=model)
    assert statistics.samples == {"captions": ("0", "1")}
    assert int(statistics.ffns["captions"]["text"][0].tokens.sum()) == 5
    qwen = models.qwen()
    found = calibrate(qwen, "captions", batches, run=lambda ids: qwen(input_ids=ids))
    assert [int(s.tokens.sum()) for s in found.ffns["captions"]["text"].values()] == [
        5
    ] * models.LAYERS
