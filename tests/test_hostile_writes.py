# SPDX-License-Identifier: Apache-2.0
"""Disks that fail at any call, and runs that want the same target, lose nothing and mix nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import child_environment, make_dense

from sparse_unified.analysis import save_scores
from sparse_unified.checkpoint.files import replace_file

HERE = Path(__file__).parent


def run(what: str, tmp_path: Path) -> dict[str, int]:
    dense = make_dense(tmp_path / "dense", num_layers=3, width=16)
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile_writes.py"), what, str(dense), str(tmp_path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.slow
def test_a_disk_that_fails_at_any_call_leaves_the_target_absent_or_complete(tmp_path: Path) -> None:
    counts = run("fail", tmp_path)
    assert counts["convert refused"] > 30
    assert counts["prune refused"] > 30
    assert counts["invert refused"] > 20


@pytest.mark.slow
def test_of_conversions_to_one_target_at_once_exactly_one_is_done(tmp_path: Path) -> None:
    assert run("race", tmp_path) == {"done": 40, "refused": 80}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_result_file_keeps_its_old_content_when_the_disk_fails(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.safetensors"
    save_scores(path, {"gen": {0: torch.ones(4)}})
    before = path.read_bytes()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if call == "replace" else os, call, fail)
    with pytest.raises(
        RuntimeError, match="must be writable with room to spare, got No space left"
    ):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_result_file_is_no_way_to_other_files_and_keeps_its_mode(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "r.json"
    victim.write_text("precious")
    (tmp_path / ".r.json.partial").symlink_to(victim)
    path.write_text("old")
    path.chmod(0o600)
    replace_file(path, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
