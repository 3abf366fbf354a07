# SPDX-License-Identifier: Apache-2.0
"""Statistics are the sums of what the FFNs did, survive a file, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import analysis_models as models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.analysis import (
    FfnStatistics,
    Sample,
    Settings,
    StatisticsConfig,
    Task,
    built_in_samples,
    calibrate,
    collect,
    score,
)
from sparse_unified.analysis.statistics import FfnSums, hash_model, unpack_bits
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.sampler import timestep_grid
from sparse_unified.checkpoint.safetensors_io import read_header
from sparse_unified.ops import reference
from sparse_unified.surgery.decoder import find_adapter

CONFIG = StatisticsConfig(threshold=0.05, active_fraction=0.25, num_time_ranges=3)
QUICK = Settings(size=(32, 32), num_timesteps=4, max_length=5)


def ids(seed: int, length: int = 9) -> Tensor:
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def gather(model: Any, samples: dict[str, Tensor], task: str = "text") -> FfnStatistics:
    with collect(model, task, config=CONFIG) as collector:
        for name, tokens in samples.items():
            collector.begin(name)
            model(tokens)
    return collector.statistics()


@pytest.fixture
def model() -> models.Bailing:
    return models.Bailing()


@pytest.fixture
def statistics(model: models.Bailing) -> FfnStatistics:
    return gather(model, {"a": ids(1), "b": ids(2, 5), "c": ids(3)})


def inputs_of(model: Any, tokens: Tensor) -> dict[Any, Tensor]:
    """x [T, D] that each FFN sees, by hooks of the test."""
    seen: dict[Any, Tensor] = {}
    handles = [
        ffn.module.register_forward_hook(
            lambda _, given, __, key=ffn.key: seen.update({key: given[0].flatten(0, -2)})
        )
        for ffn in find_adapter(model).ffns("und")
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


# What is counted


def test_sums_and_active_sets_are_those_of_what_each_ffn_saw(model: models.Bailing) -> None:
    samples = {"a": ids(1), "b": ids(2, 5)}
    statistics = gather(model, samples)
    seen = [inputs_of(model, tokens) for tokens in samples.values()]
    for ffn in find_adapter(model).ffns("und"):
        x = torch.cat([own[ffn.key] for own in seen if ffn.key in own])
        sums = statistics.of("text", "und")[ffn.key]
        weights = (ffn.gate_proj.double(), ffn.up_proj.double())
        exact = reference.ffn_importance(x.double(), *weights, 0.05)
        assert sums.tokens.tolist() == [len(x), 0, 0, 0]
        for name, expected in zip(("sum_abs", "sum_squares", "num_fired"), exact, strict=True):
            own = getattr(sums, name)
            torch.testing.assert_close(own[0], expected.double(), rtol=1e-5, atol=1e-6)
            assert torch.count_nonzero(own[1:]) == 0
        mean = sums.mean_abs()
        torch.testing.assert_close(mean, exact[0] / len(x), rtol=1e-5, atol=1e-6)
    ffn, active = find_adapter(model).ffns("und")[0], statistics.of("text", "und")[0].active
    for own, x in zip(unpack_bits(active), (found[0] for found in seen), strict=True):
        mean = (F.silu(x @ ffn.gate_proj.t()) * (x @ ffn.up_proj.t())).abs().mean(0)
        assert own[0].sum() == round(0.25 * models.WIDTH)
        assert mean[own[0]].min() > mean[~own[0]].max()
        assert not own[1:].any()


def test_observing_changes_nothing_and_ends(model: models.Bailing) -> None:
    with torch.no_grad():
        expected = model(ids(1))
    with collect(model, "text") as collector:
        refused("begin must be called before", model, ids(1), error=RuntimeError)
        refused("tokens must be at least one", collector.statistics)
        collector.begin("a")
        out = model(ids(1))
        assert torch.equal(out, expected)
        out.sum().backward()
        refused("samples must be distinct", collector.begin, "a")
    first = collector.statistics().of("text", "und")[0]
    assert not first.sum_abs.requires_grad
    model(ids(1))
    assert torch.equal(collector.statistics().of("text", "und")[0].tokens, first.tokens)
    with pytest.raises(KeyError), collect(model, "text"):
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_components_and_times_of_bagel_are_told_apart() -> None:
    model = models.bagel()
    times = timestep_grid(7, 3.0)[:-1]
    grid, prompt = (2, 3), [12, 13, 14]
    x = torch.randn(6, model.config.token_channels)
    with collect(model, "generation", config=CONFIG) as collector:
        collector.begin("a")
        contexts = model.new_contexts(1)
        model.prefill_text(contexts, [prompt])
        for time in times:
            model.velocity([x], [grid], time.reshape(1), [contexts])
        model.prefill_text(contexts, [prompt])
    in_range = [math.ceil(3 * time) for time in times.tolist()]
    ranges = [in_range.count(r) for r in range(4)]
    assert ranges[0] == 0
    gen, und = (collector.statistics().of("generation", part) for part in ("gen", "und"))
    for layer in range(len(gen)):
        assert gen[layer].tokens.tolist() == [6 * count for count in ranges]
        # Two markers a step, and two prompts between bos and eos.
        assert und[layer].tokens.tolist() == [2 * (3 + 2), *(2 * count for count in ranges[1:])]
    for time, expected in {None: 0, 0.0: 0, 0.1: 1, 1 / 3: 1, 0.34: 2, 0.7: 3, 1.0: 3}.items():
        collector.set_time(time)
        assert collector.time_range == expected


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_count_the_tokens_that_are_routed_to_them(shared: int) -> None:
    torch.manual_seed(0)
    model: Any = models.Official()
    layer = model.language_model.model.layers[1]
    apply_moe_(model, MoEConfig(num_experts=3, top_k=2, num_shared_experts=shared, layers=[1]))
    block = layer.mlp_moe_gen
    torch.nn.init.normal_(block.gate.weight)
    arguments = (torch.randn(9, models.HIDDEN), torch.tensor([0, 8]), torch.arange(1, 8))
    seen: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    config = StatisticsConfig(threshold=0.05)
    with collect(model, "task", config=config) as collector, torch.no_grad():
        collector.begin("a")
        watched = model(*arguments)
    assert torch.equal(model(*arguments), watched)
    found = collector.statistics().of("task", "gen")
    tokens = seen[0]
    chosen = (tokens @ block.gate.weight.T).topk(2).indices
    experts = find_adapter(model).ffns("gen")[1:-1]
    assert len(experts) == 3 + shared
    for ffn in experts:
        name = ffn.name.rpartition(".")[2]
        rows = (chosen == int(name)).any(1) if name.isdigit() else torch.ones(7, dtype=torch.bool)
        h = F.silu(tokens[rows] @ ffn.gate_proj.T) * (tokens[rows] @ ffn.up_proj.T)
        sums = found[ffn.key]
        assert int(sums.tokens.sum()) == int(rows.sum())
        torch.testing.assert_close(sums.sum_abs[0], h.abs().double().sum(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(sums.num_fired[0], (h.abs() > 0.05).double().sum(0))


def sums_of(own: FfnSums, sets: list[Any], tokens: list[Any]) -> FfnSums:
    """With active sets [S][R][I] of samples with some tokens [S][R]."""
    active = torch.from_numpy(np.packbits(np.array(sets, bool), axis=-1, bitorder="little"))
    size = len(sets[0][0])
    return dataclasses.replace(
        own,
        active=active,
        sample_tokens=torch.tensor(tokens),
        tokens=torch.tensor(tokens).sum(0),
        sum_abs=torch.zeros(len(tokens[0]), size),
    )


def test_neurons_that_no_sample_or_every_sample_uses_are_counted(statistics: Any) -> None:
    own = statistics.of("text", "und")[0]
    sets = [[[0, 0, 0, 1], [1, 1, 0, 1]], [[0, 1, 0, 1], [1, 1, 0, 1]]]
    never, always = sums_of(own, sets, [[1, 1], [1, 1]]).never_and_always()
    assert (never.tolist(), always.tolist()) == ([0.5, 0.25, 0.25], [0.25, 0.75, 0.25])
    never, always = sums_of(own, sets, [[1, 1], [0, 1]]).never_and_always()
    assert never[0].isnan()  # of a single sample
    assert (never[1:].tolist(), always[1:].tolist()) == ([0.25, 0.25], [0.75, 0.25])


def test_overlaps_are_mean_jaccard_indices(statistics: FfnStatistics) -> None:
    own = statistics.of("text", "und")[0]

    def overlaps(sets: list[Any], tokens: list[Any]) -> Any:
        """Of [S][R][I] and [S][R], the overlaps of samples and of steps."""
        sums = sums_of(own, sets, tokens)
        return sums.sample_overlap(), sums.step_overlap()

    sets = [[[1, 1, 0, 0]], [[1, 0, 1, 0]], [[1, 1, 1, 0]]]
    assert overlaps(sets, [[1]] * 3)[0].item() == pytest.approx(5 / 9)  # 1 of 3, 2 of 3, 2 of 3
    assert overlaps(sets, [[1], [0], [1]])[0].item() == pytest.approx(2 / 3)
    alone, steps = overlaps(sets, [[0], [0], [1]])
    assert alone.isnan().all()
    assert steps.shape == (0,)
    # Of a sample with itself, from range to range of time.
    first = [[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1]]
    second = [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    _, steps = overlaps([first, second], [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert steps.tolist() == pytest.approx([0.5, 1 / 3])
    assert overlaps([first, second], [[0] * 4] * 2)[1].isnan().all()


@torch.no_grad()
def test_maps_run_from_noise_to_image_and_end_with_what_has_no_time() -> None:
    model = models.bagel()
    config = StatisticsConfig(num_time_ranges=4, active_fraction=0.25)
    with collect(model, "task", config=config) as collector:
        for sample in (11, 12):
            collector.begin(str(sample))
            contexts = model.new_contexts(1)
            model.prefill_text(contexts, [[10, sample]])
            for time in (0.9, 0.2):  # the ranges between stay empty
                x = torch.randn(4, model.config.token_channels)
                model.velocity([x], [(2, 2)], torch.tensor([time]), [contexts])
    statistics = collector.statistics()
    und, gen = statistics.activation_maps("task")
    assert (und["component"], gen["component"]) == ("und", "gen")
    assert gen["layers"] == [0, 1, 2]
    assert gen["ranges"] == ["1-0.75", "0.25-0"]
    assert und["ranges"] == ["1-0.75", "0.25-0", "no time"]
    for row, sums in enumerate(statistics.of("task", "gen").values()):
        assert gen["firing"][row] == sums.firing_rate()[[4, 1]].tolist()
        assert gen["overlap"][row] == sums.sample_overlap().nanmean()
    assert gen["steps"] == [None] * 3  # no sample has two ranges side by side
    for row, sums in enumerate(statistics.of("task", "gen").values()):
        sets = unpack_bits(sums.active[:, [4, 1]])[..., : sums.sum_abs.shape[1]].flatten(0, 1)
        assert gen["never_at_any_time"][row] == float((~sets.any(0)).double().mean())
        assert gen["always_at_all_times"][row] == float(sets.all(0).double().mean())
        assert gen["never_at_any_time"][row] < min(gen["never_by_time"][row])
    assert gen["chance"] == pytest.approx(0.25 / 1.75)
    json.dumps([und, gen], allow_nan=False)


# Files


def assert_same(own: FfnStatistics, other: FfnStatistics, rtol: float = 0) -> None:
    for name in ("model_hashes", "config", "samples", "tool"):
        assert getattr(own, name) == getattr(other, name)
    assert list(own.ffns) == list(other.ffns)
    for first, second in zip(own.ffns.values(), other.ffns.values(), strict=True):
        for field in dataclasses.fields(first):
            pair = (getattr(sums, field.name) for sums in (first, second))
            torch.testing.assert_close(*pair, rtol=rtol, atol=0)


def test_a_file_gives_back_what_was_saved(statistics: FfnStatistics, tmp_path: Path) -> None:
    path, again = tmp_path / "statistics.safetensors", tmp_path / "again.safetensors"
    statistics.save(path)
    assert_same(FfnStatistics.load(path), statistics)
    FfnStatistics.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_merging_equals_one_pass_over_both(model: models.Bailing) -> None:
    samples = {"a": ids(1), "b": ids(2, 5), "c": ids(3), "d": ids(4, 7)}
    names = list(samples)
    parts = [
        gather(model, {name: samples[name] for name in own})
        for own in (names[:1], names[1:3], names[3:])
    ]
    merged = parts[0].merge(*parts[1:])
    assert_same(merged, gather(model, samples), rtol=1e-13)
    other = gather(model, {"a": ids(1)}, task="captions")
    both = merged.merge(other)
    assert both.tasks == ("text", "captions")
    assert both.samples == {"text": tuple(samples), "captions": ("a",)}
    means = [own.of("captions", "und")[0].mean_abs() for own in (both, other)]
    assert torch.equal(*means)


def test_what_does_not_fit_together_is_not_merged(
    model: models.Bailing, statistics: FfnStatistics
) -> None:
    fewer = dict(statistics.ffns)
    fewer.popitem()
    others = {"samples": {"text": ("x", "y", "z")}}
    for other in (
        gather(model, {"a": ids(1)}),  # a sample twice
        dataclasses.replace(statistics, **others, model_hashes={"und": "0" * 16}),
        dataclasses.replace(statistics, **others, config=StatisticsConfig(num_time_ranges=3)),
        dataclasses.replace(statistics, **others, ffns=fewer),
    ):
        refused("merge: ", statistics.merge, other)


def test_sums_that_are_no_sums_are_refused(statistics: FfnStatistics) -> None:
    key = ("text", "und", 0)
    right = statistics.ffns[key]
    for name, value in (
        *(("sum_abs", right.sum_abs + value) for value in (math.nan, math.inf, -9)),
        ("tokens", torch.ones(4)),
        ("active", right.active[:2]),
        ("inputs", torch.zeros(1, 16, dtype=torch.bfloat16)),
    ):
        wrong = dataclasses.replace(right, **{name: value})
        with pytest.raises(ValueError, match=f"text.und 0: {name} must be"):
            dataclasses.replace(statistics, ffns={**statistics.ffns, key: wrong})


def test_files_that_are_no_statistics_are_refused(statistics: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    tensors, metadata = load_file(path), read_header(path).metadata
    for name, value in (
        ("format_version", "2"),
        ("config", '{"threshold": -1}'),
        ("samples", '{"text": ["a"]}'),
        ("samples", '{"talk": ["a", "b", "c"]}'),
        ("ffns", '[["text", "und", 0, null]]'),
        ("model_hashes", "{}"),
    ):
        save_file(tensors, path, metadata | {name: value})
        refused(str(path), FfnStatistics.load, path)


# Models


@torch.no_grad()
def test_statistics_fit_their_model_and_no_other(
    model: models.Bailing, statistics: FfnStatistics
) -> None:
    head, shorter, wider, negative = (models.Bailing() for _ in range(4))
    head.lm_head.weight.zero_()
    shorter.model.layers = shorter.model.layers[:2]
    wider.model.layers[0].mlp = models.MLP(models.WIDTH + 8)
    negative.model.layers[1].mlp.experts[2].down_proj.weight.neg_()
    for same in (find_adapter(model), models.Bailing().bfloat16(), head):
        statistics.check(same)
    for other in (negative, shorter, wider):
        refused("model must have the und FFNs they were gathered", statistics.check, other)
    hashes = [hash_model(own) for own in (model, models.Bailing(), head, models.Bailing().half())]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


# A pass over samples of a task


def test_tasks_differ_in_who_works_and_repeat_bit_for_bit(golden: Any, tmp_path: Path) -> None:
    pipeline = BagelPipeline.from_pretrained(golden("t2i_dense"))
    (picture,) = models.pictures(tmp_path / "pictures", 1)
    found = {}
    for task in Task:
        samples = built_in_samples(task, 2, seed=3, folder=tmp_path / "pictures")
        if task is Task.EDITING:
            samples = [Sample(prompt="make it red", sources=(picture,), seed=1)]
        for name in ("a", "b"):
            found[task] = calibrate(pipeline, task, samples, settings=QUICK, config=CONFIG)
            found[task].save(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert found[task].samples == {task.value: tuple(s.fingerprint() for s in samples)}
    generation, understanding, editing = found.values()
    assert understanding.components("understanding") == ["und"]
    for sums in understanding.of("understanding", "und").values():
        assert sums.tokens[1:].tolist() == [0, 0, 0]
    for layer, sums in generation.of("generation", "gen").items():
        # 32 x 32 pixels are four latent tokens; guidance adds a branch on some of three steps.
        assert sums.tokens[0] == 0
        assert 2 * 3 * 4 <= int(sums.tokens.sum()) <= 2 * 2 * 3 * 4
        # A picture to edit is seen once as a finished image, without a time.
        assert editing.of("editing", "gen")[layer].tokens[0] > 0
        assert generation.of("generation", "und")[layer].tokens[0] > 0
    merged = generation.merge(editing, understanding)
    assert merged.tasks == ("generation", "editing", "understanding")
    assert list(score("activation", pipeline, merged)) == ["und"]
    assert list(score("activation", pipeline, merged, tasks=["editing"])) == ["und", "gen"]


@torch.no_grad()
def test_any_model_is_calibrated_by_how_it_is_run() -> None:
    model = models.Bailing()
    batches = [torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])]
    statistics = calibrate(model, "captions", batches, run=model)
    assert statistics.samples == {"captions": ("0", "1")}
    assert int(statistics.of("captions", "und")[0].tokens.sum()) == 5
