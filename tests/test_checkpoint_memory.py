# SPDX-License-Identifier: Apache-2.0
"""Memory is bounded by the largest projection, not by the size of the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import child_environment, make_dense

SCRIPT = Path(__file__).with_name("checkpoint_memory.py")

# 6 layers x 6 projections of 8.4 MB and two embeddings of 8.4 MB: 370 MB, about 44 projections.
HIDDEN, WIDTH, LAYERS = 512, 4096, 6
PROJECTION = HIDDEN * WIDTH * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_a_few_projections(tmp_path: Path) -> None:
    big = make_dense(
        tmp_path / "big", hidden=HIDDEN, width=WIDTH, num_layers=LAYERS, vocabulary=WIDTH
    )
    make_dense(tmp_path / "small", hidden=64, width=64)
    total = (big / "ema.safetensors").stat().st_size
    assert total > 40 * PROJECTION

    # verify holds the FFN of one layer, three projections, for the numeric comparison.
    bounds = {"convert": 4, "verify": 6, "invert": 4, "prune": 4, "verify_pruned": 6}
    arguments = {
        "convert": (("small", "small_s"), ("big", "big_s")),
        "verify": (("small_s", "small"), ("big_s", "big")),
        "invert": (("small_s", "small_d"), ("big_s", "big_d")),
        "prune": (("small", "small_p"), ("big", "big_p")),
        "verify_pruned": (("small_p", "small"), ("big_p", "big")),
    }
    grown = {}
    for operation, pairs in arguments.items():
        paths = [str(tmp_path / name) for pair in pairs for name in pair]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), operation, *paths],
            env=child_environment() | {"MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        grown[operation] = int(done.stdout) / PROJECTION
    assert all(grown[name] < bound for name, bound in bounds.items()), grown
    assert (tmp_path / "big_d" / "ema.safetensors").stat().st_size == total
