# SPDX-License-Identifier: Apache-2.0
"""ffn_importance against the reference: sums over tokens of what each neuron does.

`test_attack.py` compares it with the reference in any layout, size and weighting.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, each_thread_count, grouped_values
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import composed, reference


def arguments(
    num_tokens: int = 37,
    hidden_size: int = 40,
    width: int = 50,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    values = grouped_values(num_tokens, hidden_size, 1, width, 1, dtype)
    return values["x"], values["gate_proj"], values["up_proj"]


def hidden_of(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "width"),
    [
        *((DTYPES[i % 3], *size) for i, size in enumerate(itertools.product(
            (1, 37, 300), (1, 15, 50, 1100)))),
        *((dtype, 4096, 40) for dtype in DTYPES),
    ],
)  # fmt: skip
def test_sums_are_as_exact_as_torch(
    dtype: torch.dtype, num_tokens: int, width: int, is_weighted: bool
) -> None:
    """Means as exact as those of torch's own h; a token fires unless it is near the threshold."""
    given, threshold = arguments(num_tokens, 40, width, dtype), 0.1
    weight = torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.3) + 1e-3
    weight = weight if is_weighted else torch.ones(num_tokens)
    *sums, num_fired = ops.ffn_importance(*given, threshold, weight if is_weighted else None)
    wide = [tensor.double() for tensor in given]
    *exact, exact_fired = reference.ffn_importance(*wide, threshold, weight)
    hidden = hidden_of(*given).float()
    torch_sums = (hidden.abs() * weight[:, None]).sum(0), (hidden.square() * weight[:, None]).sum(0)
    total = weight.sum()
    for own, torch_own, ref in zip(sums, torch_sums, exact, strict=True):
        error = (own - ref).abs().max() / total
        torch_error = (torch_own - ref).abs().max() / total
        # Of few values, which of the two rounds worse is a matter of chance.
        chance = torch.finfo(dtype).eps * ref.max() / total if len(ref) < 1024 else 0
        assert error <= 2 * torch_error + 1e-6 + chance
    size = hidden_of(*wide).abs()
    near = (size - threshold).abs() <= 4 * torch.finfo(dtype).eps * (1 + size)
    allowed = (near * weight[:, None]).sum(0) + 1e-5 * total
    assert ((num_fired - exact_fired).abs() <= allowed).all()


@pytest.mark.parametrize("num_tokens", [5, 700])
def test_tokens_of_weight_zero_count_for_nothing_even_if_nan(num_tokens: int) -> None:
    x, gate, up = arguments(num_tokens)
    mask = (torch.rand(num_tokens) > 0.5).float()
    mask[0] = 1
    expected = ops.ffn_importance(x, gate, up, 0.1, mask)
    x[mask == 0] = torch.nan
    for own, other in zip(ops.ffn_importance(x, gate, up, 0.1, mask), expected, strict=True):
        assert torch.equal(own, other)


def test_a_value_equal_to_the_threshold_does_not_fire() -> None:
    # silu passes a gate of 32 on whole, so h is exactly 32 * 0.5.
    x = torch.tensor([[1.0]])
    gate, up = torch.full((1, 1), 32.0), torch.full((1, 1), 0.5)
    assert ops.ffn_importance(x, gate, up, 16.0)[2].item() == 0
    assert ops.ffn_importance(x, gate, up, 15.999)[2].item() == 1


def test_parts_and_threads_only_change_the_rounding() -> None:
    x, gate, up = arguments(1024, 48, 600)
    whole = ops.ffn_importance(x, gate, up, 0.1)
    for _ in each_thread_count():
        again = ops.ffn_importance(x, gate, up, 0.1)
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
        parts = [ops.ffn_importance(part, gate, up, 0.1) for part in x.split(512)]
        for own, first, second in zip(again, *parts, strict=True):
            torch.testing.assert_close(first + second, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_composed_of_torch_ops_it_is_the_same(dtype: torch.dtype, is_weighted: bool) -> None:
    """What CUDA runs, on more neurons than one tile, with NaN where a weight is zero."""
    x, gate, up = arguments(20, 24, 4096 + 50, dtype)
    weights = torch.rand(20) if is_weighted else None
    if weights is not None:
        weights[3] = 0
        x[3] = torch.nan
    found = composed.ffn_importance(x, gate, up, 0.1, weights)
    exact = reference.ffn_importance(x.double(), gate.double(), up.double(), 0.1, weights)
    for own, other in zip(found[:2], exact[:2], strict=True):
        assert own.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(own.double(), other.double(), rtol=tolerance, atol=tolerance)
    assert (found[2] - exact[2]).abs().mean() < 0.2
