# SPDX-License-Identifier: Apache-2.0
"""The command `adapt`: what it writes, that it resumes after any kill, and what it refuses."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import logged, picture, state_of, write_folder, write_parquet
from refusals import refused

from sparse_unified.adapt import RunConfig, Stage, TrainingConfig, adapt
from sparse_unified.adapt import records as adapt_records
from sparse_unified.adapt.run import read_log
from sparse_unified.adapt.trainer import StepRecord
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import Checkpoint, convert, info, invert
from sparse_unified.checkpoint.files import MARKER
from sparse_unified.cli import main

CONFIG: dict[str, Any] = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 5}
OPTIONS = ["--steps", "4", "--batch-size", "2", "--lr", "1e-3", "--seed", "5", "--quiet"]


@pytest.fixture(scope="module")
def root(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model and a folder of data."""
    root = tmp_path_factory.mktemp("adapt")
    shutil.copytree(golden("t2i_moe"), root / "model")
    write_folder(root / "data")
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> list[float]:
    """Losses of an uninterrupted run to `root / "whole"`."""
    tune(root, root / "whole")
    return logged(root / "whole")


def tune(root: Path, out: Path, run: RunConfig | None = None, **options: Any) -> None:
    """Trains the model of `root` on its data; see `CONFIG`."""
    adapt(root / "model", out, root / "data", TrainingConfig(**CONFIG), run, **options)


