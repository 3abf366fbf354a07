# SPDX-License-Identifier: Apache-2.0
"""Every check of `registry` on a GPU; the small ones on the CPU too, which tries the checks."""

from __future__ import annotations

import pytest
import torch
from registry import Check, Skip, all_checks

CHECKS = all_checks()


def run(check: Check, device: str) -> None:
    try:
        check(torch.device(device))
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda(name: str) -> None:
    run(CHECKS[name], "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.is_small])
def test_on_cpu(name: str) -> None:
    run(CHECKS[name], "cpu")
