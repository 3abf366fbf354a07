# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn, its variants, and pruned_ffn: forward and backward, on awkward shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from problems import (
    DTYPES,
    FLOATS,
    HALVES,
    ROUTINGS,
    FfnCase,
    Problem,
    assert_all_equal,
    assert_as_good_as_torch,
    assert_equal,
    assert_gradients,
    both_problems,
    cycle,
    doubles,
    each_thread_count,
    ffn_case,
    grid,
    layouts,
    poison,
    problem_of,
    pruned_problem,
    refusal,
    torch_combine,
    with_kernel,
)
from registry import CPU, CUDA, backend_of, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference


def assert_problem(problem: Problem) -> None:
    """The op and its training variant, outputs poisoned, as exact as torch in its dtype."""
    exact, in_torch = problem.exact(), problem.in_torch(*problem.leaves)
    device, shape = exact.device, (tuple(exact.shape), in_torch.dtype)
    poison(device, shape)
    y = problem.y()
    assert_as_good_as_torch(y, in_torch, exact)
    poison(device, shape)
    trained, *activations = problem.train(*problem.leaves)
    assert_as_good_as_torch(trained, in_torch, exact)
    for rows in activations:
        assert not rows.isnan().any(), "activations have elements that nothing wrote"
    assert_equal("repeat", problem.y(), y)


def assert_case(case: FfnCase) -> None:
    """grouped_ffn, and what combines its rows."""
    problem = problem_of(case)
    assert_problem(problem)
    expected = reference.combine(problem.exact(), case.weights, case.token_rows)
    rows = problem.in_torch(*problem.leaves)
    poison(expected.device, (tuple(expected.shape), rows.dtype))
    out = ops.grouped_ffn_combine(*case.fused_arguments)
    assert_as_good_as_torch(out, torch_combine(rows, case.weights, case.token_rows), expected)
    assert_equal("repeat", ops.grouped_ffn_combine(*case.fused_arguments), out)


# Forward


@check(
    *cycle(
        grid(num_tokens=(0, 1, 37, 300), experts=((5, 2), (17, 8), (33, 33), (1, 1))),
        dtype=DTYPES,
        routing=ROUTINGS,
    ),
    *grid(num_tokens=(38, 150), experts=((5, 2), (5, 1)), dtype=DTYPES, routing=ROUTINGS),
    on=with_kernel,
)
def ffn_of_any_routing(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    experts: tuple[int, int],
    routing: str,
) -> None:
    """Experts without a row; all rows on one, the first, the last; several tiles of rows."""
    size = (136, 80) if num_tokens == 150 else (40, 24)
    num_experts, top_k = experts
    case = ffn_case(num_tokens, size[0], num_experts, size[1], top_k, dtype, routing, device)
    assert_case(case)


@check(
    *grid(dtype=DTYPES, width=(592, 1184), num_tokens=(41,), hidden_size=(64,)),
    *grid(dtype=HALVES, width=(592, 1184), num_tokens=(37, 1000), hidden_size=(3584,)),
    on=with_kernel,
    small=lambda hidden_size, **_: hidden_size < 100,
)
def ffn_of_bagel_widths(
    device: torch.device, dtype: torch.dtype, width: int, num_tokens: int, hidden_size: int
) -> None:
    assert_case(ffn_case(num_tokens, hidden_size, 3, width, 2, dtype, device=device))


@check(*grid(experts=((16, 8), (32, 16)), num_tokens=(256, 4096)), on=(CUDA,))
def ffn_of_bagel_layers(device: torch.device, experts: tuple[int, int], num_tokens: int) -> None:
    num_experts, top_k = experts
    width = 18944 // num_experts
    case = ffn_case(num_tokens, 3584, num_experts, width, top_k, HALVES[0], device=device)
    assert_case(case)


@check(
    *cycle(
        grid(sizes=((8, 8), (16, 8), (24, 40), (72, 56), (136, 16)), num_tokens=(3, 90, 257)),
        dtype=HALVES,
    ),
    *cycle(grid(sizes=((1000, 208),), num_tokens=(3, 257)), dtype=HALVES),
    *cycle(
        grid(
            sizes=((1, 1), (1, 7), (5, 3), (15, 13), (17, 15), (29, 8), (600, 20)),
            num_tokens=(3, 20, 90),
        ),
        dtype=DTYPES,
        on=((CPU,),),
    ),
    on=lambda on=("cpu", "emulated", "cuda"), **_: on,
    small=lambda sizes, num_tokens, **_: sizes[0] * num_tokens < 100_000,
)
def ffn_of_sizes_that_fit_no_tile(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    num_tokens: int,
    on: tuple[str, ...] = (),
) -> None:
    """Multiples of 8, which is what 16-byte accesses need, and of nothing else; on the CPU any."""
    assert_case(ffn_case(num_tokens, sizes[0], 3, sizes[1], 2, dtype, device=device))


