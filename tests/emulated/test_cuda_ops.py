# SPDX-License-Identifier: Apache-2.0
"""The CUDA side of every op, from the public function to the emulated kernel and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ROUTINGS,
    assert_as_good_as_torch,
    draw_routing,
    ffn_case,
    layouts,
    torch_combine,
    torch_grouped_ffn,
)
from torch import Tensor

from sparse_unified import ops
from sparse_unified.bench.tune import VARIABLE, find_variants
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import backend, reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.is_floating_point() else t for t in tensors)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (37, 5, 2), (9, 33, 33)]
)
def test_route_topk(dtype: torch.dtype, num_tokens: int, num_experts: int, top_k: int) -> None:
    x = torch.randn(num_tokens, 40).to(dtype)
    gate = torch.randn(num_experts, 40).to(dtype)
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, top_k)
    ref_logits, _, ref_idx = reference.route_topk(x, gate, top_k)
    torch.testing.assert_close(logits, ref_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(topk_logits, logits.gather(1, topk_idx.long()))
    again = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(topk_idx.long(), again)
    assert (topk_idx == ref_idx).float().mean() > 0.95 or num_tokens == 0


def test_route_topk_orders_ties_and_nan_as_the_reference() -> None:
    gate = torch.eye(6)
    x = torch.tensor(
        [
            [0.0, -0.0, 0.0, 1.0, 1.0, -1.0],
            [torch.nan, 2.0, torch.nan, 3.0, -torch.inf, torch.inf],
            [-torch.inf] * 6,
        ]
    )
    _, _, topk_idx = ops.route_topk(x[:1], gate, 6)
    assert topk_idx.tolist() == [[3, 4, 0, 1, 2, 5]]
    for row in (1, 2):  # products with the zeros of the gate make everything NaN
        _, _, topk_idx = ops.route_topk(x[row : row + 1], gate, 4)
        assert topk_idx.tolist() == [[0, 1, 2, 3]]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (300, 3)])
def test_sort_by_expert(routing: str, num_tokens: int, top_k: int) -> None:
    topk_idx = draw_routing(routing, num_tokens, 7, top_k)
    for ours, expected in zip(
        ops.sort_by_expert(topk_idx, 7), reference.sort_by_expert(topk_idx, 7), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_and_combine_of_any_layout(dtype: torch.dtype) -> None:
    case = ffn_case(37, 40, 5, 24, 2, dtype)
    rows = reference.permute(case.x, case.row_token)
    for name, x in layouts(case.x):
        assert torch.equal(ops.permute(x, case.row_token, case.token_rows), rows), name
    for name, y in layouts(rows):
        assert_as_good_as_torch(
            ops.combine(y, case.weights, case.token_rows),
            torch_combine(rows, case.weights, case.token_rows),
            reference.combine(rows.float(), case.weights, case.token_rows),
        )
        assert name


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("device", [80, 90])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_ffn(dtype: torch.dtype, routing: str, device: int) -> None:
    torch.ops.sparse_unified_emulation.set_device(device)
    case = ffn_case(150, 136, 3, 80, 2, dtype, routing)
    expected = reference.grouped_ffn(*wide(case.arguments))
    in_torch = torch_grouped_ffn(*case.arguments)
    y = ops.grouped_ffn(*case.arguments)
    assert_as_good_as_torch(y, in_torch, expected)
    assert torch.equal(y, ops.grouped_ffn(*case.arguments))
    assert_as_good_as_torch(
        ops.grouped_ffn_combine(*case.fused_arguments),
        torch_combine(in_torch, case.weights, case.token_rows),
        reference.combine(expected, case.weights, case.token_rows),
    )


def test_grouped_ffn_of_any_layout() -> None:
    case = ffn_case(37, 40, 5, 24, 2, torch.bfloat16)
    expected = ops.grouped_ffn(*case.arguments)
    for index in (0, 3, 4, 5):
        for name, other in layouts(case.arguments[index]):
            arguments = list(case.arguments)
            arguments[index] = other
            assert torch.equal(ops.grouped_ffn(*arguments), expected), name


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("device", [80, 90])
def test_grouped_ffn_of_few_tokens(num_tokens: int, device: int) -> None:
    torch.ops.sparse_unified_emulation.set_device(device)
    case = ffn_case(num_tokens, 40, 5, 32, 2, torch.bfloat16)
    y = ops.grouped_ffn(*case.arguments)
    assert_as_good_as_torch(
        y, torch_grouped_ffn(*case.arguments), reference.grouped_ffn(*wide(case.arguments))
    )


def gradients(
    block: SparseMoE, x: Tensor, grad: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    y, logits = block(x)
    (y.float() * grad).sum().add((logits * 0.1).square().sum()).backward()
    found = {name: dict(block.named_parameters())[name].grad for name in names}
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("device", [80, 90])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_shared_experts", [0, 1])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_block_and_its_gradients(
    dtype: torch.dtype, num_shared_experts: int, is_frozen: bool, device: int
) -> None:
    """Against the block composed of torch ops, in fp32 and in the dtype of the block."""
    torch.ops.sparse_unified_emulation.set_device(device)
    experts = ("gate_proj", "up_proj", "down_proj")
    block = SparseMoE(136, 4 * 48, 3 if num_shared_experts else 4, 2, num_shared_experts)
    torch.nn.init.normal_(block.gate.weight, std=0.1)
    block = block.to(dtype)
    for name in experts:
        getattr(block, name).data.mul_(3)
        getattr(block, name).requires_grad_(not is_frozen)
    x, grad = torch.randn(150, 136).to(dtype), torch.randn(150, 136)
    names = ("gate.weight", *(() if is_frozen else experts))

    ours = gradients(block, x, grad, names)
    again = gradients(block, x, grad, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", lambda *_, **__: "torch: asked for by the test")
        in_torch = gradients(block, x, grad, names)
        exact = gradients(copy.deepcopy(block).float(), x.float(), grad, names)
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        assert_as_good_as_torch(value, in_torch[name], exact[name])


def test_an_expert_without_rows_has_no_gradient() -> None:
    case = ffn_case(40, 40, 5, 32, 1, torch.bfloat16, "one")
    weights = [weight.requires_grad_() for weight in case.experts]
    arguments = (case.x, case.row_token, case.expert_offsets, *weights, case.token_rows)
    ops.grouped_ffn(*arguments).sum().backward()
    for weight, rows in zip(weights, (0, 0, 1), strict=True):
        of_expert = weight.grad.unflatten(rows, (5, 32)).movedim(rows, 0)
        for expert in range(5):
            assert bool(of_expert[expert].any()) == (expert == 2)


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


NUM_BLOCKS = 9


def pruned_case(dtype: torch.dtype, num_kept: int, block_size: int) -> tuple[Tensor, ...]:
    """x, kept_blocks and weights of a FFN of 9 blocks."""
    width, hidden_size = NUM_BLOCKS * block_size, 72
    scale = hidden_size**-0.5
    return (
        torch.randn(70, hidden_size).to(dtype),
        torch.randperm(NUM_BLOCKS)[:num_kept].int(),
        (torch.randn(width, hidden_size) * scale).to(dtype),
        (torch.randn(width, hidden_size) * scale).to(dtype),
        (torch.randn(hidden_size, width) * 0.5 * width**-0.5).to(dtype),
    )


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize(("device", "block_size"), [(80, 32), (90, 64)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_kept", [0, 3, 9])
def test_pruned_ffn_and_its_gradients(
    dtype: torch.dtype, num_kept: int, device: int, block_size: int
) -> None:
    torch.ops.sparse_unified_emulation.set_device(device)
    x, kept, *weights = pruned_case(dtype, num_kept, block_size)
    grad = torch.randn(x.shape)

    def run(*tensors: Tensor, function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = function(leaves[0], kept, *leaves[1:], block_size)
        (y.float() * grad).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def in_torch(x: Tensor, kept: Tensor, *weights: Tensor) -> Tensor:
        *experts, block_size = weights
        gate, up = (weight.unflatten(0, (-1, block_size))[kept.long()] for weight in experts[:2])
        down = experts[2].unflatten(1, (-1, block_size))[:, kept.long()]
        hidden = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
        return F.linear(hidden, down.flatten(1))

    ours = run(x, *weights, function=ops.pruned_ffn)
    torchs = run(x, *weights, function=in_torch)
    exact = run(x.float(), *(w.float() for w in weights), function=in_torch)
    for found, own, wide_result in zip(ours, torchs, exact, strict=True):
        if num_kept == 0:
            assert not found.any()
        else:
            assert_as_good_as_torch(found, own, wide_result)


@pytest.mark.parametrize(("block_size", "is_hopper"), [(32, False), (64, True), (128, True)])
def test_blocks_of_64_run_forward_on_the_kernels_for_hopper(
    block_size: int, is_hopper: bool
) -> None:
    emulation = torch.ops.sparse_unified_emulation
    emulation.set_device(90)
    x, kept, *weights = pruned_case(torch.bfloat16, 4, block_size)
    x.requires_grad_()
    emulation.record_launches(True)
    try:
        ops.pruned_ffn(x, kept, *weights, block_size).sum().backward()
        launches = emulation.recorded_launches()
    finally:
        emulation.record_launches(False)
    assert ("up_sm90a" in launches) == is_hopper
    assert ("grouped_ffn_up_kernel" in launches) != is_hopper
    assert "grad_hidden_sm90a" not in launches


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_that_share_the_weights_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulation = torch.ops.sparse_unified_emulation
    emulation.set_device(90)
    experts = ffn_case(200, 72, 3, 80, 2, dtype).arguments
    pruned = (*pruned_case(dtype, 3, 64), 64)

    def run(variant: str) -> tuple[Tensor, Tensor]:
        monkeypatch.setenv(VARIABLE, variant)
        return ops.grouped_ffn(*experts), ops.pruned_ffn(*pruned)

    for shared, alone in zip(run("family=sm90a,multicast=on"), run("family=sm90a"), strict=True):
        assert torch.equal(shared, alone)
    emulation.record_launches(True)
    try:
        run("family=sm90a,multicast=on")
        launches = emulation.recorded_launches().splitlines()
    finally:
        emulation.record_launches(False)
    assert len(launches) == 4
    assert all(", 2>(" in launch for launch in launches), launches


# Whatever bench/gpu_check.py times side by side is right first.
def test_every_variant_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ops.sparse_unified_emulation.set_device(90)
    case = ffn_case(150, 136, 3, 80, 2, torch.bfloat16)
    expected = reference.grouped_ffn(*wide(case.arguments))
    in_torch = torch_grouped_ffn(*case.arguments)
    variants = find_variants(lambda: ops.grouped_ffn(*case.arguments), "fwd")
    assert sum(variant.startswith("family=sm90a") for variant in variants) == 10
    for variant in variants:
        monkeypatch.setenv(VARIABLE, variant)
        assert_as_good_as_torch(ops.grouped_ffn(*case.arguments), in_torch, expected)
