# SPDX-License-Identifier: Apache-2.0
"""Puts the CUDA bindings over emulated kernels behind the ops, for this process.

They take the place of the CPU kernels, so these tests run in a process of their own
(`make emulated`), and skip themselves in any other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import sparse_unified  # noqa: F401  (registers the ops that are replaced here)

TESTS = Path(__file__).parent.parent
LIBRARY = TESTS.parent / "build" / "cmake" / "libsparse_unified_emulated_ops.so"
ENABLED = "SPARSE_UNIFIED_TEST_EMULATED"

sys.path.insert(0, str(TESTS))

if ENABLED in os.environ:
    torch.ops.load_library(LIBRARY)

# Index of emulation/schedule.h's Order, then of its Copies.
SCHEDULES = {
    "forward-lazy": (1, 0, 0),
    "reverse-random": (2, 1, 2),
    "random-eager": (3, 2, 1),
    "priorities-random": (4, 3, 2),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ENABLED not in os.environ:
        reason = f"replaces the ops of its process: make emulated sets {ENABLED}"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _emulator() -> None:
    """Every test begins on an A100, with threads in order and copies that land late."""
    if ENABLED in os.environ:
        torch.ops.sparse_unified_emulation.set_device(80)
        torch.ops.sparse_unified_emulation.set_schedule(*SCHEDULES["forward-lazy"])


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    """Runs the test under each of a few orders of threads and timings of copies."""
    name: str = request.param
    torch.ops.sparse_unified_emulation.set_schedule(*SCHEDULES[name])
    return name
