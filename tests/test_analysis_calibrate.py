# SPDX-License-Identifier: Apache-2.0
"""One pass over samples of a task: what it counts, that it repeats, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch

from sparse_unified.analysis import (
    FfnStatistics,
    Sample,
    Settings,
    StatisticsConfig,
    Task,
    built_in_samples,
    calibrate,
    score,
)
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor
from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint

QUICK = Settings(size=(32, 32), num_timesteps=4, max_length=5)
SMALL = ["--size", "32x32", "--steps", "4", "--max-tokens", "5", "--quiet"]


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


def test_what_cannot_be_run_is_refused(pipeline: Any) -> None:
    for model, task, samples, message in (
        (pipeline, Task.GENERATION, [], "samples must be at least one"),
        (models.Bailing(), Task.GENERATION, [1], "model must be a BagelPipeline, or come with run"),
        (pipeline, "talk", [1], "task must be one of generation"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, task, samples)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(models.GOLDEN / "t2i_dense", tmp_path_factory.mktemp("m") / "model")


def run(model: Path, out: Path, *arguments: str) -> int:
    return main(["calibrate", str(model), "--out", str(out), *SMALL, *arguments])


def test_command_writes_statistics_and_scores_that_prune_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scores = tmp_path / "s.safetensors", tmp_path / "scores.safetensors"
    more = ["--time-ranges", "3", "--threshold", "0.01", "--active-fraction", "0.5"]
    assert (
        run(model, out, "--task", "generation", "--samples", "2", "--scores", str(scores), *more)
        == 0
    )
    printed = capsys.readouterr().out
    assert "generation: 2 samples" in printed
    assert f"{out}\n{scores}\n" in printed
    statistics = FfnStatistics.load(out)
    assert statistics.config == StatisticsConfig(
        threshold=0.01, active_fraction=0.5, num_time_ranges=3
    )
    expected = score("wanda", models.pipeline(tmp_path / "again"), statistics)
    header = read_header(scores)
    for component, keyed in expected.items():
        for layer, own in keyed.items():
            assert torch.equal(read_tensor(header.tensors[f"{component}.{layer}"], what=""), own)
    pruned = ["prune", str(model), str(tmp_path / "pruned"), "--scores", str(scores), "--quiet"]
    assert main([*pruned, "--component", "gen", "--keep-ratio", "0.5"]) == 0


def test_command_takes_sparse_models_and_writes_scores_in_expert_order(
    model: Path, tmp_path: Path
) -> None:
    sparse, out = tmp_path / "sparse", tmp_path / "s.safetensors"
    convert = ["convert", str(model), str(sparse), "--num-experts", "4", "--top-k", "4", "--quiet"]
    assert main([*convert, "--layers", "1"]) == 0
    scores = tmp_path / "scores.safetensors"
    arguments = ["--task", "generation", "--samples", "1", "--scores", str(scores)]
    assert run(sparse, out, *arguments, "--criterion", "activation") == 0
    statistics = FfnStatistics.load(out)
    keys = [key for key in statistics.ffns["generation"]["gen"] if not isinstance(key, int)]
    assert [(layer, name.rpartition(".mlp_moe_gen.")[2]) for layer, name in keys] == [
        (1, f"experts.{e}") for e in range(4)
    ]
    found = read_header(scores).tensors
    joined = read_tensor(found["gen.1"], what="")
    means = [statistics.mean_abs("generation", "gen", key) for key in keys]
    assert torch.equal(joined, torch.cat(means).float())
    # What und did there counts for the dense model too.
    assert run(sparse, out, "--task", "understanding", "--samples", "1") == 0
    FfnStatistics.load(out).check(models.pipeline(tmp_path / "dense"))


def test_command_merges_and_prints_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run(model, first, "--task", "understanding", "--samples", "1") == 0
    assert run(model, second, "--task", "generation", "--samples", "1", "--merge", str(first)) == 0
    capsys.readouterr()
    assert FfnStatistics.load(second).tasks == ("generation", "understanding")
    third = ["--task", "generation", "--samples", "2", "--seed", "9", "--merge", str(second)]
    assert run(model, tmp_path / "c.safetensors", *third, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tasks"]["generation"]["samples"] == 3
    gen = facts["tasks"]["generation"]["components"]["gen"]
    assert gen["tokens"] > 0
    assert 0 < gen["sample_overlap"] <= 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--task", "talk"], 2, "invalid choice: 'talk'"),
        (["--task", "generation", "--images", "x"], 2, "--images must come with --prompts"),
        (["--task", "generation", "--criterion", "wanda"], 2, "--criterion must come with"),
        (["--task", "generation", "--threshold", "-1"], 1, "threshold must be"),
        (["--task", "generation", "--active-fraction", "2"], 1, "active_fraction must be"),
        (["--task", "generation", "--merge", "none"], 1, "file must be readable"),
        (["--task", "generation", "--samples", "99"], 1, "must hold --samples = 99 prompts"),
    ],
)
def test_bad_arguments_are_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    assert run(model, tmp_path / "s.safetensors", *arguments) == status
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "s.safetensors").exists()


def test_statistics_of_another_model_are_not_merged(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = models.bagel()
    with torch.no_grad():
        other.language_model.model.layers[0].mlp.gate_proj.weight.neg_()

    def read(ids: list[int]) -> None:
        other.prefill_text(other.new_contexts(1), [ids])

    calibrate(other, "understanding", [[12, 13]], run=read).save(tmp_path / "other")
    merge = ["--task", "understanding", "--samples", "1", "--merge", str(tmp_path / "other")]
    assert run(model, tmp_path / "s.safetensors", *merge) == 1
    assert "model must have the und FFNs they were gathered on" in capsys.readouterr().err
