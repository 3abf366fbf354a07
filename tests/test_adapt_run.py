# SPDX-License-Identifier: Apache-2.0
"""The command `adapt`: what it writes, that it resumes after any kill, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import GOLDEN, picture, write_folder
from safetensors.torch import load_file

from sparse_unified.adapt import RunConfig, Stage, TrainingConfig, adapt
from sparse_unified.adapt.run import AdaptReport, read_log
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import Checkpoint, convert, info, invert
from sparse_unified.checkpoint.files import MARKER
from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint

CONFIG: dict[str, Any] = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 5}
OPTIONS = ["--steps", "4", "--batch-size", "2", "--lr", "1e-3", "--seed", "5", "--quiet"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model and a folder of data."""
    root = tmp_path_factory.mktemp("adapt")
    write_checkpoint(GOLDEN / "t2i_moe", root / "model")
    write_folder(root / "data")
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> list[float]:
    """Losses of an uninterrupted run to `root / "whole"`."""
    found: list[float] = []
    torch.set_num_threads(1)  # as in every test; sums over more are other sums
    tune(root, root / "whole", on_step=lambda record: found.append(record.loss))
    return found


def tune(root: Path, out: Path, run: RunConfig | None = None, **options: Any) -> AdaptReport:
    """Trains the model of `root` on its data; see `CONFIG`."""
    config = TrainingConfig(**CONFIG)
    return adapt(root / "model", out, root / "data", config, run, **options)


def logged(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(Path(f"{out}.training") / "log.jsonl")]


