# SPDX-License-Identifier: Apache-2.0
"""Which kernels a sparse FFN runs on, and why none."""

from __future__ import annotations

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
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 and a build with CUDA kernels, as far as the choice can see."""
    monkeypatch.setattr(backend, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_the_cpu_takes_everything() -> None:
    odd = {**BAGEL, "dtype": torch.float32, "widths": (3, 1), "hidden_size": 5}
    assert backend.choose(torch.device("cpu"), **odd) == "cpu"


def test_other_devices_have_no_kernel() -> None:
    assert "device type 'meta'" in backend.choose(torch.device("meta"), **BAGEL)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(1184, 0), (592, 0), (1184, 1184), (8, 0)])
def test_cuda_takes_16_bit_types_in_multiples_of_eight(
    dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    assert backend.choose(CUDA, **{**BAGEL, "dtype": dtype, "widths": widths}) == "cuda"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, got float32"),
        ({"hidden_size": 3580}, "hidden size that is a multiple of 8, got 3580"),
        ({"widths": (1180, 0)}, "expert width that is a multiple of 8, got 1180"),
        ({"widths": (1184, 4)}, "expert width that is a multiple of 8, got 4"),
        ({"num_experts": 512}, "up to 256 experts, got 512"),
    ],
)
def test_cuda_says_what_it_does_not_take(change: dict[str, Any], why: str) -> None:
    chosen = backend.choose(CUDA, **{**BAGEL, **change})
    assert chosen.startswith("torch: ")
    assert why in chosen


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_composes_torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0, got 7.5" in backend.choose(CUDA, **BAGEL)


def test_a_build_without_nvcc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_cuda_kernels", lambda: False)
    assert "without nvcc" in backend.choose(CUDA, **BAGEL)
