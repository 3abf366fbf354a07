# SPDX-License-Identifier: Apache-2.0
"""pruned_ffn against the reference: every list of blocks, layout and gradient."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_as_good_as_torch, each_thread_count, layouts
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

INT = torch.int32
FLOATS = ("x", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedCase:
    """Arguments of pruned_ffn with outputs of about unit size."""

    x: Tensor  # [T, D]
    kept_blocks: Tensor  # [B]
    gate_proj: Tensor  # [I, D]
    up_proj: Tensor  # [I, D]
    down_proj: Tensor  # [D, I]
    block_size: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        return (
            self.x,
            self.kept_blocks,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.block_size,
        )

    @property
    def kept(self) -> Tensor:
        """Kept neurons, [J] int64."""
        first = self.kept_blocks.long()[:, None] * self.block_size
        return (first + torch.arange(self.block_size)).reshape(-1)


def pruned_case(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_blocks: int = 7,
    block_size: int = 16,
    kept_blocks: Sequence[int] = (5, 1, 2, 6),
    dtype: torch.dtype = torch.float32,
) -> PrunedCase:
    width = num_blocks * block_size
    kept_width = max(len(kept_blocks) * block_size, 1)
    return PrunedCase(
        x=torch.randn(num_tokens, hidden_size).to(dtype),
        kept_blocks=torch.tensor(list(kept_blocks), dtype=INT),
        gate_proj=(torch.randn(width, hidden_size) * max(hidden_size, 1) ** -0.5).to(dtype),
        up_proj=(torch.randn(width, hidden_size) * max(hidden_size, 1) ** -0.5).to(dtype),
        down_proj=(torch.randn(hidden_size, width) * kept_width**-0.5).to(dtype),
        block_size=block_size,
    )


def half_of(num_blocks: int) -> list[int]:
    return torch.randperm(num_blocks)[: num_blocks // 2].tolist()


def torch_pruned_ffn(case: PrunedCase) -> Tensor:
    """What torch computes in the dtype of x on a copy of the kept weights."""
    gate, up, down = (
        case.gate_proj[case.kept],
        case.up_proj[case.kept],
        case.down_proj[:, case.kept],
    )
    return F.linear(F.silu(F.linear(case.x, gate)) * F.linear(case.x, up), down)


def assert_case(case: PrunedCase) -> None:
    """The op and its training variant, against fp32 and torch in the same dtype."""
    wide = dataclasses.replace(case, **{name: getattr(case, name).float() for name in FLOATS})
    ref32, torch_out = reference.pruned_ffn(*wide.arguments), torch_pruned_ffn(case)
    assert_as_good_as_torch(ops.pruned_ffn(*case.arguments), torch_out, ref32)
    y, gate_rows, up_rows = torch.ops.sparse_unified.pruned_ffn_train(*case.arguments)
    assert_as_good_as_torch(y, torch_out, ref32)
    for rows, weight in ((gate_rows, "gate_proj"), (up_rows, "up_proj")):
        assert_as_good_as_torch(
            rows,
            F.linear(case.x, getattr(case, weight)[case.kept]),
            F.linear(wide.x, getattr(wide, weight)[case.kept]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 31, 37, 300])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 112, 128])
def test_ffn_is_as_exact_as_torch(dtype: torch.dtype, num_tokens: int, block_size: int) -> None:
    assert_case(pruned_case(num_tokens, 40, 9, block_size, [8, 1, 2, 3, 0], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn_of_many_tokens(dtype: torch.dtype) -> None:
    assert_case(pruned_case(4096, 16, 6, 16, [4, 0, 1], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [5, 50])
@pytest.mark.parametrize("width", [592, 1184])
def test_ffn_of_bagel_expert_widths(dtype: torch.dtype, num_tokens: int, width: int) -> None:
    for block_size in (16, 592 // 37):
        blocks = half_of(width // block_size)
        assert_case(pruned_case(num_tokens, 48, width // block_size, block_size, blocks, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_ffn_of_several_slices(dtype: torch.dtype, num_tokens: int) -> None:
    # More neurons than one sum takes, in runs short and long, the last slice not full.
    blocks = [*range(40, 90), *range(0, 40, 2), *range(91, 99), 20, 39]
    kept = list(dict.fromkeys(blocks))
    assert_case(pruned_case(num_tokens, 33, 99, 16, kept, dtype))


@pytest.mark.parametrize("hidden_size", [1, 5, 13, 14, 15, 16, 17, 29, 600])
@pytest.mark.parametrize("num_tokens", [1, 9, 16, 17, 33, 90])
def test_ffn_of_odd_sizes(hidden_size: int, num_tokens: int) -> None:
    assert_case(pruned_case(num_tokens, hidden_size))


@pytest.mark.parametrize("num_tokens", [8, 255, 256, 257, 289, 511, 513, 1030])
def test_ffn_of_any_number_of_tokens(num_tokens: int) -> None:
    assert_case(pruned_case(num_tokens, 30, 3, 16, [2, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_all_blocks_are_the_dense_ffn(dtype: torch.dtype, num_tokens: int) -> None:
    case = pruned_case(num_tokens, 40, 7, 16, range(7), dtype)
    wide = [getattr(case, name).float() for name in FLOATS]
    dense = reference.swiglu(*wide)
    assert_as_good_as_torch(ops.pruned_ffn(*case.arguments), torch_pruned_ffn(case), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_one_kept_block_is_a_ffn_of_its_rows(dtype: torch.dtype, num_tokens: int) -> None:
    for block in (0, 3, 6):
        assert_case(pruned_case(num_tokens, 24, 7, 16, [block], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 3, 40])
def test_no_kept_block_gives_zeros(dtype: torch.dtype, num_tokens: int) -> None:
    case = pruned_case(num_tokens, 24, 7, 16, [], dtype)
    y = ops.pruned_ffn(*case.arguments)
    assert torch.equal(y, torch.zeros_like(case.x))


def test_empty_sizes() -> None:
    case = pruned_case(20, 0)
    assert ops.pruned_ffn(*case.arguments).shape == (20, 0)
    case = pruned_case(20, 24, 0, 16, [])
    assert torch.equal(ops.pruned_ffn(*case.arguments), torch.zeros(20, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_what_is_not_kept_is_not_read(dtype: torch.dtype, num_tokens: int) -> None:
    case = pruned_case(num_tokens, 24, 40, 16, [5, 1, 2, 30, 39], dtype)
    expected = ops.pruned_ffn(*case.arguments)
    lost = torch.ones(40 * 16, dtype=torch.bool)
    lost[case.kept] = False
    case.gate_proj[lost] = torch.nan
    case.up_proj[lost] = torch.nan
    case.down_proj[:, lost] = torch.nan
    assert torch.equal(ops.pruned_ffn(*case.arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_weights_stay_as_they_are(dtype: torch.dtype, num_tokens: int) -> None:
    case = pruned_case(num_tokens, dtype=dtype)
    before = [getattr(case, name).clone() for name in FLOATS]
    ops.pruned_ffn(*case.arguments)
    for name, value in zip(FLOATS, before, strict=True):
        assert torch.equal(getattr(case, name), value)


def test_block_size_alone_does_not_change_the_bits() -> None:
    # The same neurons in the same order, in blocks of 16 and of 32: one order of sums.
    case = pruned_case(100, 40, 10, 32, [7, 1, 2, 9])
    fine = [2 * block + half for block in (7, 1, 2, 9) for half in (0, 1)]
    other = dataclasses.replace(case, kept_blocks=torch.tensor(fine, dtype=INT), block_size=16)
    assert torch.equal(ops.pruned_ffn(*case.arguments), ops.pruned_ffn(*other.arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_the_list_only_changes_rounding(dtype: torch.dtype) -> None:
    case = pruned_case(100, 40, 70, 16, half_of(70), dtype)
    assert_case(case)
    assert_case(dataclasses.replace(case, kept_blocks=case.kept_blocks.sort().values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    case = pruned_case(300, 48, 40, 16, half_of(40), dtype)
    expected = ops.pruned_ffn(*case.arguments)
    for _ in range(3):
        assert torch.equal(ops.pruned_ffn(*case.arguments), expected)


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="torch's GEMMs may choose another way with another number of threads",
)
@pytest.mark.parametrize("num_tokens", [8, 33, 300, 2100])
def test_thread_counts_and_neighbours_give_the_same_bits(num_tokens: int) -> None:
    case = pruned_case(num_tokens, 16, 40, 16, half_of(40))
    expected = ops.pruned_ffn(*case.arguments)
    for _ in each_thread_count():
        assert torch.equal(ops.pruned_ffn(*case.arguments), expected)
    order = torch.randperm(num_tokens)
    other = dataclasses.replace(case, x=case.x[order])
    assert torch.equal(ops.pruned_ffn(*other.arguments), expected[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("argument", FLOATS)
@pytest.mark.parametrize("num_tokens", [5, 300])
def test_layout_of_the_arguments_does_not_matter(
    dtype: torch.dtype, argument: str, num_tokens: int
) -> None:
    case = pruned_case(num_tokens, 35, 9, 16, [8, 1, 2, 4], dtype)
    expected = ops.pruned_ffn(*case.arguments)
    # A GEMM library may choose another kernel for another stride: rounding, no more.
    rounding = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    )
    for name, view in layouts(getattr(case, argument)):
        other = dataclasses.replace(case, **{argument: view})
        message = f"{argument}: {name}: {{}}".format
        torch.testing.assert_close(
            ops.pruned_ffn(*other.arguments), expected, **rounding, msg=message
        )
    strided = torch.stack([case.kept_blocks, case.kept_blocks], dim=1)[:, 0]
    other = dataclasses.replace(case, kept_blocks=strided)
    assert torch.equal(ops.pruned_ffn(*other.arguments), expected)


@pytest.mark.parametrize("num_tokens", [6, 60])
def test_non_finite_tokens_touch_only_themselves(num_tokens: int) -> None:
    case = pruned_case(num_tokens)
    clean = ops.pruned_ffn(*case.arguments)
    case.x[3] = torch.nan
    case.x[5, 2] = torch.inf
    bad = torch.zeros(num_tokens, dtype=torch.bool)
    bad[[3, 5]] = True
    y = ops.pruned_ffn(*case.arguments)
    assert torch.equal(y.isfinite().all(1), ~bad)
    assert torch.equal(y[~bad], clean[~bad])


# Gradients


def trained(case: PrunedCase, names: Sequence[str] = FLOATS) -> PrunedCase:
    for name in names:
        getattr(case, name).requires_grad_()
    return case


def leaves(case: PrunedCase) -> list[Tensor]:
    return [getattr(case, name) for name in FLOATS]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute: bool) -> None:
    case = trained(pruned_case(3, 2, 3, 16, [2, 0]))

    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.pruned_ffn(x, case.kept_blocks, gate, up, down, 16, recompute=recompute)

    # Steps and tolerances of fp32 differences: see test_ops_gradients.py.
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            function, leaves(case), eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0.0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 37, 90])
def test_gradients_equal_fp64_autograd(
    dtype: torch.dtype, recompute: bool, num_tokens: int
) -> None:
    case = trained(pruned_case(num_tokens, 35, 50, 16, half_of(50), dtype))
    grad = torch.randn(num_tokens, 35).to(dtype)
    own = torch.autograd.grad(
        ops.pruned_ffn(*case.arguments, recompute=recompute), leaves(case), grad
    )
    wide = dataclasses.replace(
        case, **{name: getattr(case, name).detach().double() for name in FLOATS}
    )
    y64 = reference.pruned_ffn(*trained(wide).arguments)
    for mine, exact in zip(own, torch.autograd.grad(y64, leaves(wide), grad.double()), strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - exact).norm()
        assert error <= 16 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_blocks_that_are_not_kept_get_gradients_of_zero(num_tokens: int) -> None:
    case = trained(pruned_case(num_tokens, 24, 9, 32, [7, 2]))
    ops.pruned_ffn(*case.arguments).sum().backward()
    lost = torch.ones(9 * 32, dtype=torch.bool)
    lost[case.kept] = False
    for weight in (case.gate_proj.grad, case.up_proj.grad, case.down_proj.grad.t()):
        assert torch.count_nonzero(weight[lost]) == 0
        assert bool(torch.count_nonzero(weight[~lost])) == (num_tokens > 0)


def test_no_kept_block_gives_gradients_of_zero() -> None:
    case = trained(pruned_case(20, 24, 9, 16, []))
    ops.pruned_ffn(*case.arguments).sum().backward()
    for tensor in leaves(case):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_weights_get_no_gradient_and_pass_one_on(recompute: bool) -> None:
    everything = trained(pruned_case())
    expected = torch.autograd.grad(ops.pruned_ffn(*everything.arguments).sum(), everything.x)
    for weight in leaves(everything)[1:]:
        weight.requires_grad_(False)
    ops.pruned_ffn(*everything.arguments, recompute=recompute).sum().backward()
    assert torch.equal(everything.x.grad, expected[0])
    assert all(weight.grad is None for weight in leaves(everything)[1:])


def test_frozen_weights_skip_the_weight_gradients() -> None:
    case = pruned_case()
    _, *activations = torch.ops.sparse_unified.pruned_ffn_train(*case.arguments)
    *tensors, block_size = case.arguments

    def sizes(needs_x: bool, needs_weights: bool) -> list[int]:
        outputs = torch.ops.sparse_unified.pruned_ffn_backward(
            torch.ones(37, 40), *tensors, *activations, block_size, needs_x, needs_weights
        )
        return [output.numel() for output in outputs]

    assert sizes(True, False) == [37 * 40, 0, 0, 0]
    assert sizes(False, True) == [0, 112 * 40, 112 * 40, 40 * 112]


def test_one_trained_projection_gets_its_gradient_alone() -> None:
    for name in FLOATS:
        case = trained(pruned_case(), [name])
        ops.pruned_ffn(*case.arguments).sum().backward()
        for other in FLOATS:
            assert (getattr(case, other).grad is not None) == (other == name)


def test_a_second_derivative_is_refused_and_not_zero() -> None:
    case = trained(pruned_case(), ["x"])
    y = ops.pruned_ffn(*case.arguments)
    (first,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="pruned_ffn_backward: arguments must not need"):
        torch.autograd.grad(first.sum(), case.x)


# torch.compile and bad input


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_and_backward_compile_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    case = trained(pruned_case())

    def function(x: Tensor, blocks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.pruned_ffn(2 * x, blocks, gate, up, down, 16) + 1

    tensors = case.arguments[:-1]
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    expected = torch.autograd.grad(function(*tensors).sum(), leaves(case))
    own = torch.autograd.grad(compiled(*tensors).sum(), leaves(case))
    for mine, other in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, other)
    fewer = torch.tensor([3, 0], dtype=INT)
    torch.testing.assert_close(
        compiled(tensors[0], fewer, *tensors[2:]), function(tensors[0], fewer, *tensors[2:])
    )


def test_bad_arguments_are_named() -> None:
    case = pruned_case(6, 8, 6, 32, [4, 1])  # I = 192
    x, kept, gate, up, down, _ = case.arguments
    for change, pattern in (
        ({"x": x[0]}, "x must have 2 dimensions"),
        ({"x": x.double()}, "x must be float32, bfloat16 or float16, got float64"),
        ({"kept_blocks": kept.long()}, "kept_blocks must have dtype int32, got int64"),
        ({"kept_blocks": kept[None]}, "kept_blocks must have 1 dimension"),
        ({"kept_blocks": kept + 2}, "kept_blocks must hold indices from 0 to 5, got 6"),
        ({"kept_blocks": kept - 2}, "kept_blocks must hold indices .*, got -1 at position 1"),
        (
            {"kept_blocks": torch.tensor([4, 1, 4], dtype=INT)},
            "kept_blocks must name no block twice, got 4 again at position 2",
        ),
        ({"gate_proj": gate[:, :7]}, "gate_proj must have the hidden size"),
        ({"gate_proj": gate.half()}, "gate_proj must have dtype float32, got float16"),
        (
            {"gate_proj": gate[:190]},
            r"gate_proj must have a width that is a multiple of 16, got shape \[190, 8\]",
        ),
        ({"up_proj": up[:176]}, "up_proj must have the width of gate_proj"),
        ({"up_proj": up.bfloat16()}, "up_proj must have dtype float32, got bfloat16"),
        ({"down_proj": down[:, :176]}, "down_proj must have the width of gate_proj"),
        ({"down_proj": down[:7]}, "down_proj must have the hidden size"),
        *(
            (
                {"block_size": bad},
                "block_size must be a multiple of 16 up to 128 that divides the width 192 "
                rf"\(16, 32, 48, 64, 96\), got {bad}",
            )
            for bad in (0, -16, 8, 17, 80, 128, 192)
        ),
    ):
        other = dataclasses.replace(case, **change)
        with pytest.raises(RuntimeError, match=f"pruned_ffn: {pattern}") as caught:
            ops.pruned_ffn(*other.arguments)
        assert re.search(r"^\w+: \w+ must .+, got .+", str(caught.value))


def test_bad_arguments_of_backward_are_named() -> None:
    case = pruned_case(6, 8)
    _, *activations = torch.ops.sparse_unified.pruned_ffn_train(*case.arguments)
    *tensors, block_size = case.arguments
    backward = torch.ops.sparse_unified.pruned_ffn_backward
    grad = torch.randn(6, 8)
    for bad, pattern in (
        ((grad[:5], *activations), "grad_y must have the number of rows"),
        ((grad.half(), *activations), "grad_y must have dtype float32"),
        (
            (grad, activations[0][:, 1:], activations[1]),
            "gate_rows must have the width of the activations",
        ),
        ((grad, activations[0], activations[1][:5]), "up_rows must have the number of rows"),
    ):
        with pytest.raises(RuntimeError, match=f"pruned_ffn_backward: {pattern}"):
            backward(bad[0], *tensors, *bad[1:], block_size, True, True)


def test_arguments_on_two_devices_are_refused() -> None:
    case = pruned_case(6, 8)
    other = dataclasses.replace(case, x=case.x.to("meta"))
    with pytest.raises(RuntimeError, match="pruned_ffn: arguments must be on one device"):
        ops.pruned_ffn(*other.arguments)
