# SPDX-License-Identifier: Apache-2.0
"""Prints by how many bytes each operation raises the peak memory; run by test_checkpoint_memory.

Usage: checkpoint_memory.py OPERATION WARM_UP_ARGUMENTS... ARGUMENTS..., where the operation is
convert, verify, invert, prune or verify_pruned.
The warm-up runs the same on something tiny, so that imports and first calls do not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparse_unified.checkpoint import (
    PruneWidthConfig,
    SkipLayersConfig,
    convert,
    invert,
    prune,
    verify,
)


def peak_bytes() -> int:
    """Returns the most memory this process has had resident so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("checkpoint_memory: /proc/self/status must have VmHWM, got none")


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


if __name__ == "__main__":
    run(sys.argv[1], *sys.argv[2:4])
    before = peak_bytes()
    run(sys.argv[1], *sys.argv[4:6])
    sys.stdout.write(f"{peak_bytes() - before}\n")
