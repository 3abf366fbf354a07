# SPDX-License-Identifier: Apache-2.0
"""Training sharded over two processes with FSDP2, beside one, and when one of them fails."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_models import FRESH, logged, losses, trainer, write_folder
from adapt_processes import DTYPES, run_both
from refusals import refused
from tiers import IS_DEEP

from sparse_unified.adapt import TrainingConfig, adapt
from sparse_unified.checkpoint import Checkpoint

# Sums of gradients are taken in another order; in bf16 each share is rounded before it is added.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
NAMES = [*DTYPES] if IS_DEEP else ["float32"]
OPTIONS = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def directory(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and what two processes make of them."""
    root = tmp_path_factory.mktemp("sharded")
    shutil.copytree(golden("t2i_moe"), root / "model")
    write_folder(root / "data")
    found = command(root, root / "sharded")
    assert [status for status, _ in found] == [0, 0], found
    return root


def command(root: Path, out: Path, *more: str, fault: str = "") -> list[tuple[int, str]]:
    paths = ["adapt", str(root / "model"), str(out), "--data", str(root / "data")]
    return run_both("command", *paths, *OPTIONS, "--checkpoint-every", "1", *more, fault=fault)


@pytest.fixture(scope="module")
def result(directory: Path) -> dict[str, Any]:
    for name in NAMES:
        own = trainer(dtype=DTYPES[name])
        losses(own, 2)
        own.save(directory / f"one-{name}")
    runs = run_both("train", str(directory), *NAMES)
    assert [status for status, _ in runs] == [0, 0], runs
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_lose_what_one_loses_and_their_states_go_on_in_any_number(
    name: str, directory: Path, result: dict[str, Any]
) -> None:
    own = trainer(dtype=DTYPES[name])
    expected = losses(own)
    close = TOLERANCES[name]
    assert result[name] == pytest.approx(expected, rel=close)
    assert result[f"{name} norm"] == pytest.approx(own.step().grad_norm, rel=10 * close)
    whole = sum(tensor.nbytes for tensor in own.optimizer.state.values())
    assert 0.45 * whole < result[f"{name} state"] < 0.55 * whole

    assert result[f"{name} from two"] == result[name][2:]
    assert result[f"{name} from one"] == pytest.approx(expected[2:], rel=close)
    single = trainer(dtype=DTYPES[name])
    single.load(directory / f"two-{name}")
    assert losses(single) == pytest.approx(expected[2:], rel=close)


def test_two_processes_balance_a_freshly_converted_model_as_one_does(
    result: dict[str, Any],
) -> None:
    one = losses(trainer(is_fresh=True, micro_batch_size=4, **FRESH))
    assert result["fresh"] == pytest.approx(one, rel=1e-5)
    one = losses(trainer(is_fresh=True, micro_batch_size=4, balance_rate=0.01, **FRESH))
    assert result["evened out"] == pytest.approx(one, rel=1e-5)


def test_the_command_in_two_processes_writes_the_checkpoint_of_one(
    directory: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(steps=3, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
    adapt(directory / "model", tmp_path / "single", directory / "data", config)
    assert logged(directory / "sharded") == pytest.approx(logged(tmp_path / "single"), rel=1e-5)
    assert json.loads((directory / "sharded" / "adaptation.json").read_text())["processes"] == 2
    single, sharded = Checkpoint(tmp_path / "single"), Checkpoint(directory / "sharded")
    assert single.specs.keys() == sharded.specs.keys()
    # A gradient near zero may round to either side, which Adam turns into a step of its size.
    apart = 2 * config.steps * config.learning_rate
    for key in single.specs:
        torch.testing.assert_close(single.read(key), sharded.read(key), rtol=1e-4, atol=apart)
    assert sum(
        not torch.allclose(single.read(key), sharded.read(key), atol=1e-5) for key in single.specs
    ) < 0.1 * len(single.specs)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "state", "checkpoint"])
@pytest.mark.parametrize("what", ["kill", "stop", "full"])
def test_a_process_that_fails_ends_the_other_and_a_resumed_run_gives_the_same_bits(
    what: str, when: str, directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    failing = 0 if what == "full" else 1
    found = command(directory, out, "--timeout", "20", fault=f"{failing} {what} {when}")
    statuses = [status for status, _ in found]
    assert statuses[failing] == (1 if what == "full" else -signal.SIGKILL), found
    assert statuses[1 - failing] == 1, found
    assert "error: adapt: all 2 processes must run on and answer" in found[1 - failing][1]
    if what == "full":
        assert "got No space left on device" in found[0][1]
    assert not out.exists()

    found = command(directory, out, "--resume")
    assert [status for status, _ in found] == [0, 0], found
    assert logged(out) == logged(directory / "sharded")
    whole, resumed = Checkpoint(directory / "sharded"), Checkpoint(out)
    for key in whole.specs:
        assert torch.equal(whole.read(key), resumed.read(key)), key


def test_passes_that_do_not_divide_over_the_processes_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("sparse_unified.adapt.trainer.num_processes", lambda: 3)
    refused(r"batch_size / micro_batch_size = 2 must be a multiple", trainer)
