# SPDX-License-Identifier: Apache-2.0
"""Criteria find the neurons that were planted as important; the official one does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import analysis_models as models
import pytest
import torch
from refusals import refused

from sparse_unified.analysis import (
    CRITERIA,
    FfnStatistics,
    collect,
    save_scores,
    score,
)
from sparse_unified.checkpoint.scores import given_scores
from sparse_unified.experts.keep import magnitude_scores, random_scores
from sparse_unified.surgery.decoder import find_adapter


@torch.no_grad()
def gather(model: models.Official, task: str = "generation", seed: int = 0) -> FfnStatistics:
    torch.manual_seed(seed)
    with collect(model, task) as collector:
        for sample in range(3):
            collector.begin(f"{task}-{seed}-{sample}")
            text, vae = torch.tensor([0, 1, 6]), torch.tensor([2, 3, 4, 5])
            model(torch.randn(7, models.HIDDEN), text, vae)
    return collector.statistics()


@pytest.fixture(scope="module")
def model() -> models.Official:
    return models.Official()


@pytest.fixture(scope="module")
def statistics(model: models.Official) -> FfnStatistics:
    return gather(model)


def test_criteria_are_their_formulas(model: models.Official, statistics: FfnStatistics) -> None:
    scores = {name: score(name, model, statistics, seed=3) for name in CRITERIA}
    squared = score(lambda ffn, mean_abs, seed: mean_abs().square(), model, statistics)
    for component in ("und", "gen"):
        for ffn in find_adapter(model).ffns(component):
            mean = statistics.of("generation", component)[ffn.key].mean_abs()
            norms = torch.linalg.vector_norm(ffn.down_proj.double(), dim=0)
            for name, expected in (
                ("activation", mean),
                ("wanda", mean * norms),
                ("reference", mean.mean() * norms),
                ("magnitude", magnitude_scores(ffn.gate_proj, ffn.up_proj, ffn.down_proj)),
                ("random", random_scores(models.WIDTH, seed=3, layer=ffn.layer)),
            ):
                own = scores[name][component][ffn.key]
                assert own.dtype == torch.float32
                torch.testing.assert_close(own, expected.float())
            torch.testing.assert_close(squared[component][ffn.key], mean.square().float())


def test_magnitude_and_random_need_no_statistics(model: models.Official) -> None:
    for name in CRITERIA:
        if name in ("magnitude", "random"):
            assert score(name, model).keys() == {"und", "gen"}
        else:
            refused(f"{name}: .*statistics must be given", score, name, model)
    own = list(score("random", models.Bailing(), seed=1)["und"].values())
    assert len({tuple(scores.tolist()) for scores in own}) == len(own)  # each expert its own draw


def test_tasks_count_alike_however_many_tokens_they_have(model: models.Official) -> None:
    first, second = gather(model, "generation", 1), gather(model, "editing", 2)
    both = first.merge(second).merge(gather(model, "editing", 3))
    means = [both.of(task, "gen")[0].mean_abs() for task in ("generation", "editing")]
    own = score("activation", model, both)["gen"][0]
    torch.testing.assert_close(own, ((means[0] + means[1]) / 2).float())
    alone = score("activation", model, both, tasks=["editing"], components=["gen"])
    assert list(alone) == ["gen"]
    torch.testing.assert_close(alone["gen"][0], means[1].float())
    for tasks in (["talk"], []):
        with pytest.raises(ValueError, match="tasks must be of generation, editing"):
            score("activation", model, both, tasks=tasks)


def test_scores_file_is_what_convert_and_prune_read(tmp_path: Path) -> None:
    scores = score("magnitude", models.bagel())
    path = tmp_path / "scores.safetensors"
    save_scores(path, scores)
    for component, keyed in scores.items():
        sizes = {layer: len(own) for layer, own in keyed.items()}
        given = given_scores(path, component, sizes, len(keyed))
        assert given is not None
        assert all(torch.equal(given[layer], own) for layer, own in keyed.items())
    # Of experts they are joined, the shared one first.
    parts = {(1, "mlp.experts.0"): torch.ones(2), (1, "mlp.shared_expert"): torch.zeros(3)}
    save_scores(path, {"gen": parts})
    given = given_scores(path, "gen", {1: 5}, 2)
    assert given is not None
    assert given[1].tolist() == [0, 0, 0, 1, 1]
    path.unlink()
    for none in ({}, {"gen": {}}):
        refused("scores must be given for at least one layer", save_scores, path, none)
    assert not path.exists()


def test_what_does_not_fit_is_refused(model: models.Official, statistics: FfnStatistics) -> None:
    with pytest.raises(ValueError, match="criterion must be one of activation, wanda, magni"):
        score("nonsense", model, statistics)
    idle = {
        of: dataclasses.replace(sums, tokens=torch.zeros_like(sums.tokens))
        for of, sums in statistics.ffns.items()
        if of[1] == "gen"
    }
    partly = dataclasses.replace(statistics, ffns={**statistics.ffns, **idle})
    refused("tokens must be at least one, got none", score, "activation", model, partly)
