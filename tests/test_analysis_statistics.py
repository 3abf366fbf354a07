# SPDX-License-Identifier: Apache-2.0
"""Statistics are the sums of what the FFNs did, survive a file, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_
from sparse_unified.analysis import FfnStatistics, StatisticsConfig, collect, hash_ffns
from sparse_unified.analysis.statistics import (
    mean_overlap,
    most_active,
    pack_bits,
    successive_overlap,
    unpack_bits,
)
from sparse_unified.bagel.sampler import timestep_grid
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import composed, reference
from sparse_unified.surgery.decoder import find_adapter

CONFIG = StatisticsConfig(threshold=0.05, active_fraction=0.25, num_time_ranges=3)


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
    """x [T, D] that each FFN sees, by hooks of our own."""
    seen: dict[Any, Tensor] = {}
    handles = [
        ffn.module.register_forward_hook(
            lambda _, given, __, key=ffn.key: seen.update({key: given[0].flatten(0, -2)})
        )
        for ffn in find_adapter(model).ffns("text")
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


# What is counted


def test_sums_are_those_of_what_each_ffn_saw(model: models.Bailing) -> None:
    samples = {"a": ids(1), "b": ids(2, 5)}
    statistics = gather(model, samples)
    seen = [inputs_of(model, tokens) for tokens in samples.values()]
    for ffn in find_adapter(model).ffns("text"):
        x = torch.cat([own[ffn.key] for own in seen if ffn.key in own])
        sums = statistics.ffns["text"]["text"][ffn.key]
        exact = reference.ffn_importance(
            x.double(), ffn.gate_proj.double(), ffn.up_proj.double(), 0.05
        )
        assert sums.tokens.tolist() == [len(x), 0, 0, 0]
        for own, expected in zip(
            (sums.sum_abs, sums.sum_squares, sums.num_fired), exact, strict=True
        ):
            torch.testing.assert_close(own[0], expected.double(), rtol=1e-5, atol=1e-6)
            assert torch.count_nonzero(own[1:]) == 0
        if len(x):
            mean = statistics.mean_abs("text", "text", ffn.key)
            torch.testing.assert_close(mean, exact[0] / len(x), rtol=1e-5, atol=1e-6)


def test_active_sets_are_the_neurons_of_the_largest_means(model: models.Bailing) -> None:
    tokens = ids(1)
    sums = gather(model, {"a": tokens}).ffns["text"]["text"][0]
    (ffn,) = (ffn for ffn in find_adapter(model).ffns("text") if ffn.key == 0)
    x = inputs_of(model, tokens)[0]
    mean = (F.silu(x @ ffn.gate_proj.t()) * (x @ ffn.up_proj.t())).abs().mean(0)
    active = unpack_bits(sums.active, models.WIDTH)[0]
    assert active[0].sum() == round(0.25 * models.WIDTH)
    assert mean[active[0]].min() > mean[~active[0]].max()
    assert not active[1:].any()


def test_observing_changes_nothing_and_ends(model: models.Bailing) -> None:
    tokens = ids(1)
    with torch.no_grad():
        expected = model(tokens)
        with collect(model, "text") as collector:
            collector.begin("a")
            assert torch.equal(model(tokens), expected)
        before = collector.statistics().ffns["text"]["text"][0]
        model(tokens)
    assert torch.equal(collector.statistics().ffns["text"]["text"][0].tokens, before.tokens)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_hooks_are_gone_after_an_error(model: models.Bailing) -> None:
    with pytest.raises(KeyError), collect(model, "text"):
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_pass_before_any_sample_is_refused(model: models.Bailing) -> None:
    with collect(model, "text"), pytest.raises(RuntimeError, match="begin must be called before"):
        model(ids(1))


def test_gradients_are_not_held(model: models.Bailing) -> None:
    with collect(model, "text") as collector:
        collector.begin("a")
        model(ids(1)).sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None
    assert not collector.statistics().ffns["text"]["text"][0].sum_abs.requires_grad


def test_repeats_give_the_same_bits(model: models.Bailing, statistics: FfnStatistics) -> None:
    again = gather(model, {"a": ids(1), "b": ids(2, 5), "c": ids(3)})
    assert_same(again, statistics, exact=True)


def test_torch_ops_on_other_devices_count_alike() -> None:
    x, gate, up = torch.randn(50, 12), torch.randn(2100, 12), torch.randn(2100, 12)
    for own, expected in zip(
        composed.ffn_importance(x, gate, up, 0.1),
        reference.ffn_importance(x, gate, up, 0.1),
        strict=True,
    ):
        torch.testing.assert_close(own, expected.float())


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
    statistics = collector.statistics()
    ranges = [0, 0, 0, 0]
    for time in times.tolist():
        ranges[CONFIG.range_of(time)] += 1
    assert ranges[0] == 0
    assert sum(ranges) == 6
    gen = statistics.ffns["generation"]["gen"]
    und = statistics.ffns["generation"]["und"]
    for layer in range(len(gen)):
        assert gen[layer].tokens.tolist() == [6 * count for count in ranges]
        # Two markers a step, and two prompts between bos and eos.
        assert und[layer].tokens.tolist() == [2 * (3 + 2), *(2 * count for count in ranges[1:])]


def test_times_fall_into_their_ranges() -> None:
    assert [CONFIG.range_of(t) for t in (None, 0.0, 0.1, 1 / 3, 0.34, 0.7, 1.0)] == [
        0, 0, 1, 1, 2, 3, 3,
    ]  # fmt: skip


# Sets


def test_bits_come_back() -> None:
    for size in (1, 7, 8, 9, 24, 100):
        mask = torch.rand(3, 2, size) > 0.5
        packed = pack_bits(mask)
        assert packed.shape == (3, 2, (size + 7) // 8)
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack_bits(packed, size), mask)


def test_ties_of_the_active_set_go_to_lower_indices() -> None:
    assert most_active(torch.tensor([1.0, 3.0, 1.0, 1.0]), 0.5).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert most_active(torch.zeros(5), 0.01).tolist() == [True, False, False, False, False]


def test_overlap_is_the_mean_jaccard_of_pairs() -> None:
    sets = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    active = pack_bits(sets)[:, None]
    seen = torch.ones(3, 1, dtype=torch.bool)
    # 1 of 3, 2 of 3, 2 of 3.
    torch.testing.assert_close(
        mean_overlap(active, seen), torch.tensor([5 / 9], dtype=torch.float64)
    )
    seen[1] = False
    torch.testing.assert_close(
        mean_overlap(active, seen), torch.tensor([2 / 3], dtype=torch.float64)
    )
    seen[0] = False
    assert mean_overlap(active, seen).isnan().all()


def test_successive_overlap_compares_a_sample_with_itself() -> None:
    sets = torch.tensor(
        [[[1, 1, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 0], [0, 0, 1], [1, 1, 1]]], dtype=torch.bool
    )
    seen = torch.tensor([[True, True, True], [True, True, False]])
    out = successive_overlap(pack_bits(sets), seen)
    torch.testing.assert_close(out, torch.tensor([0.5, 1 / 3], dtype=torch.float64))
    assert successive_overlap(pack_bits(sets), seen & False).isnan().all()
    assert successive_overlap(pack_bits(sets)[:, :1], seen[:, :1]).shape == (0,)


def test_equal_samples_overlap_whole_and_others_less(model: models.Bailing) -> None:
    same = gather(model, {"a": ids(1), "b": ids(1)})
    other = gather(model, {"a": ids(1), "b": ids(2)})
    assert same.sample_overlap("text", "text")[0].tolist()[0] == 1.0
    assert 0 < other.sample_overlap("text", "text")[0].tolist()[0] < 1.0
    assert other.sample_overlap("text", "text")[:, 1:].isnan().all()


def test_accessors_have_a_row_for_every_ffn(
    model: models.Bailing, statistics: FfnStatistics
) -> None:
    keys = statistics.keys("text", "text")
    assert keys == [ffn.key for ffn in find_adapter(model).ffns("text")]
    rates = statistics.firing_rate("text", "text")
    assert rates.shape == statistics.sample_overlap("text", "text").shape == (len(keys), 4)
    assert statistics.step_overlap("text", "text").shape == (len(keys), 2)
    seen = torch.tensor([int(s.tokens[0]) > 0 for s in statistics.ffns["text"]["text"].values()])
    assert ((rates[seen, 0] > 0) & (rates[seen, 0] < 1)).all()
    assert rates[:, 1:].isnan().all()
    for call in (statistics.firing_rate, statistics.sample_overlap, statistics.step_overlap):
        with pytest.raises(ValueError, match="task must be one of text, got 'nonsense'"):
            call("nonsense", "text")
        with pytest.raises(ValueError, match="component must be one of text, got 'gen'"):
            call("text", "gen")
    with pytest.raises(ValueError, match="FFN must be one of"):
        statistics.mean_abs("text", "text", 99)


# Files


def assert_same(own: FfnStatistics, other: FfnStatistics, *, exact: bool) -> None:
    assert (own.model_hashes, own.config, own.samples, own.tool) == (
        other.model_hashes,
        other.config,
        other.samples,
        other.tool,
    )
    assert own.tasks == other.tasks
    for task in own.tasks:
        for component, keyed in own.ffns[task].items():
            assert list(keyed) == list(other.ffns[task][component])
            for key, sums in keyed.items():
                for field in dataclasses.fields(sums):
                    first = getattr(sums, field.name)
                    second = getattr(other.ffns[task][component][key], field.name)
                    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-13, "atol": 0}
                    torch.testing.assert_close(first, second, **tolerance)


def test_a_file_gives_back_what_was_saved(statistics: FfnStatistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    assert_same(FfnStatistics.load(path), statistics, exact=True)
    again = tmp_path / "again.safetensors"
    FfnStatistics.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [again.name, path.name]


def test_merging_equals_one_pass_over_both(model: models.Bailing) -> None:
    samples = {"a": ids(1), "b": ids(2, 5), "c": ids(3), "d": ids(4, 7)}
    names = list(samples)
    parts = [
        gather(model, {name: samples[name] for name in own})
        for own in (names[:1], names[1:3], names[3:])
    ]
    assert_same(parts[0].merge(*parts[1:]), gather(model, samples), exact=False)


def test_merging_tasks_keeps_them_apart(model: models.Bailing, statistics: FfnStatistics) -> None:
    other = gather(model, {"a": ids(1)}, task="captions")
    merged = statistics.merge(other)
    assert merged.tasks == ("text", "captions")
    assert merged.samples == {"text": ("a", "b", "c"), "captions": ("a",)}
    assert torch.equal(
        merged.mean_abs("captions", "text", 0), other.mean_abs("captions", "text", 0)
    )


def test_what_does_not_fit_together_is_not_merged(
    model: models.Bailing, statistics: FfnStatistics
) -> None:
    with pytest.raises(ValueError, match="merge: samples of text must be distinct, got a twice"):
        statistics.merge(gather(model, {"a": ids(1)}))
    with pytest.raises(ValueError, match="merge: model must be the same, with hash"):
        statistics.merge(dataclasses.replace(statistics, model_hashes={"text": "0" * 16}))
    with pytest.raises(ValueError, match="merge: config must be the same"):
        statistics.merge(
            dataclasses.replace(statistics, config=StatisticsConfig(num_time_ranges=3))
        )
    keyed = dict(statistics.ffns["text"]["text"])
    keyed.popitem()
    fewer = dataclasses.replace(
        statistics, ffns={"text": {"text": keyed}}, samples={"text": ("x", "y", "z")}
    )
    with pytest.raises(ValueError, match="merge: FFNs of text must be the same"):
        statistics.merge(fewer)


def damaged(statistics: FfnStatistics, **tensors: Tensor) -> dict[str, Any]:
    keyed = dict(statistics.ffns["text"]["text"])
    keyed[0] = dataclasses.replace(keyed[0], **tensors)
    return {"ffns": {"text": {"text": keyed}}}


@pytest.mark.parametrize("name", ["sum_abs", "sum_squares", "num_fired"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_sums_that_are_no_sums_are_refused(
    statistics: FfnStatistics, name: str, value: float
) -> None:
    tensor = getattr(statistics.ffns["text"]["text"][0], name).clone()
    tensor[1, 2] = value
    with pytest.raises(
        ValueError, match=rf"statistics: text.text 0: {name} must be finite and .*\[1, 2\]"
    ):
        dataclasses.replace(statistics, **damaged(statistics, **{name: tensor}))


def test_a_model_that_gave_nan_is_refused(model: models.Bailing) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.up_proj.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"statistics: text.text .*must be finite"):
        gather(model, {"a": ids(1)})


def test_no_tokens_are_refused(model: models.Bailing, statistics: FfnStatistics) -> None:
    message = "statistics of text must be gathered on at least one token, got none"
    with collect(model, "text") as collector:
        pass
    with pytest.raises(ValueError, match=message):
        collector.statistics()
    idle = {
        key: dataclasses.replace(sums, tokens=torch.zeros_like(sums.tokens))
        for key, sums in statistics.ffns["text"]["text"].items()
    }
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(statistics, ffns={"text": {"text": idle}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sum_abs": torch.zeros(4, 5, dtype=torch.float64)}, "sum_squares must be .* \\[4, 5\\]"),
        (
            {"tokens": torch.ones(4)},
            "tokens must be torch.int64 of shape \\[4\\], got torch.float32",
        ),
        (
            {"tokens": torch.ones(3, dtype=torch.int64)},
            "tokens must be torch.int64 of shape \\[4\\]",
        ),
        (
            {"active": torch.zeros(2, 4, 3, dtype=torch.uint8)},
            "active must be torch.uint8 of shape",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    statistics: FfnStatistics, change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=f"statistics: text.text 0: {message}"):
        dataclasses.replace(statistics, **damaged(statistics, **change))


def rewritten(path: Path, change: Any) -> Path:
    """The file with another header; `change` alters its parsed form."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    out = path.with_name("changed.safetensors")
    out.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return out


