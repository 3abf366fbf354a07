# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are made and read where the system has less than Linux, as macOS and Windows do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkpoint_files import GOLDEN, child_environment

from sparse_unified.cli import main
from sparse_unified.fixtures import write_checkpoint

# What the two lack in modules `fcntl` and `resource` and in `os`.
_HIDE = """
import os, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in "preadv sendfile fchmod O_DIRECTORY O_NOFOLLOW O_NONBLOCK".split():
    delattr(os, name)
"""
_RUN = """
from sparse_unified import adapt, analysis, bagel, engines
from sparse_unified.cli import main
for arguments in (
    ["convert", "dense", "other/sparse", "--num-experts", "4", "--top-k", "2"],
    ["verify", "other/sparse", "--against", "dense"],
    ["invert", "other/sparse", "other/dense"],
    ["prune", "dense", "other/pruned", "--component", "gen", "--keep-ratio", "0.5"],
    ["info", "other/pruned"],
    ["card", "other/pruned"],
):
    assert main(arguments) == 0, arguments
"""


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def test_checkpoint_tools_write_the_same_files(tmp_path: Path) -> None:
    dense = write_checkpoint(GOLDEN / "t2i_dense", tmp_path / "dense")
    (tmp_path / "other").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", _HIDE + _RUN],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    sparse, pruned = str(tmp_path / "sparse"), str(tmp_path / "pruned")
    assert main(["convert", str(dense), sparse, "--num-experts", "4", "--top-k", "2"]) == 0
    assert main(["prune", str(dense), pruned, "--component", "gen", "--keep-ratio", "0.5"]) == 0
    for name in ("sparse", "pruned", "dense"):
        assert files(tmp_path / "other" / name) == files(tmp_path / name), name
