# SPDX-License-Identifier: Apache-2.0
"""Which kernels a sparse FFN runs on, and why none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparse_unified.ops import backend

BAGEL: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "hidden_size": 3584,
    "widths": (1184, 0),
    "num_experts": 16,
}


@pytest.mark.parametrize(
    ("device", "change", "chosen"),
    [
        ("cpu", {"dtype": torch.float32, "widths": (3, 1), "hidden_size": 5}, "cpu"),
        ("meta", {}, "device type 'meta'"),
        ("cuda", {}, "cuda"),
        ("cuda", {"dtype": torch.float16, "widths": (1184, 1184)}, "cuda"),
        ("cuda", {"widths": (8, 0)}, "cuda"),
        ("cuda", {"dtype": torch.float32}, "torch: .*bfloat16 and float16, got float32"),
        ("cuda", {"hidden_size": 3580}, "torch: .*hidden size that is a multiple of 8, got 3580"),
        ("cuda", {"widths": (1180, 0)}, "torch: .*width that is a multiple of 8, got 1180"),
        ("cuda", {"widths": (1184, 4)}, "torch: .*width that is a multiple of 8, got 4"),
        ("cuda", {"num_experts": 512}, "torch: .*up to 256 experts, got 512"),
    ],
)
def test_what_runs_and_why_not(
    device: str, change: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200 and a build with CUDA kernels, as far as the choice can see."""
    monkeypatch.setattr(backend, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = backend.choose(torch.device(device), **{**BAGEL, **change})
    assert re.search(rf"^{chosen}$" if chosen in ("cpu", "cuda") else chosen, found), found


def test_old_gpus_and_builds_without_nvcc_compose_torch_ops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(backend, "has_cuda_kernels", lambda: True)
    assert "8.0, got 7.5" in backend.choose(device, **BAGEL)
    monkeypatch.setattr(backend, "has_cuda_kernels", lambda: False)
    assert "without nvcc" in backend.choose(device, **BAGEL)
