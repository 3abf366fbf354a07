# SPDX-License-Identifier: Apache-2.0
"""A sweep leaves the model alone, keeps what is finished, goes on, and repeats itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from surgery_models import assert_same, snapshot
from torch import nn

from sparse_unified.analysis import (
    FfnStatistics,
    Probe,
    SweepConfig,
    evaluator,
    run_sweep,
    score,
)
from sparse_unified.analysis.evaluators import Cost, measure_cost
from sparse_unified.analysis.store import open_store
from sparse_unified.surgery import PruneWidthConfig, changed
from sparse_unified.surgery.decoder import find_adapter

IDS = torch.arange(3, 27).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


@evaluator(loss="lower")
def loss(model: Any) -> dict[str, float]:
    flat = logits(model)[:, :-1].flatten(0, 1)
    return {"loss": float(F.cross_entropy(flat, IDS[:, 1:].flatten()))}


def text_probe(model: Any, task: str = "text", **evaluators: Any) -> Probe:
    return Probe(
        task=task,
        evaluators=evaluators or {"loss": loss},
        run=lambda begin: (begin("all"), logits(model)),
        workload=lambda: lambda: logits(model),
        description={"ids": IDS.tolist()},
    )


def config(**changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "components": ("und",),
        "axes": ("depth", "width"),
        "ratios": (0.5, 1.0),
        "criterion": "magnitude",
        "repeats": 1,
    }
    return SweepConfig(**(fields | changes))


def sweep(model: Any, out: Path, probes: Any = None, **options: Any) -> Any:
    changes = options.pop("config", {})
    probes = [text_probe(model)] if probes is None else probes
    return run_sweep(model, probes, config(**changes), out, **options)


def assert_left_alone(before: dict[str, Any], model: nn.Module) -> None:
    assert_same(before, snapshot(model) | {"random": before["random"]})


@pytest.mark.parametrize(
    "make", [pytest.param(models.qwen, marks=pytest.mark.slow), models.Bailing]
)
def test_models_that_are_not_bagel_are_swept_and_left_alone(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    before = snapshot(model)
    axes = ("depth", "width", "heads")
    task = sweep(model, tmp_path / "out", config={"axes": axes}).tasks["text"]
    assert_left_alone(before, model)
    names = [(row["axis"], row["keep_ratio"]) for row in task["points"]]
    half = {"depth": 2 / 3, "width": 0.5, "heads": 0.5}  # of three layers, two stay
    assert names == [(axis, ratio) for axis in axes for ratio in (1.0, half[axis])]
    for row in task["points"][::2]:
        assert row["metrics"] == task["dense"] == loss(model)
        assert row["after"]["flops"] == row["before"]["flops"] == task["cost"]["flops"]
        assert row["change"] == "nothing"
    for row in task["points"][1::2]:
        assert row["metrics"] != task["dense"]
        for name in ("parameters", "flops", "peak_bytes"):
            assert row["after"][name] < row["before"][name] == task["cost"][name]
        assert row["after"]["seconds"] > 0
    depth, width, heads = task["points"][1::2]
    assert len(depth["skipped_layers"]) == 1
    assert "24 neurons -> 12 neurons" in width["change"]
    assert heads["change"] == "4 query heads, 2 key heads -> 2 query heads, 1 key heads"
    for part in ("attention", "ffn"):
        changes = {"axes": ("depth",), "ratios": (0.5,), "part": part}
        (row,) = sweep(model, tmp_path / part, config=changes).tasks["text"]["points"]
        assert_left_alone(before, model)
        assert row["change"].startswith(f"{part} of ")
        assert row["metrics"] != task["dense"]


def test_models_of_the_official_structure_are_swept(tmp_path: Path) -> None:
    model = models.Official()
    x, text, vae = torch.randn(7, models.HIDDEN), torch.tensor([0, 6]), torch.arange(1, 6)

    def run(begin: Any = None) -> Any:
        with torch.no_grad():
            return model(x, text, vae)

    dense = run()

    @evaluator(distance="lower")
    def distance(model: Any) -> dict[str, float]:
        return {"distance": float((run() - dense)[vae].norm())}

    probe = Probe(
        task="generation",
        evaluators={"distance": distance},
        run=lambda begin: (begin("all"), run()),
        workload=lambda: run,
    )
    before = snapshot(model)
    changes = {"components": ("und", "gen"), "part": "ffn", "ratios": (0.5,)}
    task = sweep(model, tmp_path / "out", [probe], config=changes).tasks["generation"]
    assert_left_alone(before, model)
    assert task["dense"] == {"distance": 0.0}
    assert len(task["points"]) == 4
    for row in task["points"]:
        assert row["metrics"]["distance"] > 0
        assert row["after"]["flops"] < row["before"]["flops"]


def comparable(result: Any) -> Any:
    """Drops the times, which no two runs share."""
    times = ("seconds", "seconds_range")
    drop = lambda found: {k: v for k, v in found.items() if k not in times}  # noqa: E731
    return json.loads(result.to_json(), object_hook=drop)


def test_ratios_are_those_that_are_kept_and_points_are_measured_once(tmp_path: Path) -> None:
    changes = {"axes": ("heads",), "ratios": (0.125, 0.25, 0.5, 0.67, 0.9)}
    result = sweep(models.qwen(), tmp_path / "out", config=changes)
    points = result.tasks["text"]["points"]
    assert [row["keep_ratio"] for row in points] == [1.0, 0.5]  # of two groups of heads
    table = result.to_text()
    assert " -> " in table
    whole = next(line for line in table.splitlines() if "nothing" in line)
    assert "x)" not in whole


def test_shards_of_a_sweep_are_one_sweep(tmp_path: Path) -> None:
    model = models.qwen()
    whole = sweep(model, tmp_path / "whole")
    second = sweep(model, tmp_path / "out", shard=(1, 2))
    assert second.tasks == {}
    assert "the dense model on text is left to another process" in second.to_text()
    assert not (tmp_path / "out" / "results.json").exists()
    both = sweep(model, tmp_path / "out", shard=(0, 2))
    assert comparable(both) == comparable(whole)
    assert "not finished" not in both.to_text()
    assert (tmp_path / "out" / "results.json").exists()
    counts = [path.read_text().count("\n") for path in tmp_path.glob("out/shard-*/points.jsonl")]
    assert sorted(counts) == [2, 3]  # each of five once, the dense model among them


@pytest.mark.parametrize(("again", "ratio"), [((0.9, 1.2), "(2.00x)"), ((0.4, 1.2), None)])
def test_a_ratio_of_times_is_given_where_their_ranges_stand_apart(
    again: tuple[float, float], ratio: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The dense model; then it, a point, and it again.
    times = iter([((0.1, 0.1), 0.1), ((0.8, 1.2), 1.0), ((0.45, 0.55), 0.5), (again, 1.0)])

    def measured(*given: Any, **options: Any) -> Cost:
        cost, (seconds_range, seconds) = measure_cost(*given, **options), next(times)
        return dataclasses.replace(cost, seconds=seconds, seconds_range=seconds_range)

    monkeypatch.setattr("sparse_unified.analysis.sweep.measure_cost", measured)
    changes = {"axes": ("width",), "ratios": (0.5,)}
    table = sweep(models.qwen(), tmp_path / "out", config=changes).to_text()
    assert "500 [450, 550]" in table
    assert ("x)" in table) is (ratio is not None)
    assert ratio is None or ratio in table


def test_measured_criteria_rank_what_the_task_uses(tmp_path: Path) -> None:
    model, criterion = models.qwen(), "wanda"
    changes = {"criterion": criterion, "axes": ("width",)}
    task = sweep(model, tmp_path / "out", config=changes).tasks["text"]
    statistics = FfnStatistics.load(tmp_path / "out" / "statistics-text.safetensors")
    assert statistics.samples == {"text": ("all",)}
    scores = score(criterion, model, statistics)["und"]
    with changed(model, PruneWidthConfig(component="und", keep_ratio=0.5), scores):
        assert task["points"][1]["metrics"] == loss(model)
    (found,) = task["activation"]
    assert found["ranges"] == ["no time"]
    assert len(found["firing"]) == models.LAYERS
    again = sweep(model, tmp_path / "b", config=changes, statistics={"text": statistics})
    assert again.tasks["text"]["points"][1]["metrics"] == task["points"][1]["metrics"]


def test_models_whose_neurons_cannot_be_read_are_swept_along_depth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.qwen()
    model.model.language_model.layers[1].mlp.up_proj = nn.Linear(models.HIDDEN, models.WIDTH)
    result = sweep(model, tmp_path / "out", config={"axes": ("depth",)})
    assert result.tasks["text"]["activation"] == []
    assert "no statistics of neurons: model.language_model.layers.1" in caplog.text
    refused(r"got up_proj\.bias", sweep, model, tmp_path / "width", config={"axes": ("width",)})


class Interrupting:
    """Stops at the n-th call, as a user would."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.better = {"loss": "lower"}
        self.calls, self.error = calls, error

    def __call__(self, model: Any) -> dict[str, float]:
        self.calls -= 1
        if self.calls == 0:
            raise self.error
        return loss(model)


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    model = models.qwen()
    before = snapshot(model)
    steps: list[tuple[int, int, str]] = []
    whole = sweep(model, tmp_path / "whole", progress=lambda *at: steps.append(at))
    assert [at[:2] for at in steps] == [(done, 5) for done in range(6)]
    assert steps[0][2] == "text: dense"
    out = tmp_path / "out"
    stop = text_probe(model, loss=Interrupting(3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        sweep(model, out, [stop])
    assert_left_alone(before, model)
    lines = (out / "points.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["text-dense", "text-und-depth-1"]
    with (out / "points.jsonl").open("a") as stream:
        stream.write('{"name": "text-und-depth-0.5", "met')  # torn by a kill
    counting = text_probe(model, loss=Interrupting(100, ValueError()))
    resumed = sweep(model, out, [counting])
    assert comparable(resumed) == comparable(whole)
    assert counting.evaluators["loss"].calls == 97  # three were left
    assert (out / "points.jsonl").read_text().splitlines()[:2] == lines
    assert sweep(model, out, [counting]).to_dict() == resumed.to_dict()
    assert counting.evaluators["loss"].calls == 97


def test_nan_names_its_point_and_loses_nothing(tmp_path: Path) -> None:
    model = models.qwen()
    before = snapshot(model)

    def broken(model: Any) -> dict[str, float]:
        found = loss(model)
        narrow = find_adapter(model).ffns("und")[0].intermediate_size < models.WIDTH
        return {"loss": float("nan")} if narrow else found

    probe = text_probe(model, mine=evaluator(loss="lower")(broken))
    with pytest.raises(ValueError, match=r"text-und-width-0.5: mine: metric loss must .* nan"):
        sweep(model, tmp_path / "out", [probe])
    assert_left_alone(before, model)
    fixed = text_probe(model, mine=loss)
    assert len(sweep(model, tmp_path / "out", [fixed]).tasks["text"]["points"]) == 4


def test_a_folder_is_of_one_run(tmp_path: Path) -> None:
    model = models.qwen()
    out = tmp_path / "out"
    sweep(model, out, description={"model": "abc"})
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    other_metric = evaluator(x="lower")(lambda model: {"x": 1.0})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": {"ratios": (0.25,)}}, r"sweep\.ratios \[0.5, 1.0\] there and \[0.25\] here"),
        ({"description": {"model": "xyz"}}, "model 'abc' there and 'xyz' here"),
        ({"probes": [text_probe(model, other=other_metric)]}, r"tasks\.text\.metrics"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=f"must be of the same run.*{message}"):
            sweep(model, out, **({"description": {"model": "abc"}} | changes))
    assert kept == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for out in (other, tmp_path / "none" / "out", other / "notes.txt"):
        with pytest.raises((ValueError, OSError)):
            sweep(models.qwen(), out)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    with (
        open_store(tmp_path / "out", {"a": 1}),
        pytest.raises(RuntimeError, match="must be used by one run at a time"),
        open_store(tmp_path / "out", {"a": 1}),
    ):
        pass


BOTH = {"components": ("und", "gen")}


@pytest.mark.parametrize(
    ("model", "changes", "word"),
    [
        ("qwen", {"components": ("gen",)}, "component must be one of und"),
        ("qwen", {"layers": (7,)}, "layers"),
        ("qwen", {"ratios": (0.0,)}, "ratio"),
        ("qwen", {"ratios": (0.5, 0.5)}, "ratios"),
        ("qwen", {"axes": ("length",)}, "axes"),
        ("qwen", {"components": "und"}, "components"),
        ("qwen", {"part": "head"}, "part"),
        ("qwen", {"criterion": "luck"}, "criterion"),
        ("qwen", {"repeats": 0}, "repeats"),
        ("qwen", {"block_size": 16}, "block_size must divide the 24 neurons"),
        ("Official", {**BOTH, "axes": ("depth",)}, "axis must be width, or depth of the part ffn"),
        ("Official", {**BOTH, "axes": ("heads",), "part": "ffn"}, "axis must be"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    model: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    host = getattr(models, model)()
    refused(word, sweep, host, tmp_path / "out", [text_probe(host)], config=changes)
    refused("tasks must be given once each", sweep, host, tmp_path / "out", [text_probe(host)] * 2)
    refused("evaluators must have metrics, each once", text_probe, host, a=loss, b=loss)
    assert not (tmp_path / "out").exists()


def test_the_most_redundant_layers_go_first(tmp_path: Path) -> None:
    model = models.qwen()
    with torch.no_grad():  # layer 1 adds nothing, layer 2 little
        for layer, factor in ((1, 0.0), (2, 1e-2)):
            for name, weight in model.model.language_model.layers[layer].named_parameters():
                if "down_proj" in name or "o_proj" in name:
                    weight.mul_(factor)

    def skipped(ratio: float, **changes: Any) -> list[int]:
        fields = {"axes": ("depth",), "ratios": (ratio,), **changes}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return sweep(model, out, config=fields).tasks["text"]["points"][0]["skipped_layers"]

    assert skipped(0.7) == [1]
    assert skipped(0.01) == [1, 2]
    assert skipped(0.01, layers="0,2") == [2]
    assert skipped(0.7, criterion="random", seed=0) != skipped(0.7, criterion="random", seed=1)
