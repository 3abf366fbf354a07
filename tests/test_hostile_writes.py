# SPDX-License-Identifier: Apache-2.0
"""Kills, disks that fail at any call, and runs that want one target, lose nothing, mix nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import make_dense, run_python
from refusals import refused

from sparse_unified.checkpoint.files import replace_file

SCRIPT = Path(__file__).with_name("disk_faults.py")
EVERY = [f"{kind}-{name}" for kind in ("kill", "fail") for name in ("convert", "prune", "invert")]


@pytest.mark.parametrize(
    ("stride", "jobs"),
    [
        (8, ["kill-convert", "fail-convert", "race"]),
        pytest.param(1, [*EVERY, "race"], marks=pytest.mark.slow),
    ],
)
def test_whatever_happens_to_a_run_its_target_is_absent_or_complete(
    stride: int, jobs: list[str], tmp_path: Path
) -> None:
    dense = make_dense(tmp_path / "dense", num_layers=3, width=16)
    done = run_python(SCRIPT, dense, tmp_path, stride, *jobs)
    assert done.returncode == 0, done.stderr
    for job, counts in json.loads(done.stdout).items():
        if job == "race":
            assert counts["refused"] == 2 * counts["done"]
        else:
            assert counts["killed" if job.startswith("kill") else "refused"] > 40 // stride, job
            assert counts["leftovers"] > 40 // stride or job.startswith("fail"), job


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_result_file_keeps_its_old_content_when_the_disk_fails(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_bytes(b"old")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if call == "replace" else os, call, fail)
    refused(
        "must be writable with room to spare, got No space left",
        replace_file,
        path,
        b"new",
        error=RuntimeError,
    )
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_result_file_is_no_way_to_other_files_and_keeps_its_mode(tmp_path: Path) -> None:
    victim, path, link = (tmp_path / name for name in ("victim", "r.json", "link"))
    victim.write_text("precious")
    link.symlink_to(victim)
    (tmp_path / ".r.json.partial").symlink_to(victim)
    path.write_text("old")
    path.chmod(0o600)
    replace_file(path, b"new")
    replace_file(link, b"new")
    assert path.read_text() == link.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


def test_two_writers_of_one_result_file_never_tear_it(tmp_path: Path) -> None:
    path, contents = tmp_path / "r.bin", (b"a" * 300_000, b"b" * 1_000)
    replace_file(path, contents[0])
    children = []
    for content in contents:
        child = os.fork()
        if child == 0:
            for _ in range(100):
                replace_file(path, content)
            os._exit(0)
        children.append(child)
    seen = [path.read_bytes() for _ in range(200)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert set(seen) <= set(contents)
    assert [file.name for file in tmp_path.iterdir()] == ["r.bin"]
