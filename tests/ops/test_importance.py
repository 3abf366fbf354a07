# SPDX-License-Identifier: Apache-2.0
"""ffn_importance against the reference: sums over tokens of what each neuron does."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, each_thread_count, layouts
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import composed, reference


def arguments(
    num_tokens: int = 37,
    hidden_size: int = 40,
    width: int = 50,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = max(hidden_size, 1) ** -0.5
    return (
        torch.randn(num_tokens, hidden_size).to(dtype),
        (torch.randn(width, hidden_size) * scale).to(dtype),
        (torch.randn(width, hidden_size) * scale).to(dtype),
    )


def hidden_of(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def assert_sums(
    x: Tensor, gate: Tensor, up: Tensor, threshold: float, weights: Tensor | None = None
) -> None:
    """Means as exact as those of torch's own h; a token fires unless it is near the threshold."""
    *sums, num_fired = ops.ffn_importance(x, gate, up, threshold, weights)
    *exact, exact_fired = reference.ffn_importance(
        x.double(), gate.double(), up.double(), threshold, weights
    )
    weight = torch.ones(len(x)) if weights is None else weights
    hidden = hidden_of(x, gate, up).float()
    torch_sums = (hidden.abs() * weight[:, None]).sum(0), (hidden.square() * weight[:, None]).sum(0)
    for own, torch_own, ref in zip(sums, torch_sums, exact, strict=True):
        total = weight.sum()
        error = (own - ref).abs().max() / total
        torch_error = (torch_own - ref).abs().max() / total
        # Of few values, which of the two rounds worse is a matter of chance.
        chance = torch.finfo(x.dtype).eps * ref.max() / total if len(ref) < 1024 else 0
        assert error <= 2 * torch_error + 1e-6 + chance
    size = hidden_of(x.double(), gate.double(), up.double()).abs()
    near = (size - threshold).abs() <= 4 * torch.finfo(x.dtype).eps * (1 + size)
    allowed = (near * weight[:, None]).sum(0) + 1e-5 * weight.sum()
    assert ((num_fired - exact_fired).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "width"),
    [
        (DTYPES[i % 3], n, w)
        for i, (n, w) in enumerate(itertools.product((1, 37, 300), (1, 15, 50, 1100)))
    ],
)
def test_sums_are_as_exact_as_torch(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    assert_sums(*arguments(num_tokens, 40, width, dtype), threshold=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_many_tokens(dtype: torch.dtype) -> None:
    assert_sums(*arguments(4096, 16, 40, dtype), threshold=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_count_by_their_weight(dtype: torch.dtype) -> None:
    weights = torch.rand(600) * (torch.rand(600) > 0.3)
    assert_sums(*arguments(600, 24, 70, dtype), threshold=0.1, weights=weights)


@pytest.mark.parametrize("num_tokens", [5, 700])
def test_tokens_of_weight_zero_count_for_nothing_even_if_nan(num_tokens: int) -> None:
    x, gate, up = arguments(num_tokens)
    mask = (torch.rand(num_tokens) > 0.5).float()
    mask[0] = 1
    expected = ops.ffn_importance(x, gate, up, 0.1, mask)
    x[mask == 0] = torch.nan
    for own, other in zip(ops.ffn_importance(x, gate, up, 0.1, mask), expected, strict=True):
        assert torch.equal(own, other)


def test_ones_as_weights_change_nothing() -> None:
    given = arguments()
    plain = ops.ffn_importance(*given, 0.1)
    for own, other in zip(ops.ffn_importance(*given, 0.1, torch.ones(37)), plain, strict=True):
        assert torch.equal(own, other)


def test_firing_is_a_count_and_falls_with_the_threshold() -> None:
    x, gate, up = arguments(500)
    counts = [ops.ffn_importance(x, gate, up, t)[2] for t in (0.0, 0.05, 0.2, 1.0, 1e6)]
    assert torch.equal(counts[0], torch.full((50,), 500.0))
    assert torch.equal(counts[-1], torch.zeros(50))
    for more, fewer in itertools.pairwise(counts):
        assert torch.equal(more, more.round())
        assert (more >= fewer).all()
        assert more.sum() > fewer.sum()


def test_a_value_equal_to_the_threshold_does_not_fire() -> None:
    # silu passes a gate of 32 on whole, so h is exactly 32 * 0.5.
    x = torch.tensor([[1.0]])
    gate, up = torch.full((1, 1), 32.0), torch.full((1, 1), 0.5)
    assert ops.ffn_importance(x, gate, up, 16.0)[2].item() == 0
    assert ops.ffn_importance(x, gate, up, 15.999)[2].item() == 1


@pytest.mark.parametrize("sizes", [(0, 40, 50), (7, 0, 50), (7, 40, 0)])
def test_empty_sums_are_zero(sizes: tuple[int, int, int]) -> None:
    for sums in ops.ffn_importance(*arguments(*sizes)):
        assert sums.dtype == torch.float32
        assert torch.equal(sums, torch.zeros(sizes[2]))


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    x, gate, up = arguments(1024)
    whole = ops.ffn_importance(x, gate, up, 0.1)
    parts = [ops.ffn_importance(part, gate, up, 0.1) for part in x.split(512)]
    for own, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(first + second, own, rtol=1e-6, atol=1e-6)


def test_thread_counts_only_change_the_rounding_of_torchs_gemm() -> None:
    given = arguments(300, 48, 600)
    expected = ops.ffn_importance(*given)
    for _ in each_thread_count():
        for own, other in zip(ops.ffn_importance(*given), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_layout_of_the_arguments_does_not_matter(position: int) -> None:
    given = arguments(300, 35, 40)
    expected = ops.ffn_importance(*given)
    for name, view in layouts(given[position]):
        other = [*given[:position], view, *given[position + 1 :]]
        for own, exact in zip(ops.ffn_importance(*other), expected, strict=True):
            torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)
    weights = torch.rand(300)
    strided = torch.stack([weights, weights], 1)[:, 0]
    for own, exact in zip(
        ops.ffn_importance(*given, 0.0, strided),
        ops.ffn_importance(*given, 0.0, weights),
        strict=True,
    ):
        assert torch.equal(own, exact)


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
