# SPDX-License-Identifier: Apache-2.0
"""The dense FFN: its kernel on the CPU, and when torch's products are taken instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unified.build import build_info
from sparse_unified.nn import SwiGLU

HIDDEN, TOKENS = 24, 10


class _Noted(TorchDispatchMode):
    """Notes the block sizes of the calls of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.block_sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.sparse_unified.pruned_ffn.default:
            self.block_sizes.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls() -> Iterator[list[int]]:
    with _Noted() as mode:
        yield mode.block_sizes


def formula(ffn: SwiGLU, x: Tensor) -> Tensor:
    gate, up, down = (layer.weight.double() for layer in ffn.children())
    return F.linear(F.silu(F.linear(x.double(), gate)) * F.linear(x.double(), up), down)


@pytest.mark.parametrize(("width", "block"), [(256, 128), (144, 48), (80, 80), (16, 16)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_the_kernel_computes_the_formula(
    width: int, block: int, dtype: torch.dtype, tolerance: float, calls: list[int]
) -> None:
    torch.manual_seed(0)
    ffn = SwiGLU(HIDDEN, width, dtype=dtype)
    x = torch.randn(2, TOKENS // 2, HIDDEN, dtype=dtype).transpose(0, 1)  # rows not side by side
    with torch.inference_mode():
        y = ffn(x)
    exact = formula(ffn, x)
    name = str(dtype).removeprefix("torch.")
    is_taken = any(kernel.startswith(f"{name} (") for kernel in build_info().cpu_ffn_kernels)
    assert calls == ([block] if is_taken else [])
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < tolerance


def hooked(ffn: SwiGLU) -> None:
    ffn.down_proj.register_forward_pre_hook(lambda module, args: None)


def replaced(ffn: SwiGLU) -> None:
    ffn.up_proj = nn.Sequential(ffn.up_proj)
    ffn.up_proj.out_features = 32


def own_forward(ffn: SwiGLU) -> None:
    ffn.gate_proj.forward = ffn.gate_proj.forward


def odd_width(ffn: SwiGLU) -> None:
    ffn.__init__(HIDDEN, 24)


@pytest.mark.parametrize("change", [hooked, replaced, own_forward, odd_width])
def test_what_changes_a_layer_is_heeded(change: Callable[[SwiGLU], None], calls: list[int]) -> None:
    torch.manual_seed(0)
    ffn = SwiGLU(HIDDEN, 32)
    change(ffn)
    with torch.inference_mode():
        ffn(torch.randn(TOKENS, HIDDEN))
    assert calls == []


def test_few_tokens_gradients_and_autocast_take_torch_products(calls: list[int]) -> None:
    torch.manual_seed(0)
    ffn = SwiGLU(HIDDEN, 32)
    x = torch.randn(TOKENS, HIDDEN)
    assert ffn(x).requires_grad
    with torch.inference_mode():
        ffn(x[:7])
        ffn(x[:0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ffn(x).dtype == torch.bfloat16
    assert calls == []
    frozen = ffn.requires_grad_(False)
    frozen(x)
    assert calls == [32]
