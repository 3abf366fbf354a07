# SPDX-License-Identifier: Apache-2.0
"""What every test shares: random numbers, one thread, a profile of hypothesis, recorded models."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
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
# Tests are small, and thread pools of parallel test runs starve each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense FFNs of any number of tokens, whoever holds their weights, by the same products."""
    monkeypatch.setattr("sparse_unified.nn.dense._KERNEL_TOKENS", math.inf)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the model directory of a recorded case, which no test changes."""
    from moe_cases import GOLDEN

    from sparse_unified.fixtures import write_checkpoint

    root = tmp_path_factory.mktemp("golden")
    return functools.cache(lambda case: write_checkpoint(GOLDEN / case, root / case))
