# SPDX-License-Identifier: Apache-2.0
"""The runner of the GPU checks goes on after a check that ends, hangs or poisons its process."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RUNNER = Path(__file__).parent / "gpu" / "run.py"

# Stands for a worker: each name is what it does.
WORKER = """
import json, os, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"name": name, "outcome": "started"}), flush=True)
    if name.startswith("ends"):
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)
    if name.startswith("hangs"):
        time.sleep(600)
    outcome = name.split("-")[0]
    print("noise that is no line of a worker", flush=True)
    print(json.dumps({"name": name, "outcome": outcome, "seconds": 0.1, "text": "why"}), flush=True)
    if name == "failed-device":
        break
"""


@pytest.fixture
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return [sys.executable, str(path)]


def outcomes(path: Path) -> dict[str, Any]:
    saved = json.loads(path.read_text())
    return {check["name"]: check["outcome"] for check in saved["checks"]}


def test_every_check_is_run_though_some_end_their_process(
    runner: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["passed-1", "ends-1", "passed-2", "failed-device", "skipped-1", "ends-2"]
    path = tmp_path / "x.json"
    assert runner.run(command, names, 60, path) == runner.FAILED
    assert outcomes(path) == {
        "passed-1": "passed",
        "ends-1": "failed",
        "passed-2": "passed",
        "failed-device": "failed",
        "skipped-1": "skipped",
        "ends-2": "failed",
    }
    out = capsys.readouterr().out
    assert "FAILED ends-1: ended the process with status 7\nlast words" in out
    assert json.loads(path.read_text())["counts"] == {"passed": 2, "failed": 3, "skipped": 1}


def test_a_check_that_hangs_has_failed(
    runner: ModuleType, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_MOST_SECONDS", 2.0)
    path = tmp_path / "x.json"
    assert runner.run(command, ["hangs", "passed-1"], 60, path) == runner.FAILED
    assert outcomes(path) == {"hangs": "failed", "passed-1": "passed"}


def test_what_was_not_run_in_time_is_said(
    runner: ModuleType, command: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    names = ["passed-1", "hangs", "passed-2"]
    assert runner.run(command, names, 3.0, path) == runner.OUT_OF_TIME
    assert outcomes(path) == {"passed-1": "passed", "hangs": "not_run", "passed-2": "not_run"}


def test_success_is_status_0(runner: ModuleType, command: list[str], tmp_path: Path) -> None:
    assert runner.run(command, ["passed-1", "skipped-1"], 60, tmp_path / "x.json") == 0


def test_a_worker_that_does_not_start_ends_the_run(runner: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no library')"]
    path = tmp_path / "x.json"
    assert runner.run(command, ["a", "b"], 60, path) == runner.FAILED
    assert outcomes(path) == {"a": "failed", "b": "not_run"}


def test_unknown_names_are_refused(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RUNNER.parent))
    with pytest.raises(ValueError, match="names must be prefixes of checks"):
        runner._find(["nonsense"], small=False)
