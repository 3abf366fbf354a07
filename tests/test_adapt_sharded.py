# SPDX-License-Identifier: Apache-2.0
"""Training sharded over two processes with FSDP2, beside the same run in one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import GOLDEN, losses, trainer, write_folder
from adapt_processes import DTYPES
from tiers import IS_DEEP

from sparse_unified.adapt import TrainingConfig, adapt
from sparse_unified.adapt.report import read_lines
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.fixtures import write_checkpoint

# Sums of gradients are taken in another order; in bf16 each share is rounded before it is added.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
NAMES = [*DTYPES] if IS_DEEP else ["float32"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the two processes and returns what they wrote."""
    root = tmp_path_factory.mktemp("sharded")
    write_checkpoint(GOLDEN / "t2i_moe", root / "model")
    torch.set_num_threads(1)
    for name in NAMES:
        own = trainer(dtype=DTYPES[name])
        losses(own, 2)
        own.save(root / f"one-{name}")
    ports = []
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    script = Path(__file__).parent / "adapt_processes.py"
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *ports, str(root), *NAMES],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    return root


@pytest.fixture(scope="module")
def result(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_lose_what_one_loses(name: str, result: dict[str, Any]) -> None:
    own = trainer(dtype=DTYPES[name])
    expected = losses(own)
    assert result[name] == pytest.approx(expected, rel=TOLERANCES[name])
    norm = own.step().grad_norm
    assert result[f"{name} norm"] == pytest.approx(norm, rel=10 * TOLERANCES[name])
    whole = sum(tensor.nbytes for tensor in own.optimizer.state().values())
    assert 0.45 * whole < result[f"{name} state"] < 0.55 * whole


@pytest.mark.parametrize("name", NAMES)
def test_states_go_on_in_any_number_of_processes(
    name: str, directory: Path, result: dict[str, Any]
) -> None:
    expected = losses(trainer(dtype=DTYPES[name]))[2:]
    assert result[f"{name} from two"] == result[name][2:]
    assert result[f"{name} from one"] == pytest.approx(expected, rel=TOLERANCES[name])
    single = trainer(dtype=DTYPES[name])
    single.load(directory / f"two-{name}")
    assert losses(single) == pytest.approx(expected, rel=TOLERANCES[name])


def test_the_command_in_two_processes_writes_the_checkpoint_of_one(
    directory: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(steps=2, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
    adapt(directory / "model", tmp_path / "single", write_folder(tmp_path / "data"), config)
    whole = [line["loss"] for line in read_lines(tmp_path / "single.training" / "log.jsonl")]
    lines = read_lines(directory / "sharded.training" / "log.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(whole, rel=1e-5)
    assert json.loads((directory / "sharded" / "adaptation.json").read_text())["processes"] == 2
    single, sharded = Checkpoint(tmp_path / "single"), Checkpoint(directory / "sharded")
    assert single.keys() == sharded.keys()
    for key in single.specs:
        # A gradient near zero may round to either side, which Adam turns into a step of its size.
        torch.testing.assert_close(single.read(key), sharded.read(key), rtol=1e-4, atol=4e-3)
    assert sum(
        not torch.allclose(single.read(key), sharded.read(key), atol=1e-5) for key in single.specs
    ) < 0.1 * len(single.keys())


def test_passes_that_do_not_divide_over_the_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparse_unified.adapt.trainer.num_processes", lambda: 3)
    with pytest.raises(ValueError, match=r"batch_size / micro_batch_size = 2 must be a multiple"):
        trainer()
