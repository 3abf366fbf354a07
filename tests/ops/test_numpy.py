# SPDX-License-Identifier: Apache-2.0
"""The kernels without torch, as numpy functions, against numpy and against the ops."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from problems import call, grouped_values
from torch import Tensor

BUILD = Path(__file__).parent.parent.parent / "build" / "cmake"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    path = BUILD / f"sparse_unified_test{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not path.exists():
        pytest.skip(f"{path} is not built (make kernels)")
    spec = importlib.util.spec_from_file_location("sparse_unified_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Storage as the kernels take it: float32, or the bits of a 16-bit type."""
    wide = tensor.dtype in (torch.float32, torch.int32)
    return tensor.numpy() if wide else tensor.view(torch.uint16).numpy()


def to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).view(dtype)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_widening_is_exact_for_every_pattern(kernels: ModuleType, name: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    out = torch.from_numpy(kernels.widen(bits, name))
    expected = to_torch(bits, DTYPES[name]).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrowing_rounds_like_torch(kernels: ModuleType, name: str) -> None:
    patterns = torch.randint(-(2**31), 2**31, (400_000,)).int()
    every_value = to_torch(np.arange(2**16, dtype=np.uint16), DTYPES[name]).float()
    neighbour = every_value.roll(1)
    values = torch.cat([patterns.view(torch.float32), every_value, (every_value + neighbour) / 2])
    out = to_torch(kernels.narrow(values.numpy(), name), DTYPES[name])
    expected = values.to(DTYPES[name])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(out.signbit()[numbers], expected.signbit()[numbers])


def test_exponential_and_sigmoid(kernels: ModuleType) -> None:
    x = torch.linspace(-87, 87, 200_001)
    for function, exact, ulps in (
        (kernels.exp, x.double().exp(), 2.5),
        (kernels.sigmoid, x.double().sigmoid(), 4.5),
    ):
        out = torch.from_numpy(function(x.numpy())).double()
        assert ((out - exact).abs() / exact).max() < ulps * 2**-23


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
def test_swiglu(kernels: ModuleType, name: str, size: int) -> None:
    gate, up = (torch.randn(size) * 3).to(DTYPES[name]), torch.randn(size).to(DTYPES[name])
    out = to_torch(kernels.swiglu(to_numpy(gate), to_numpy(up), name), DTYPES[name])
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    rtol = max(torch.finfo(DTYPES[name]).eps, 2e-6)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("name", DTYPES)
def test_kernels_and_ops_give_the_same_bits(kernels: ModuleType, name: str) -> None:
    dtype = DTYPES[name]
    v = grouped_values(37, 67, 17, 0, 5, dtype)
    x, y = to_numpy(v["x"]), to_numpy(v["y"])
    topk_idx, token_rows, weights = (
        v[name].numpy() for name in ("topk_idx", "token_rows", "weights")
    )
    found = [
        *kernels.route_topk(x, to_numpy(v["gate"]), 5, name),
        *kernels.sort_by_expert(topk_idx, 17),
        kernels.permute(x, token_rows, name),
        kernels.combine(y, weights, token_rows, name),
        kernels.combine(y, None, token_rows, name),
    ]
    expected = [
        *call("route_topk", v),
        *call("sort_by_expert", v),
        call("permute", v),
        call("combine", v),
        call("combine", v | {"weights": None}),
    ]
    for own, other in zip(found, expected, strict=True):
        assert np.array_equal(own, to_numpy(other))


def test_bad_arguments_are_value_errors(kernels: ModuleType) -> None:
    x = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int8"):
        kernels.swiglu(x[0], x[0], "int8")
    with pytest.raises(ValueError, match="x must be a C-contiguous array of rank 2"):
        kernels.route_topk(x.T, x, 1)
    with pytest.raises(ValueError, match="top_k must be from 1 to E"):
        kernels.route_topk(x, x, 4)
    with pytest.raises(ValueError, match="topk_idx must be from 0 to E - 1"):
        kernels.sort_by_expert(np.full((2, 1), 3, np.int32), 3)
