# SPDX-License-Identifier: Apache-2.0
"""What only emulated kernels can tell: which of them run, every configuration, refusals."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from problems import (
    HALVES,
    Problem,
    assert_as_good_as_torch,
    assert_gradients,
    doubles,
    ffn_case,
    problem_of,
    pruned_problem,
)
from tiers import IS_DEEP

from sparse_unified import ops
from sparse_unified.bench.tune import VARIABLE, find_variants
from sparse_unified.ops import backend

EMULATION = torch.ops.sparse_unified_emulation


@pytest.fixture(autouse=True)
def _hopper() -> Iterator[None]:
    EMULATION.set_device(90)
    EMULATION.set_schedule(4, 3, 2)
    yield
    os.environ.pop(VARIABLE, None)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Names of the kernels that would run; while they are recorded, none does."""
    launches: list[str] = []
    EMULATION.record_launches(True)
    try:
        yield launches
    finally:
        launches += EMULATION.recorded_launches().splitlines()
        EMULATION.record_launches(False)


def problems(dtype: torch.dtype, num_tokens: int = 150) -> list[Problem]:
    """Several tiles of rows and of neurons, an expert without rows, blocks of 64 and of 32."""
    grouped = ffn_case(num_tokens, 136, 3, 80, 2, dtype, routing="gaps")
    kept = (7, 1, 2, 8)
    return [
        problem_of(grouped),
        pruned_problem(num_tokens, 136, 9, 64, kept, dtype),
        pruned_problem(num_tokens, 136, 9, 32, kept, dtype),
    ]


def problems_of(variant: str, dtype: torch.dtype, *, backward: bool = False) -> list[Problem]:
    """Those that a configuration takes; the kernels for Hopper take lists of blocks of 64 forward,
    in tiles of whole blocks."""
    taken = 3 if "sm90a" not in variant else 1 if backward or "x240x" in variant else 2
    return problems(dtype)[:taken]


def test_the_kernels_of_both_families_have_configurations() -> None:
    assert sum(variant.startswith("family=sm90a") for variant in find_variants("fwd")) == 10
    assert len(find_variants("fwd_bwd")) > 6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", find_variants("fwd"))
def test_every_configuration_computes_the_same(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in problems_of(variant, dtype):
        exact, in_torch = problem.exact(), problem.in_torch(*problem.leaves)
        monkeypatch.setenv(VARIABLE, variant)
        assert_as_good_as_torch(problem.y(), in_torch, exact)
        monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize("dtype", HALVES if IS_DEEP else HALVES[:1])
@pytest.mark.parametrize("variant", find_variants("fwd_bwd"))
def test_every_configuration_has_the_same_gradients(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in problems_of(variant, dtype, backward=True):
        leaves = problem.trained().leaves
        grad = torch.randn(problem.exact().shape).to(dtype)
        wide = doubles(*leaves)
        exact = torch.autograd.grad(problem.in_torch(*wide), wide, grad.double())
        monkeypatch.setenv(VARIABLE, variant)
        own = torch.autograd.grad(problem.call(*leaves), leaves, grad)
        monkeypatch.delenv(VARIABLE)
        assert_gradients(own, exact, dtype)


@pytest.mark.parametrize(("block_size", "is_hopper"), [(32, False), (64, True), (128, True)])
def test_blocks_of_64_run_forward_on_the_kernels_for_hopper(
    block_size: int, is_hopper: bool
) -> None:
    problem = pruned_problem(70, 72, 9, block_size, (7, 1, 2, 8), torch.bfloat16).trained()
    with recorded() as launches:
        problem.call(*problem.leaves).sum().backward()
    text = "\n".join(launches)
    assert ("up_sm90a" in text) == is_hopper
    assert ("grouped_ffn_up_kernel" in text) != is_hopper
    assert "grad_hidden_sm90a" not in text


@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_that_share_the_weights_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in problems(dtype, 200)[:2]:
        monkeypatch.setenv(VARIABLE, "family=sm90a")
        alone = problem.y()
        monkeypatch.setenv(VARIABLE, "family=sm90a,multicast=on")
        assert torch.equal(problem.y(), alone)
        with recorded() as launches:
            problem.y()
        assert len(launches) == 2
        assert all(", 2>" in launch for launch in launches), launches


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "width", "num_experts"),
    [
        (torch.bfloat16, 40, 24, 5),
        (torch.float16, 8, 8, 256),
        (torch.float32, 40, 24, 5),
        (torch.bfloat16, 36, 24, 5),
        (torch.bfloat16, 40, 20, 5),
    ],
)
def test_python_and_the_library_refuse_alike(
    dtype: torch.dtype, hidden_size: int, width: int, num_experts: int
) -> None:
    why = backend.cuda_refusal(
        dtype=dtype, hidden_size=hidden_size, widths=(width, 0), num_experts=num_experts
    )
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    offsets[1:] = 1
    arguments = (
        torch.randn(1, hidden_size).to(dtype),
        torch.zeros(1, dtype=torch.int32),
        offsets,
        torch.randn(num_experts * width, hidden_size).to(dtype),
        torch.randn(num_experts * width, hidden_size).to(dtype),
        torch.randn(hidden_size, num_experts * width).to(dtype),
    )
    if why is None:
        assert ops.grouped_ffn(*arguments).shape == (1, hidden_size)
    else:
        with pytest.raises(RuntimeError, match="grouped_ffn"):
            ops.grouped_ffn(*arguments)


def test_bad_arguments_are_named_before_a_kernel_runs() -> None:
    x = torch.randn(4, 16).bfloat16()
    with pytest.raises(
        RuntimeError, match=r"route_topk: gate must have dtype bfloat16, got float32"
    ):
        ops.route_topk(x, torch.randn(3, 16), 2)
    with pytest.raises(RuntimeError, match=r"route_topk: top_k must be from 1 to .* 3, got 4"):
        ops.route_topk(x, torch.randn(3, 16).bfloat16(), 4)
    with pytest.raises(RuntimeError, match=r"sort_by_expert: topk_idx must have dtype int32"):
        ops.sort_by_expert(torch.zeros(3, 2, dtype=torch.int64), 4)
    with pytest.raises(RuntimeError, match=r"at most 256"):
        ops.sort_by_expert(torch.zeros(3, 2, dtype=torch.int32), 257)


def test_an_index_out_of_range_ends_the_kernel() -> None:
    with pytest.raises(RuntimeError):
        ops.sort_by_expert(torch.tensor([[0, 7]], dtype=torch.int32), 4)