def test_command_writes_a_checkpoint_that_everything_reads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["adapt", str(root / "model"), str(out), "--data", str(root / "data"), *OPTIONS]
    assert main([*arguments, "--ema", "0.5", "--checkpoint-every", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 4
    assert report["out"] == str(out)
    assert sorted(p.name for p in Path(report["log"]).parent.glob("step-*")) == ["step-3", "step-4"]

    found = info(out)
    assert not found.problems
    assert found.recipe[-1]["mode"] == "adapt"
    assert found.recipe[-1]["config"]["stage"] == "expert_frozen"
    facts = json.loads((out / "adaptation.json").read_text())
    assert facts["losses"] == logged(out)
    assert facts["training"]["ema_decay"] == 0.5
    BagelPipeline.from_pretrained(out).generate(
        "x", size=(32, 32), num_timesteps=2, seed=0, progress=False
    )

    # The averages are what is written, under the official keys; experts stay as they were.
    before, after = Checkpoint(root / "model"), Checkpoint(out)
    assert before.keys() == after.keys()
    assert {k: s.shape for k, s in before.specs.items()} == {
        k: s.shape for k, s in after.specs.items()
    }
    changed = {k for k in before.specs if not torch.equal(before.read(k), after.read(k))}
    assert not any(".experts." in key for key in changed)
    assert any(key.endswith("mlp_moe_gen.gate.weight") for key in changed)
    tensors = load_file(Path(f"{out}.training") / "step-4" / "training.safetensors")
    for key in changed:
        assert torch.equal(after.read(key), tensors[f"ema.{key}"]), key


def test_full_tuning_writes_experts_and_invert_gives_the_trained_dense_model(
    root: Path, tmp_path: Path
) -> None:
    dense = write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    run = RunConfig(stage=Stage.FULL, checkpoint_every=4)
    adapt(tmp_path / "sparse", tmp_path / "out", root / "data", TrainingConfig(**CONFIG), run)
    after = Checkpoint(tmp_path / "out")
    tensors = load_file(tmp_path / "out.training" / "step-4" / "training.safetensors")
    block = "language_model.model.layers.1.mlp_moe_gen"
    width = tensors[f"master.{block}.gate_proj"].shape[0] // 4
    for expert in range(4):
        rows = slice(expert * width, (expert + 1) * width)
        for name in ("gate_proj", "up_proj"):
            key = f"{block}.experts.{expert}.{name}.weight"
            assert torch.equal(after.read(key), tensors[f"master.{block}.{name}"][rows])
        key = f"{block}.experts.{expert}.down_proj.weight"
        assert torch.equal(after.read(key), tensors[f"master.{block}.down_proj"][:, rows])
    invert(tmp_path / "out", tmp_path / "back")
    assert Checkpoint(tmp_path / "back").keys() == Checkpoint(dense).keys()
    neurons = Checkpoint(tmp_path / "back").read(f"{block}.gate_proj.weight")
    assert sorted(map(tuple, neurons.tolist())) == sorted(
        map(tuple, tensors[f"master.{block}.gate_proj"].tolist())
    )


@pytest.mark.parametrize("calls", [1500, pytest.param(250, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_exactly(
    calls: int, root: Path, expected: list[float], tmp_path: Path
) -> None:
    script = Path(__file__).parent / "adapt_kill.py"
    paths = map(str, (script, root / "model", root / "data", tmp_path))
    command = [sys.executable, *paths, str(calls)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["killed"] >= (2 if calls > 1000 else 4)
    assert found["losses"] == expected
    whole, resumed = Checkpoint(root / "whole"), Checkpoint(tmp_path / "out")
    for key in whole.specs:
        assert torch.equal(whole.read(key), resumed.read(key)), key


def test_what_a_kill_leaves_is_no_state(root: Path, expected: list[float], tmp_path: Path) -> None:
    out, running = tmp_path / "out", tmp_path / "out.training"
    for name in (".step-2.partial/step-2", ".step-1.removed"):
        (running / name).mkdir(parents=True)
        (running / name / "training.json").write_text("{")
    (running / ".step-2.partial" / MARKER).touch()
    (running / "log.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"step": 2, "lo')
    run = RunConfig(resume=True, checkpoint_every=2)
    tune(root, out, run)
    assert logged(out) == expected
    assert sorted(p.name for p in running.iterdir() if p.name.startswith("step")) == [
        "step-2",
        "step-4",
    ]


@pytest.mark.parametrize("what", ["model", "data"])
def test_model_and_data_where_the_target_is_written_are_refused_and_stay(
    root: Path, what: str, tmp_path: Path
) -> None:
    given = {name: root / name for name in ("model", "data")}
    given[what] = shutil.copytree(given[what], tmp_path / ".out.partial" / "out")
    (tmp_path / ".out.partial" / MARKER).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"\.out\.partial"):
        adapt(given["model"], tmp_path / "out", given["data"], TrainingConfig(**CONFIG))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def stopped(root: Path) -> Path:
    """The directory of a run that was cut short after its second step."""

    def stop(record: StepRecord) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    run = RunConfig(checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        tune(root, root / "cut", run, on_step=stop)
    return root / "cut.training"


def damage(running: Path, what: str) -> None:
    """Damages a run with states of two steps."""
    if what == "tensors":
        path = running / "step-2" / "training.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif what == "name":
        (running / "step-2").rename(running / "step-3")
    elif what == "state":
        (running / "step-3").mkdir()
    else:
        (running / "log.jsonl").unlink()


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("tensors", r"must have the checksum .*; remove .*step-2 to go on from .*step-1$"),
        ("name", r"step-3/training.json: step must be that of step-3, got 2"),
        ("state", r"step-3/training.json: file must be readable.* go on from .*step-2$"),
        ("log", r"log.jsonl: log must hold the steps 1 to 2 of the state, got 0"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    what: str, rule: str, stopped: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "out.training")
    damage(tmp_path / "out.training", what)
    with pytest.raises(ValueError, match=rule):
        tune(root, tmp_path / "out", RunConfig(resume=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["image", "text"])
def test_data_that_changed_are_not_gone_on_with(
    what: str, stopped: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "out.training")
    data = shutil.copytree(root / "data", tmp_path / "data")
    if what == "image":
        (data / "2-image.png").write_bytes(picture(7, 24, 24))
    else:
        lines = (data / "records.jsonl").read_text()
        (data / "records.jsonl").write_text(lines.replace("picture 1", "picture 9"))
    run = RunConfig(resume=True)
    with pytest.raises(ValueError, match=r"records must be that of the run that goes on"):
        adapt(root / "model", tmp_path / "out", data, TrainingConfig(**CONFIG), run)


def test_two_runs_to_one_target_do_not_mix(stopped: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "out.training")
    lock = os.open(tmp_path / "out.training", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"out.training must belong to one run"):
            tune(root, tmp_path / "out", RunConfig(resume=True))
    finally:
        os.close(lock)


def test_tensorboard_holds_the_losses(root: Path, expected: list[float], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunConfig(tensorboard=True)
    tune(root, tmp_path / "out", run)
    events = accumulator.EventAccumulator(str(tmp_path / "out.training" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Scalars("grad_norm")] == [1, 2, 3, 4]


def test_dry_run_checks_everything_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["adapt", str(root / "model"), str(tmp_path / "out"), *OPTIONS]
    assert main([*arguments, "--data", str(root / "data"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sequences"] == {"generation": 5, "understanding": 3, "editing": 1}
    assert plan["epochs"] == pytest.approx(8 / 9)
    assert plan["memory"]["trained"] < plan["memory"]["parameters"]
    assert list(tmp_path.iterdir()) == []

    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "data" / "5-image.png").write_bytes(b"damaged")
    assert main([*arguments, "--data", str(tmp_path / "data"), "--dry-run"]) == 1
    assert "5-image.png must be a readable image" in capsys.readouterr().err
    # The run itself skips it, and says so.
    assert main([*arguments, "--data", str(tmp_path / "data")]) == 0
    facts = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert ["5-image.png" in text for text in facts["damaged"]] == [True]


@pytest.mark.parametrize(
    ("changes", "status", "rule"),
    [
        (["--data", "{root}/none"], 1, "--data: .*none must hold .parquet"),
        ([], 2, "--data must be given, got none"),
        (
            ["--data", "{root}/data", "--micro-batch-size", "3"],
            1,
            "must be a divisor of batch_size",
        ),
        (
            ["--data", "{root}/data", "--lr", "-1"],
            1,
            "learning_rate must be a finite",
        ),
        (["--data", "{root}/data", "--device", "nowhere"], 1, "--device: name must be a device"),
        (["--data", "{root}/data", "--text-dropout", "2"], 1, "text_dropout must be .*from 0 to 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: list[str],
    status: int,
    rule: str,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [text.replace("{root}", str(root)) for text in changes]
    out = tmp_path / "out"
    assert main(["adapt", str(root / "model"), str(out), *OPTIONS, *arguments]) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(rule, message), message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_leaves_its_last_state_and_goes_on_with_smaller_steps(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    start = ["adapt", str(root / "model"), str(out), "--data", str(root / "data"), *OPTIONS]
    # The rate of the first step is 0, and no weight survives that of the second.
    assert main([*start, "--checkpoint-every", "1", "--min-lr", "1e308"]) == 1
    message = capsys.readouterr().err
    assert re.search(r"must stay finite, got .* at step 2; .*--resume.*--lr", message), message
    assert not out.exists()
    assert [p.name for p in Path(f"{out}.training").glob("*step*")] == ["step-1"]
    assert main([*start, "--resume"]) == 0
    assert all(Checkpoint(out).read(key).isfinite().all() for key in Checkpoint(out).specs)

    # What is written is looked at once more.
    monkeypatch.setattr("sparse_unified.adapt.optimizer.Optimizer.are_finite", lambda _: True)
    start[2] = str(tmp_path / "second")
    assert main([*start, "--steps", "1", "--lr", "3e38"]) == 1
    assert "must be finite to be written" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_targets_that_exist_are_refused(root: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**CONFIG)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"adapt: target must not exist, got"):
        adapt(root / "model", tmp_path / "out", root / "data", config)
    (tmp_path / "new.training").mkdir()
    with pytest.raises(ValueError, match=r"new.training must not exist, got an earlier run"):
        adapt(root / "model", tmp_path / "new", root / "data", config)
    with pytest.raises(ValueError, match=r"target must lie outside"):
        adapt(root / "model", root / "model" / "inside", root / "data", config)
    with pytest.raises(ValueError, match=r"parent of .* must be a directory"):
        adapt(root / "model", tmp_path / "none" / "out", root / "data", config)
