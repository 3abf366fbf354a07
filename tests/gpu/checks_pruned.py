# SPDX-License-Identifier: Apache-2.0
"""pruned_ffn over kept blocks, and ffn_importance, on devices that have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from device_cases import HALVES, assert_equal, grid, needs_kernel, poison
from op_cases import assert_as_good_as_torch
from registry import check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference


def tensors(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, width: int
) -> list[Tensor]:
    """x [T, D] and weights whose outputs have about unit size."""
    with torch.device(device):
        x = torch.randn(num_tokens, hidden_size)
        gate, up = (torch.randn(width, hidden_size) * hidden_size**-0.5 for _ in range(2))
        down = torch.randn(hidden_size, width) * (width / 4) ** -0.5
    return [t.to(dtype) for t in (x, gate, up, down)]


def blocks(device: torch.device, kept: Sequence[int]) -> Tensor:
    return torch.tensor(list(kept), dtype=torch.int32, device=device)


def torch_pruned(tokens: Sequence[Tensor], kept: Tensor, block_size: int) -> Tensor:
    """What torch computes in the dtype of x, one rounding an op."""
    x, gate, up, down = tokens
    first = kept.long()[:, None] * block_size
    own = (first + torch.arange(block_size, device=first.device)).reshape(-1)
    return F.linear(F.silu(F.linear(x, gate[own])) * F.linear(x, up[own]), down[:, own])


@check(
    *grid(dtype=HALVES, num_tokens=(0, 1, 37, 300), block_size=(16, 32, 64, 128)),
    *grid(dtype=HALVES, num_tokens=(1000,), block_size=(16, 64), sizes=((3584, 18944),)),
    small=lambda num_tokens, **_: num_tokens < 1000,
)
def pruned_ffn_is_as_exact_as_torch(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    block_size: int,
    sizes: tuple[int, int] = (136, 1280),
) -> None:
    needs_kernel(device, "pruned_ffn")
    hidden_size, width = sizes
    arguments = tensors(device, dtype, num_tokens, hidden_size, width)
    x, *weights = arguments
    count = width // block_size
    for kept in (range(0, count, 2), range(count), [count - 1], [count - 1, 0, 3]):
        listed = blocks(device, kept)
        wide = reference.pruned_ffn(x.float(), listed, *(w.float() for w in weights), block_size)
        scale = max(len(list(kept)) / count, 0.2) ** 0.5  # few blocks make small outputs
        poison(device, (tuple(x.shape), dtype))
        out = ops.pruned_ffn(x, listed, *weights, block_size)
        own = torch_pruned(arguments, listed, block_size)
        assert_as_good_as_torch(out.float() / scale, own.float() / scale, wide / scale)
        for _ in range(3):
            assert_equal("repeat", ops.pruned_ffn(x, listed, *weights, block_size), out)


@check(*grid(dtype=HALVES))
def what_is_not_kept_is_not_read(device: torch.device, dtype: torch.dtype) -> None:
    needs_kernel(device, "pruned_ffn")
    x, gate, up, down = tensors(device, dtype, 100, 72, 320)
    kept = blocks(device, [1, 4, 2])
    expected = ops.pruned_ffn(x, kept, gate, up, down, 64)
    for start in (0, 192):
        for weight in (gate, up, down.t()):
            weight[start : start + 64] = torch.nan
    assert_equal("y", ops.pruned_ffn(x, kept, gate, up, down, 64), expected)
    none = ops.pruned_ffn(x, kept[:0], gate, up, down, 64)
    assert_equal("y of no blocks", none, torch.zeros_like(none))


@check(*grid(dtype=HALVES, recompute=(False, True)))
def gradients_of_pruned_ffn(device: torch.device, dtype: torch.dtype, recompute: bool) -> None:
    needs_kernel(device, "pruned_ffn_train")
    arguments = tensors(device, dtype, 90, 72, 320)
    kept = blocks(device, [3, 0, 2])
    grad = torch.randn(90, 72, device=device).to(dtype)
    leaves = [t.requires_grad_() for t in arguments]
    y = ops.pruned_ffn(leaves[0], kept, *leaves[1:], 64, recompute=recompute)
    own = torch.autograd.grad(y, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(
        reference.pruned_ffn(wide[0], kept, *wide[1:], 64), wide, grad.double()
    )
    for position, (gradient, expected) in enumerate(zip(own, exact, strict=True)):
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error <= 16 * torch.finfo(dtype).eps, f"gradient {position} is off by {error:.3g}"


@check(*grid(dtype=HALVES, num_tokens=(0, 1, 37, 700)))
def importance_is_that_of_the_reference(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    needs_kernel(device, "ffn_importance")
    x, gate, up, _ = tensors(device, dtype, num_tokens, 72, 208)
    found = ops.ffn_importance(x, gate, up)
    exact = reference.ffn_importance(x.double(), gate.double(), up.double())
    for name, out, expected in zip(("sum", "square"), found[:2], exact[:2], strict=True):
        error = (out.double() - expected).norm()
        allowed = 4 * torch.finfo(dtype).eps * expected.norm()
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    for own, other in zip(ops.ffn_importance(x, gate, up), found, strict=True):
        assert_equal("repeat", own, other)
