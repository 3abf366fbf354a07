# SPDX-License-Identifier: Apache-2.0
"""Memory is bounded by the largest projection, not by the size of the checkpoint.

Run as a script, this file prints by how many bytes an operation raises the peak memory:
OPERATION WARM_UP_ARGUMENTS... ARGUMENTS..., where the warm-up runs the same on something tiny, so
that imports and first calls do not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkpoint_files import child_environment, make_dense, run_python

from sparse_unified.checkpoint import (
    PruneWidthConfig,
    SkipLayersConfig,
    convert,
    invert,
    prune,
    verify,
)

# 6 layers x 6 projections of 8.4 MB and two embeddings of 8.4 MB: 370 MB, about 44 projections.
HIDDEN, WIDTH, LAYERS = 512, 4096, 6
PROJECTION = HIDDEN * WIDTH * 4


def peak_bytes() -> int:
    """Returns the most memory this process has had resident so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def run(operation: str, first: str, second: str) -> None:
    if operation == "convert":
        convert(first, second, num_experts=16, top_k=8)
    elif operation == "prune":
        widths = [PruneWidthConfig(component=name, budget="global") for name in ("gen", "und")]
        prune(first, second, [*widths, SkipLayersConfig(layers=[1])])
    elif operation.startswith("verify"):
        assert verify(first, second).ok
    else:
        invert(first, second)


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
    grown = {}
    for operation, suffixes, bound in (
        ("convert", ("", "_s"), 4),
        ("verify", ("_s", ""), 6),
        ("invert", ("_s", "_d"), 4),
        ("prune", ("", "_p"), 4),
        ("verify_pruned", ("_p", ""), 6),
    ):
        paths = [str(tmp_path / f"{name}{end}") for name in ("small", "big") for end in suffixes]
        trimmed = child_environment() | {"MALLOC_TRIM_THRESHOLD_": "0"}
        done = run_python(__file__, operation, *paths, env=trimmed)
        assert done.returncode == 0, done.stderr
        grown[operation] = int(done.stdout) / PROJECTION
        assert grown[operation] < bound, grown
    assert (tmp_path / "big_d" / "ema.safetensors").stat().st_size == total


if __name__ == "__main__":
    run(sys.argv[1], *sys.argv[2:4])
    before = peak_bytes()
    run(sys.argv[1], *sys.argv[4:6])
    sys.stdout.write(f"{peak_bytes() - before}\n")