def test_command_writes_a_checkpoint_that_everything_reads(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["adapt", str(root / "model"), str(out), "--data", str(root / "data"), *OPTIONS]
    assert main([*arguments, "--ema", "0.5", "--checkpoint-every", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["out"]) == (4, str(out))
    assert sorted(p.name for p in Path(report["log"]).parent.glob("step-*")) == ["step-3", "step-4"]

    found = info(out)
    assert not found.problems
    assert found.recipe[-1]["mode"] == "adapt"
    assert found.recipe[-1]["config"]["stage"] == "expert_frozen"
    facts = json.loads((out / "adaptation.json").read_text())
    assert facts["losses"] == logged(out)
    assert facts["config"]["ema_decay"] == 0.5
    BagelPipeline.from_pretrained(out).generate(
        "x", size=(32, 32), num_timesteps=2, seed=0, progress=False
    )

    # The averages are what is written, under the official keys; experts stay as they were.
    before, after = Checkpoint(root / "model"), Checkpoint(out)
    shapes, others = ({k: s.shape for k, s in own.specs.items()} for own in (before, after))
    assert shapes == others
    changed = {k for k in before.specs if not torch.equal(before.read(k), after.read(k))}
    assert not any(".experts." in key for key in changed)
    assert any(key.endswith("mlp_moe_gen.gate.weight") for key in changed)
    tensors = state_of(Path(f"{out}.training") / "step-4")
    for key in changed:
        assert torch.equal(after.read(key), tensors[f"ema.{key}"]), key


def test_full_tuning_writes_experts_and_invert_gives_the_trained_dense_model(
    root: Path, golden: Any, tmp_path: Path
) -> None:
    dense = golden("t2i_dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2, time_router=True)
    run = RunConfig(stage=Stage.FULL, checkpoint_every=4)
    adapt(tmp_path / "sparse", tmp_path / "out", root / "data", TrainingConfig(**CONFIG), run)
    tensors = state_of(tmp_path / "out.training" / "step-4")
    block = "language_model.model.layers.1.mlp_moe_gen"
    trained = Checkpoint(tmp_path / "out")
    assert bool(trained.read(f"{block}.gate_time.weight").any())
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        parts = [trained.read(f"{block}.experts.{e}.{name}.weight") for e in range(4)]
        assert torch.equal(torch.cat(parts, dim), tensors[f"master.{block}.{name}"])
    invert(tmp_path / "out", tmp_path / "back")
    assert Checkpoint(tmp_path / "back").specs.keys() == Checkpoint(dense).specs.keys()
    neurons = Checkpoint(tmp_path / "back").read(f"{block}.gate_proj.weight")
    assert sorted(map(tuple, neurons.tolist())) == sorted(
        map(tuple, tensors[f"master.{block}.gate_proj"].tolist())
    )


@pytest.mark.parametrize("calls", [60, pytest.param(15, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_exactly(
    calls: int, root: Path, expected: list[float], tmp_path: Path
) -> None:
    script = Path(__file__).parent / "adapt_kill.py"
    paths = map(str, (script, root / "model", root / "data", tmp_path))
    command = [sys.executable, *paths, str(calls)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["killed"] >= (2 if calls == 60 else 8)
    assert found["losses"] == expected
    whole, resumed = Checkpoint(root / "whole"), Checkpoint(tmp_path / "out")
    for key in whole.specs:
        assert torch.equal(whole.read(key), resumed.read(key)), key


def test_a_run_ends_with_its_loader_worker_and_goes_on_exactly(
    root: Path, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, main = adapt_records.open_image, os.getpid()
    is_due = multiprocessing.get_context("fork").Event()

    def open_or_die(*given: Any, **options: Any) -> Any:
        if is_due.is_set() and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(adapt_records, "open_image", open_or_die)
        run = RunConfig(checkpoint_every=1)
        due = lambda record: is_due.set() if record.step == 2 else None  # noqa: E731
        # torch's handler of SIGCHLD names the signal. Where something has replaced the handler, or
        # reaped the child first, torch looks after its workers every few seconds, and cannot.
        told = r"DataLoader worker \((pid \d+\) is killed by signal: Killed|"
        told += r"pid\(s\) [\d, ]+\) exited unexpectedly)"
        rule = rf"loader workers \(--workers\) must run on, got one .*: {told}.*--resume"
        refused(rule, lambda: tune(root, tmp_path / "out", run, on_step=due), error=RuntimeError)
    assert not (tmp_path / "out").exists()
    # It may end between the writing of a state and the removal of the oldest; the next run removes
    # that one.
    tune(root, tmp_path / "out", RunConfig(checkpoint_every=1, resume=True, workers=0))
    states = sorted(path.name for path in (tmp_path / "out.training").glob("step-*"))
    assert states == ["step-3", "step-4"]
    assert logged(tmp_path / "out") == expected


def test_a_streamed_run_goes_on_exactly(root: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**CONFIG | {"steps": 7})

    def train(out: Path, resume: bool = False, stop_at: int = 0) -> list[float]:
        def stop(record: StepRecord) -> None:
            if record.step == stop_at:
                raise KeyboardInterrupt

        run = RunConfig(streaming=True, checkpoint_every=1, keep=9, resume=resume)
        with contextlib.suppress(KeyboardInterrupt):
            adapt(root / "model", out, data, config, run, on_step=stop)
        return logged(out)

    data = write_parquet(tmp_path / "data")
    whole = train(tmp_path / "whole")
    assert len(whole) == 7  # of sequences that are seen again from the fifth step on
    for step in (1, 5):
        out = tmp_path / f"cut-{step}"
        assert train(out, stop_at=step) == whole[:step]
        assert train(out, resume=True) == whole


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


def flip_a_bit(running: Path, _: Path) -> None:
    (path,) = (running / "step-2").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def rename_a_picture(_: Path, data: Path) -> None:
    lines = (data / "records.jsonl").read_text()
    (data / "records.jsonl").write_text(lines.replace("picture 1", "picture 9"))


OTHER = "records must be that of the run that goes on"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (flip_a_bit, r"must have the checksum .*; remove .*step-2 to go on from .*step-1$"),
        (
            lambda running, _: (running / "step-2").rename(running / "step-3"),
            r"step-3/training.json: step must be that of step-3, got 2",
        ),
        (
            lambda running, _: (running / "step-3").mkdir(),
            r"step-3/training.json: file must be readable.* go on from .*step-2$",
        ),
        (
            lambda running, _: (running / "log.jsonl").unlink(),
            r"log.jsonl: log must hold the steps 1 to 2 of the state, got 0",
        ),
        (lambda _, data: (data / "2-image.png").write_bytes(picture(7, 24, 24)), OTHER),
        (rename_a_picture, OTHER),
    ],
)
def test_a_damaged_run_and_changed_data_are_not_gone_on_with(
    change: Any, rule: str, stopped: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "out.training")
    data = shutil.copytree(root / "data", tmp_path / "data")
    change(tmp_path / "out.training", data)
    run = RunConfig(resume=True)
    refused(rule, adapt, root / "model", tmp_path / "out", data, TrainingConfig(**CONFIG), run)
    assert not (tmp_path / "out").exists()


def test_trackers_get_what_the_log_gets(
    root: Path, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking = pytest.importorskip("accelerate.tracking")
    calls: list[Any] = []

    class Recorder(tracking.GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self, run_name: str) -> None:
            calls.append(run_name)

        def store_init_configuration(self, values: Any) -> None:
            calls.append(values)

        def log(self, values: Any, step: Any = None) -> None:
            calls.append((step, values["loss"]))

        def finish(self) -> None:
            calls.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    run = RunConfig(report_to=("tensorboard", "recorder"))
    tune(root, tmp_path / "out", run)
    events = accumulator.EventAccumulator(str(tmp_path / "out.training" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Scalars("grad_norm")] == [1, 2, 3, 4]
    project, values, *steps, last = calls
    assert (project, last) == ("sparse_unified", "finished")
    assert (values["learning_rate"], values["betas"], values["seed"]) == (1e-3, "0.9,0.95", 5)
    assert steps == list(enumerate(expected, 1))
    refused("report_to must be of .*wandb.*, got 'paper'", tune, root, tmp_path / "other",
            RunConfig(report_to=("paper",)))  # fmt: skip
    monkeypatch.setattr("sparse_unified.adapt.run.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="report_to must name what is installed, got wandb"):
        tune(root, tmp_path / "other", RunConfig(report_to=("wandb",)))
    assert not list(tmp_path.glob("other*"))


def test_a_file_gives_the_flags_and_a_run_gives_its_own_back(
    root: Path, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    given, data = [str(root / "model"), str(tmp_path / "out")], ["--data", str(root / "data")]
    path = tmp_path / "config.yaml"
    path.write_text(
        f"data: {root / 'data'}\nsteps: 9\nbatch-size: 2\nlr: 1e-3\nseed: 5\nquiet: true\n"
        "betas: [0.9, 0.95]\nema: null\ncheckpointing: true\nreport_to: []\n"
    )
    more = ["--steps", "4", "--no-checkpointing"]
    assert main(["adapt", *given, *more, "--config", str(path)]) == 0
    assert logged(tmp_path / "out") == expected
    facts = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert (facts["config"]["steps"], facts["config"]["checkpointing"]) == (4, False)
    again = [str(root / "model"), str(tmp_path / "again"), *data]
    written = str(tmp_path / "out" / "adaptation.json")
    assert main(["adapt", *again, "--config", written, "--quiet"]) == 0
    assert logged(tmp_path / "again") == expected
    other = json.loads((tmp_path / "again" / "adaptation.json").read_text())
    assert other["config"] == facts["config"]

    for text, status, rule in (
        ("learning: 1", 1, "config.yaml: keys must be flags of sparse-unified adapt, got 'learn"),
        ("config: x", 1, "keys must be flags of sparse-unified adapt, got 'config'"),
        ("model: x", 1, "got 'model'"),
        ("- lr", 1, "file must map flags to values, got .'lr'"),
        ("lr: [1", 1, "file must be YAML, got"),
        ("checkpointing: 3", 1, "checkpointing must be true or false, got 3"),
        ("steps: many", 2, "--steps: must be a positive integer, got 'many'"),
    ):
        path.write_text(text)
        assert main(["adapt", *given, "--config", str(path), *data, "--resume"]) == status
        assert re.search(rule, capsys.readouterr().err)


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


def test_bad_input_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["adapt", str(root / "model"), str(tmp_path / "out"), *OPTIONS]
    data = ["--data", str(root / "data")]
    for changes, status, rule in (
        (["--data", str(root / "none")], 1, "--data: .*none must hold .parquet"),
        ([], 2, "--data must be given, got none"),
        ([*data, "--micro-batch-size", "3"], 1, "must be a divisor of batch_size"),
        ([*data, "--device", "nowhere"], 1, "--device: name must be a device"),
    ):
        assert main([*start, *changes]) == status
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert re.search(rule, message), message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_leaves_its_last_state_and_goes_on_with_smaller_steps(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_targets_that_exist_or_belong_to_a_run_or_hold_the_input_are_refused(
    root: Path, tmp_path: Path
) -> None:
    for name in ("out", "new.training", ".other.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".other.partial" / MARKER).touch()
    data = shutil.copytree(root / "data", tmp_path / ".other.partial" / "other")
    lock = os.open(tmp_path / "new.training" / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for out, given, resume, rule in (
            (tmp_path / "out", root / "data", False, r"adapt: target must not exist, got"),
            (tmp_path / "new", root / "data", False, r"new.training must not exist, got"),
            (tmp_path / "new", root / "data", True, r"new.training must belong to one run"),
            (tmp_path / "other", data, False, r"\.other\.partial"),
            (root / "model" / "inside", root / "data", False, r"target must lie outside"),
            (tmp_path / "none" / "out", root / "data", False, r"parent of .* must be a directory"),
        ):
            run = RunConfig(resume=resume)
            refused(rule, adapt, root / "model", out, given, TrainingConfig(**CONFIG), run)
    finally:
        os.close(lock)
    assert len(list(data.iterdir())) == 8


def test_stages_see_other_noise_and_held_out_data_is_measured(root: Path, tmp_path: Path) -> None:
    """One --seed in every stage is another order of the data in each."""
    data = ["--data", str(root / "data"), "--eval-data", str(root / "data"), *OPTIONS]
    held_out, seeds, more = [], [], ["--eval-every", "2", "--checkpoint-every", "4"]
    for number, model in enumerate((root / "model", tmp_path / "0")):
        out = str(tmp_path / str(number))
        assert main(["adapt", str(model), out, *data, *more]) == 0
        steps = read_log(Path(f"{out}.training") / "log.jsonl")
        state = Path(f"{out}.training") / "step-4" / "training.json"
        seeds.append(json.loads(state.read_text())["config"]["seed"])
        held_out.append([step.get("held_out_loss") for step in steps])
    assert [value is None for value in held_out[0]] == [True, False, True, False]
    assert held_out[1][-1] < held_out[0][1]
    assert (seeds[0] == 5, seeds[1] == 5) == (True, False)
