# SPDX-License-Identifier: Apache-2.0
"""What every test shares: seeded random numbers, one thread, and a hypothesis profile."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# What was found out about the kernels of this machine is nothing to tests.
os.environ["SPARSE_UNIFIED_CACHE"] = str(Path(tempfile.gettempdir()) / f"no-cache-{os.getpid()}")

# Time limits of single examples depend on the machine; reproducible examples do not.
settings.register_profile(
    "sparse_unified",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sparse_unified")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense FFNs of any number of tokens, whoever holds their weights, by the same products."""
    monkeypatch.setattr("sparse_unified.nn.dense._KERNEL_TOKENS", math.inf)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are small, and thread pools of parallel test runs starve each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