@check(*grid(dtype=DTYPES[:2]), on=with_kernel)
def ffn_of_any_number_of_rows(device: torch.device, dtype: torch.dtype) -> None:
    """Around the heights of tiles, all on the last expert."""
    for rows in (1, 7, 8, 9, 15, 17, 31, 33, 47, 49, 63, 64, 65, 127, 129, 191, 193, 255, 257, 385):
        assert_case(ffn_case(rows, 64, 2, 32, 1, dtype, "last", device))


@check(
    *cycle(
        grid(
            blocks=((9, 16), (9, 32), (9, 64), (5, 128)),
            num_tokens=(0, 1, 37, 70, 300),
        ),
        dtype=HALVES,
        kept=("some", "all", "last"),
    ),
    *cycle(grid(blocks=((7, 16), (9, 48), (9, 112)), num_tokens=(0, 3, 8, 31, 300)), dtype=DTYPES),
    *grid(blocks=((18944 // 64, 64),), num_tokens=(1000,), dtype=HALVES, hidden_size=(3584,)),
    on=with_kernel,
    small=lambda num_tokens, **_: num_tokens < 1000,
)
def pruned_ffn_of_any_list(
    device: torch.device,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    num_tokens: int,
    kept: str = "some",
    hidden_size: int = 72,
) -> None:
    count, block_size = blocks
    lists = {
        "some": torch.randperm(count)[: count // 2 + 1].tolist(),
        "all": range(count),
        "last": [count - 1],
    }
    problem = pruned_problem(num_tokens, hidden_size, count, block_size, lists[kept], dtype, device)
    assert_problem(problem)
    if kept == "all":  # then it is the dense FFN
        x, *weights = (tensor.float() for tensor in problem.leaves)
        torch.testing.assert_close(problem.exact(), reference.swiglu(x, *weights))


@check(*grid(num_tokens=(3, 70, 257), hidden_size=(1, 13, 33, 600), dtype=DTYPES[:2]), on=(CPU,))
def pruned_ffn_of_odd_sizes(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int
) -> None:
    """More neurons than one sum takes, in runs short and long, the last slice not full."""
    kept = list(dict.fromkeys([*range(40, 90), *range(0, 40, 2), *range(91, 99), 20, 39]))
    assert_problem(pruned_problem(num_tokens, hidden_size, 99, 16, kept, dtype, device))


@check(*grid(dtype=DTYPES, num_tokens=(4, 100)), on=with_kernel)
def what_is_not_kept_is_not_read(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    problem = pruned_problem(num_tokens, 72, 10, 64, (5, 1, 2, 9), dtype, device)
    expected = problem.y()
    gate, up, down = (tensor.clone() for tensor in problem.leaves[1:])
    for weight in (gate, up, down.t()):
        weight[problem.idle] = torch.nan
    assert_equal("y", problem.y(gate_proj=gate, up_proj=up, down_proj=down), expected)
    none = pruned_problem(num_tokens, 72, 10, 64, (), dtype, device).y()
    assert_equal("y of no blocks", none, torch.zeros_like(none))


@check(*grid(dtype=DTYPES[:2]), on=(CPU,))
def finer_blocks_in_the_same_order_give_the_same_bits(
    device: torch.device, dtype: torch.dtype
) -> None:
    coarse = pruned_problem(100, 40, 10, 32, (7, 1, 2, 9), dtype, device)
    fine = torch.tensor([2 * b + half for b in (7, 1, 2, 9) for half in (0, 1)]).int()
    assert_equal("y", ops.pruned_ffn(coarse.leaves[0], fine, *coarse.leaves[1:], 16), coarse.y())


@check(*grid(sizes=((5, 8, 0), (300, 8, 0), (5, 0, 3), (300, 0, 3))), on=(CPU,))
def sizes_of_zero_are_taken(device: torch.device, sizes: tuple[int, int, int]) -> None:
    num_tokens, hidden_size, width = sizes
    case = ffn_case(num_tokens, hidden_size, 2, width, 1)
    for y in (ops.grouped_ffn(*case.arguments), ops.grouped_ffn_combine(*case.fused_arguments)):
        assert_equal("y", y, torch.zeros(num_tokens, hidden_size))
    assert pruned_problem(num_tokens, 0).y().shape == (num_tokens, 0)
    none = pruned_problem(num_tokens, 24, 0, 16, ()).y()
    assert_equal("y of no width", none, torch.zeros(num_tokens, 24))


@check(*grid(dtype=DTYPES, num_tokens=(5, 150)), on=with_kernel)
def experts_take_any_layout(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    case = ffn_case(num_tokens, 40, 3, 24, 2, dtype, device=device)
    problems = [problem_of(case), pruned_problem(num_tokens, 40, dtype=dtype, device=device)]
    fused = ops.grouped_ffn_combine(*case.fused_arguments)
    # A library of the CPU may choose another kernel for another stride: rounding, no more.
    close = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 3e-2)
    rtol, atol = close if backend_of(device) == CPU else (0.0, 0.0)
    for problem in problems:
        expected = problem.y()
        for name in FLOATS:
            for layout, view in layouts(problem.tensors[name]):
                found = [(problem.y(**{name: view}), expected)]
                if problem.op == "grouped_ffn":
                    other = dataclasses.replace(case, **{name: view})
                    found.append((ops.grouped_ffn_combine(*other.fused_arguments), fused))
                message = f"{problem.op}, {name}: {layout}: {{}}".format
                for own, exact in found:
                    torch.testing.assert_close(own, exact, rtol=rtol, atol=atol, msg=message)


def is_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@check(*cycle(grid(num_tokens=(5, 33, 128, 300, 1030)), dtype=DTYPES), on=with_kernel)
def experts_repeat_bit_for_bit(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """Whatever the number of threads, which libraries do not promise for a few tokens, nor on other
    processors."""
    case = ffn_case(num_tokens, 48, 5, 40, 2, dtype, device=device)
    problems = [problem_of(case)]
    if num_tokens >= 8:
        problems.append(pruned_problem(num_tokens, 48, dtype=dtype, device=device))
    expected = [ops.grouped_ffn_combine(*case.fused_arguments), *(p.y() for p in problems)]
    for _ in each_thread_count() if is_avx512() else range(3):
        found = [ops.grouped_ffn_combine(*case.fused_arguments), *(p.y() for p in problems)]
        assert_all_equal("repeat", found, expected)


@check(*grid(dtype=DTYPES, num_tokens=(40, 300)), on=with_kernel)
def non_finite_tokens_touch_only_their_rows(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    for problem in both_problems(device, dtype, num_tokens):
        clean = problem.y()
        x = problem.tensors["x"].clone()
        x[3], x[7, 5] = torch.nan, torch.inf
        bad = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        bad[[3, 7]] = True
        bad_rows = bad[problem.token_of_row]
        y = problem.y(x=x)
        assert_equal("rows that stay finite", y.isfinite().all(1), ~bad_rows)
        assert_equal("rows", y[~bad_rows], clean[~bad_rows])


@check(*grid(dtype=DTYPES), on=with_kernel)
def tokens_in_another_order_give_the_same_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = ffn_case(150, 64, 4, 72, 2, dtype, device=device)
    order = torch.randperm(150, device=device)
    experts = torch.repeat_interleave(torch.arange(4, device=device), case.expert_offsets.diff())
    idx = experts[case.token_rows.long()].int()[order].contiguous()
    offsets, row_token, token_rows = ops.sort_by_expert(idx, 4)
    maps = (row_token, token_rows, offsets)
    out = ops.grouped_ffn_combine(case.x[order], case.weights[order], *maps, *case.experts)
    expected = ops.grouped_ffn_combine(*case.fused_arguments)[order]
    pruned = pruned_problem(150, 40, dtype=dtype, device=device)
    same = [(out, expected), (pruned.y(x=pruned.tensors["x"][order]), pruned.y()[order])]
    for own, other in same:
        if backend_of(device) == CPU and dtype != torch.float32:
            torch.testing.assert_close(own, other, rtol=2e-2, atol=3e-2)
        else:
            assert_equal("tokens", own, other)


@check(*grid(dtype=DTYPES), on=with_kernel)
def activations_saturate_like_silu(device: torch.device, dtype: torch.dtype) -> None:
    """Large gates pass on or are zero; tokens and weights of zeros give zeros."""
    case = ffn_case(40, 40, 2, 24, 1, dtype, device=device)
    for problem in (problem_of(case), pruned_problem(dtype=dtype, device=device)):
        zeros = torch.zeros_like(problem.tensors["x"])
        assert problem.y(x=zeros).abs().max() == 0
        problem.tensors["gate_proj"].mul_(200)
        exact = problem.in_torch(*doubles(*problem.leaves))
        error = (problem.y().double() - exact).norm() / exact.norm()
        assert error < 16 * torch.finfo(dtype).eps, f"off by {error:.2g}"
        least = torch.full_like(problem.tensors["gate_proj"], torch.finfo(dtype).min)
        ones = torch.ones_like(zeros)
        assert problem.y(x=ones / 64, gate_proj=least).abs().max() == 0
    unused = dataclasses.replace(case, weights=torch.zeros_like(case.weights))
    assert ops.grouped_ffn_combine(*unused.fused_arguments).abs().max() == 0


@check(on=(CUDA,))
def what_no_kernel_takes_is_refused(device: torch.device) -> None:
    """fp32, and widths that are no multiple of 8: an error that names the op."""
    for dtype, width in ((torch.float32, 24), (torch.bfloat16, 12)):
        case = ffn_case(width=width, dtype=dtype, device=device)
        assert "grouped_ffn" in refusal(lambda case=case: ops.grouped_ffn(*case.arguments))
        fused = case.fused_arguments
        assert "grouped_ffn" in refusal(lambda fused=fused: ops.grouped_ffn_combine(*fused))


# Backward


def gradients(
    problem: Problem, grad: Tensor, recompute: bool = False, wanted: Sequence[str] = FLOATS
) -> tuple[Tensor, ...]:
    """Of some of the tensors, which alone ask for one."""
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted)
        for name, tensor in problem.tensors.items()
    }
    y = problem.call(*leaves.values(), recompute=recompute)
    return torch.autograd.grad(y, [leaves[name] for name in wanted], grad)


@check(
    *cycle(
        grid(num_tokens=(0, 1, 37, 150), recompute=(False, True)),
        dtype=DTYPES,
        routing=("random", "last", "gaps", "one"),
    ),
    *grid(num_tokens=(90,), recompute=(False, True), dtype=DTYPES, routing=("random", "gaps")),
    *grid(num_tokens=(90,), recompute=(False,), dtype=DTYPES, routing=("random",), width=(592,)),
    on=with_kernel,
)
def gradients_of_experts(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    recompute: bool,
    routing: str,
    width: int = 56,
) -> None:
    """Against fp64; neurons that no row uses get zeros; repeats give the same bits."""
    case = ffn_case(num_tokens, 72, 5, width, 2, dtype, routing, device)
    kept = (5, 1, 2, 6)
    for problem in (problem_of(case), pruned_problem(num_tokens, 72, 7, 64, kept, dtype, device)):
        grad = torch.randn(problem.exact().shape, device=device).to(dtype)
        own = gradients(problem, grad, recompute)
        wide = doubles(*problem.leaves)
        exact = torch.autograd.grad(problem.in_torch(*wide), wide, grad.double())
        assert_gradients(own, exact, dtype)
        for weight in (own[1], own[2], own[3].t()):
            assert not weight[problem.idle].any(), "a neuron without a row has a gradient"
        assert_all_equal("recomputed", gradients(problem, grad, not recompute), own)
        strided = gradients(problem, grad.t().contiguous().t(), recompute)
        assert_all_equal("gradient of another layout", strided, own)


@check(*grid(dtype=DTYPES), on=with_kernel)
def each_argument_gets_its_gradient_alone(device: torch.device, dtype: torch.dtype) -> None:
    """Frozen weights pass the same gradient on, and skip the products of their own."""
    for problem in both_problems(device, dtype, 37):
        y, *activations = problem.train(*problem.leaves)
        grad = torch.randn(y.shape, device=device).to(dtype)
        everything = gradients(problem, grad)
        for recompute in (False, True):
            for position, name in enumerate(FLOATS):
                alone = gradients(problem, grad, recompute, (name,))
                assert_equal(f"gradient of {name} alone", alone[0], everything[position])
        sizes = [tensor.numel() for tensor in problem.leaves]
        for needs in ((True, False), (False, True)):
            found = problem.backward(grad, *problem.leaves, *activations, *needs)
            wanted = [sizes[0] * needs[0], *(size * needs[1] for size in sizes[1:])]
            written = [tensor.numel() for tensor in found]
            assert written[1:] == wanted[1:]
            assert (written[0] > 0) == needs[0]


@check(*cycle(grid(num_tokens=(37, 300)), dtype=HALVES), {"num_tokens": 300, "dtype": DTYPES[0]},
       on=with_kernel)  # fmt: skip
def gradients_repeat_bit_for_bit(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    for problem in both_problems(device, dtype, num_tokens):
        grad = torch.randn(problem.y().shape, device=device).to(dtype)
        expected = gradients(problem, grad)
        for _ in each_thread_count() if is_avx512() else range(3):
            assert_all_equal("gradient", gradients(problem, grad), expected)


@check(on=(CPU,))
def gradients_are_slopes(device: torch.device) -> None:
    """gradcheck in fp32. Central differences with step s err by u |f| / s for rounding, a few u =
    6e-8, and by s^2 |f'''| / 6: near 2e-5 each at s = 1e-2 and sizes of 1; sizes reach 10: 1e-3."""
    problems = [problem_of(ffn_case(4, 3, 3, 2, 2, routing=kind)) for kind in ("random", "first")]
    for problem in (*problems, pruned_problem(3, 2, 3, 16, (2, 0))):
        for recompute in (False, True):

            def function(
                *leaves: Tensor, problem: Problem = problem, recompute: bool = recompute
            ) -> Tensor:
                return problem.call(*leaves, recompute=recompute)

            leaves = tuple(tensor.detach().requires_grad_() for tensor in problem.leaves)
            assert torch.autograd.gradcheck(
                function, leaves, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0.0
            )


@check(on=(CPU,))
def gradients_of_routing_are_slopes(device: torch.device) -> None:
    """gradcheck of route_topk, whose logits lie too far apart for a step to change the choice, and
    of permute and combine."""
    while True:
        x, gate = torch.randn(3, 5), torch.randn(4, 5)
        if (x @ gate.t()).sort(1).values.diff(dim=1).min() > 0.2:
            break
    case = ffn_case(4, 3, 3, 2, 2)
    maps, rows = (case.row_token, case.token_rows), torch.randn(8, 3)
    checked = [
        (lambda y, w: ops.combine(y, w, maps[1]), (rows, case.weights)),
        (lambda y: ops.combine(y, None, maps[1]), (rows,)),
        (lambda x: ops.permute(x, *maps), (case.x,)),
        *((lambda x, g, k=k: ops.route_topk(x, g, k)[:2], (x, gate)) for k in (1, 2, 4)),
    ]
    for function, tensors in checked:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        assert torch.autograd.gradcheck(
            function, leaves, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=0.0
        )


@check(*grid(dtype=HALVES), on=(CUDA, "emulated"))
def a_step_down_the_gradient_goes_down(device: torch.device, dtype: torch.dtype) -> None:
    """The loss falls by about what the gradient says."""
    problem = problem_of(ffn_case(64, 64, 4, 32, 2, dtype, device=device))
    target = torch.randn(128, 64, device=device)
    leaves = [tensor.requires_grad_() for tensor in problem.leaves]

    def loss(*tensors: Tensor) -> Tensor:
        return (problem.call(*tensors).float() - target).square().mean()

    start = loss(*leaves)
    grads = torch.autograd.grad(start, leaves)
    square = float(sum(g.double().square().sum() for g in grads))
    step = 0.05 * start.item() / square
    with torch.no_grad():
        moved = [
            (t.float() - step * g.float()).to(dtype) for t, g in zip(leaves, grads, strict=True)
        ]
        fell = float(start - loss(*moved))
    predicted = step * square
    assert 0.5 * predicted < fell < 1.5 * predicted, f"fell by {fell:.3g}, not {predicted:.3g}"


@check()
def tokens_with_unequal_numbers_of_rows_get_their_gradients(device: torch.device) -> None:
    """Token 0 has three rows and token 1 one: no [T, K] map exists, and none is needed."""
    dtype = torch.float32 if backend_of(device) == CPU else torch.bfloat16
    case = ffn_case(2, 16, 2, 8, 2, dtype, device=device)
    row_token = torch.tensor([0, 0, 0, 1], dtype=torch.int32, device=device)
    leaves = [case.x, *case.experts]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(4, 16, device=device).to(dtype)
    y = ops.grouped_ffn(case.x, row_token, case.expert_offsets, *case.experts)
    wide = doubles(*leaves)
    exact = reference.grouped_ffn(wide[0], row_token, case.expert_offsets, *wide[1:])
    own = torch.autograd.grad(y, leaves, grad)
    assert_gradients(own, torch.autograd.grad(exact, wide, grad.double()), dtype)
