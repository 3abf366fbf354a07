# SPDX-License-Identifier: Apache-2.0
"""Maps say what the statistics say, layer by layer, from noise to image."""

from __future__ import annotations

import json
from typing import Any

import analysis_models as models
import pytest
import torch

from sparse_unified.analysis import StatisticsConfig, activation_maps, collect


def statistics_of(model: Any, run: Any, **config: Any) -> Any:
    with collect(model, "task", config=StatisticsConfig(**config)) as collector:
        for sample in ("a", "b"):
            collector.begin(sample)
            run(sample)
    return collector.statistics()


@torch.no_grad()
def test_columns_run_from_noise_to_image_and_end_with_what_has_no_time() -> None:
    model = models.bagel()

    def run(sample: str) -> None:
        contexts = model.new_contexts(1)
        model.prefill_text(contexts, [[10, 11 if sample == "a" else 12]])
        for time in (0.9, 0.2):  # the ranges between stay empty
            x = torch.randn(4, model.config.token_channels)
            model.velocity([x], [(2, 2)], torch.tensor([time]), [contexts])

    statistics = statistics_of(model, run, num_time_ranges=4, active_fraction=0.25)
    und, gen = activation_maps(statistics, "task")
    assert (und.component, gen.component) == ("und", "gen")
    assert gen.layers == [0, 1, 2]
    assert gen.ranges == ["1-0.75", "0.25-0"]
    assert und.ranges == ["1-0.75", "0.25-0", "no time"]
    rates = statistics.firing_rate("task", "gen")
    assert torch.equal(gen.firing, rates[:, [4, 1]])
    assert torch.equal(gen.overlap, statistics.sample_overlap("task", "gen").nanmean(1))
    assert gen.steps.isnan().all()  # no sample has two ranges side by side
    assert gen.chance == pytest.approx(0.25 / 1.75)
    plain = json.loads(json.dumps(gen.to_dict(), allow_nan=False))
    assert plain["steps"] == [None] * 3
    assert plain["firing"] == gen.firing.tolist()


@torch.no_grad()
def test_layers_of_a_mixture_are_means_over_the_experts_that_saw_tokens() -> None:
    model = models.Bailing()
    tokens = {"a": torch.tensor([[3]]), "b": torch.tensor([[5]])}
    statistics = statistics_of(model, lambda sample: model(tokens[sample]))
    (found,) = activation_maps(statistics, "task")
    rates = statistics.firing_rate("task", "text")[:, 0]
    keys = statistics.keys("task", "text")
    assert found.layers == [0, 1, 2]
    own = torch.stack(
        [r for k, r in zip(keys, rates, strict=True) if isinstance(k, tuple) and k[0] == 1]
    )
    assert own.isnan().any()  # two samples of one token leave experts idle
    assert found.firing[1, 0] == own.nanmean()


def test_a_task_without_statistics_has_no_maps() -> None:
    model = models.qwen()
    statistics = statistics_of(model, lambda sample: model(torch.arange(3, 9)[None]))
    assert activation_maps(statistics, "other") == []