def test_files_that_are_no_statistics_are_refused(
    statistics: FfnStatistics, tmp_path: Path
) -> None:
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(ValueError, match="file must be readable"):
        FfnStatistics.load(path)
    statistics.save(path)

    def meta(name: str, value: str | None) -> Any:
        def change(header: dict[str, Any]) -> None:
            if value is None:
                del header["__metadata__"][name]
            else:
                header["__metadata__"][name] = value

        return change

    for change, message in (
        (meta("format", "other"), "format must be sparse_unified.statistics 1"),
        (meta("format_version", "2"), "format must be sparse_unified.statistics 1"),
        (meta("config", "{"), "metadata must be what calibrate writes"),
        (meta("config", '{"threshold": -1}'), "threshold must be finite and at least 0"),
        (meta("samples", "3"), "metadata must be what calibrate writes"),
        (meta("samples", '{"text": ["a"]}'), "must be torch.int64 of shape"),
        (meta("samples", '{"talk": ["a", "b", "c"]}'), "tasks must be those of the samples"),
        (meta("ffns", "[[1, 2, 3, 4]]"), "metadata must be what calibrate writes"),
        (meta("ffns", '[["text", "text", 0, null]]'), "tensors must be those that its metadata"),
        (meta("model_hashes", None), "metadata must be what calibrate writes"),
        (meta("model_hashes", "{}"), "model_hashes must be of text, got none"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            FfnStatistics.load(rewritten(path, change))
        assert "changed.safetensors" in str(caught.value)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated"):
        FfnStatistics.load(path)


# Models


def test_statistics_fit_their_model_and_no_other(
    model: models.Bailing, statistics: FfnStatistics
) -> None:
    statistics.check(model)
    statistics.check(find_adapter(model))
    with torch.no_grad():
        model.model.layers[1].mlp.experts[2].down_proj.weight.neg_()
    with pytest.raises(ValueError, match="model must have the text FFNs they were gathered on"):
        statistics.check(model)
    shorter = models.Bailing()
    shorter.model.layers = shorter.model.layers[:2]
    with pytest.raises(ValueError, match="text FFNs of text: keys must be those of the model"):
        statistics.check(shorter)
    wider = models.Bailing()
    wider.model.layers[0].mlp = models.MLP(models.WIDTH + 8)
    with pytest.raises(ValueError, match="0 must have 32 neurons as in the model, got 24"):
        statistics.check(wider)


def test_hash_is_that_of_the_bf16_weights() -> None:
    model = models.Bailing()
    own = hash_ffns(model, "text")
    assert hash_ffns(find_adapter(model), "text") == own
    assert hash_ffns(models.Bailing().bfloat16(), "text") == own
    assert len(own) == 16
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert hash_ffns(model, "text") == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -0.1}, "threshold must be finite and at least 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be finite and at least 0, got nan"),
        ({"threshold": "x"}, "threshold must be finite and at least 0, got 'x'"),
        ({"active_fraction": 0}, "active_fraction must be above 0 and below 1, got 0"),
        ({"active_fraction": 1.0}, "active_fraction must be above 0 and below 1, got 1.0"),
        ({"num_time_ranges": 0}, "num_time_ranges must be an integer of at least 1, got 0"),
        ({"num_time_ranges": 2.0}, "num_time_ranges must be an integer of at least 1, got 2.0"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"calibrate: {message}"):
        StatisticsConfig(**change)


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_count_the_tokens_that_are_routed_to_them(shared: int) -> None:
    torch.manual_seed(0)
    model: Any = models.Official()
    layer = model.language_model.model.layers[1]
    apply_moe_(model, MoEConfig(num_experts=3, top_k=2, num_shared_experts=shared, layers=[1]))
    block = layer.mlp_moe_gen
    torch.nn.init.normal_(block.gate.weight)
    x, seen = torch.randn(9, models.HIDDEN), []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    config = StatisticsConfig(threshold=0.05)
    with collect(model, "task", config=config) as collector, torch.no_grad():
        collector.begin("a")
        dense = model(x, torch.tensor([0, 8]), torch.arange(1, 8))
    assert torch.equal(model(x, torch.tensor([0, 8]), torch.arange(1, 8)), dense)
    found = collector.statistics().ffns["task"]["gen"]
    (tokens,) = seen[:1]
    logits = tokens @ block.gate.weight.T
    chosen = logits.topk(2).indices
    experts = find_adapter(model).ffns("gen")[1:-1]
    assert len(experts) == 3 + shared
    for ffn in experts:
        name = ffn.name.rpartition(".")[2]
        rows = (chosen == int(name)).any(1) if name.isdigit() else torch.ones(7, dtype=torch.bool)
        h = torch.nn.functional.silu(tokens[rows] @ ffn.gate_proj.T) * (
            tokens[rows] @ ffn.up_proj.T
        )
        sums = found[ffn.key]
        assert int(sums.tokens.sum()) == int(rows.sum())
        torch.testing.assert_close(sums.sum_abs[0], h.abs().double().sum(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(sums.num_fired[0], (h.abs() > 0.05).double().sum(0))


def test_text_and_vit_tokens_are_counted_where_their_own_router_sends_them() -> None:
    block = SparseMoE(8, 12, 3, 1, gate_img=True)
    torch.nn.init.normal_(block.gate.weight)
    torch.nn.init.normal_(block.gate_img.weight)
    x, text, vit = torch.randn(6, 8), torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4])
    chosen = block.route(x, packed_text_indexes=text, packed_vit_token_indexes=vit)[2]
    _, logits = block(x, text, vit)
    assert torch.equal(chosen[:, 0].long(), logits.argmax(1))
