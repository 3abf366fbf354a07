# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn, its variants, and pruned_ffn: forward and backward, on awkward and huge shapes."""

from __future__ import annotations

import mmap
from functools import partial

import torch
from awkward import both_problems, each_thread_count, layouts, refusal
from torch import Tensor

from sparse_unified import ops
from sparse_unified.checks import CPU, CUDA, EVERYWHERE, Skip, backend_of, check
from sparse_unified.checks.kernels import assert_grouped
from sparse_unified.checks.problems import (
    ARGUMENTS,
    DTYPES,
    FLOATS,
    HALVES,
    Problem,
    assert_all_equal,
    assert_equal,
    call,
    cycle,
    doubles,
    draw_routing,
    grid,
    grouped_problem,
    grouped_values,
    of_experts,
    pruned_problem,
    with_kernel,
)
from sparse_unified.ops import reference

# Forward


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
    assert_grouped(grouped_problem(num_tokens, sizes[0], 3, sizes[1], 2, dtype, device=device))


@check(*grid(dtype=DTYPES[:2]), on=with_kernel)
def ffn_of_any_number_of_rows(device: torch.device, dtype: torch.dtype) -> None:
    """Around the heights of tiles, all on the last expert."""
    for rows in (1, 7, 8, 9, 15, 17, 31, 33, 47, 49, 63, 64, 65, 127, 129, 191, 193, 255, 257, 385):
        assert_grouped(grouped_problem(rows, 64, 2, 32, 1, dtype, "last", device))


@check(*grid(dtype=DTYPES, num_tokens=(4, 100)), on=with_kernel)
def what_is_not_kept_is_not_read(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    problem = pruned_problem(num_tokens, 72, 10, 64, (5, 1, 2, 9), dtype, device)
    expected = problem.call()
    gate, up, down = (tensor.clone() for tensor in problem.leaves[1:])
    for weight in (gate, up, down.t()):
        weight[problem.idle()] = torch.nan
    assert_equal("y", problem.call(gate_proj=gate, up_proj=up, down_proj=down), expected)
    none = problem.call(kept_blocks=problem.values["kept_blocks"][:0])
    assert_equal("y of no blocks", none, torch.zeros_like(none))


@check(*grid(dtype=DTYPES, num_tokens=(1, 5, 150)), on=with_kernel)
def experts_take_any_layout(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    grouped = grouped_problem(num_tokens, 40, 3, 24, 2, dtype, device=device)
    problems = [
        grouped,
        grouped.rows,
        pruned_problem(num_tokens, 40, dtype=dtype, device=device),
    ]
    # A library of the CPU may choose another kernel for another stride: rounding, no more.
    close = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 3e-2)
    rtol, atol = close if backend_of(device) == CPU else (0.0, 0.0)
    for problem in problems:
        expected = problem.call()
        for name in problem.floats:
            for layout, view in layouts(problem.values[name]):
                message = f"{problem.op}, {name}: {layout}: {{}}".format
                found = problem.call(**{name: view})
                torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=message)


@check(*cycle(grid(num_tokens=(5, 33, 128, 300, 1030)), dtype=DTYPES), on=with_kernel)
def experts_repeat_bit_for_bit(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """Whatever the number of threads, which libraries do not promise for a few tokens, nor on other
    processors than those with AVX-512."""
    grouped, pruned = both_problems(device, dtype, num_tokens)

    def run() -> list[Tensor]:
        found = [grouped.call(), grouped.rows.call()]
        for problem in (grouped, pruned) if num_tokens >= 8 else ():
            y = problem.call()
            found += [y, *(problem.gradients(torch.ones_like(y)) if num_tokens < 1000 else ())]
        return found

    expected = run()
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    for _ in each_thread_count() if has_avx512 else range(3):
        assert_all_equal("repeat", run(), expected)


@check(*grid(dtype=DTYPES, num_tokens=(40, 300)), on=with_kernel)
def non_finite_tokens_touch_only_themselves(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    for problem in both_problems(device, dtype, num_tokens):
        clean = problem.call()
        x = problem.values["x"].clone()
        x[3], x[7, 5] = torch.nan, torch.inf
        token = torch.arange(num_tokens, device=device)
        bad = (token == 3) | (token == 7)
        y = problem.call(x=x)
        assert_equal("tokens that stay finite", y.isfinite().all(1), ~bad)
        assert_equal("tokens", y[~bad], clean[~bad])


@check(*grid(dtype=DTYPES), on=with_kernel)
def activations_saturate_like_silu(device: torch.device, dtype: torch.dtype) -> None:
    """Large gates pass on or are zero; tokens and weights of zeros give zeros."""
    grouped = grouped_problem(40, 40, 2, 24, 1, dtype, device=device)
    for problem in (grouped, pruned_problem(dtype=dtype, device=device)):
        zeros = torch.zeros_like(problem.values["x"])
        assert problem.call(x=zeros).abs().max() == 0
        problem.values["gate_proj"].mul_(200)
        exact = problem.in_torch(*doubles(*problem.leaves))
        error = (problem.call().double() - exact).norm() / exact.norm()
        assert error < 16 * torch.finfo(dtype).eps, f"off by {error:.2g}"
        least = torch.full_like(problem.values["gate_proj"], torch.finfo(dtype).min)
        ones = torch.ones_like(zeros)
        assert problem.call(x=ones / 64, gate_proj=least).abs().max() == 0
    unused = torch.full_like(grouped.values["weights"], -grouped.values["weight_offset"])
    assert grouped.call(weights=unused).abs().max() == 0


@check(on=(CUDA,))
def what_no_kernel_takes_is_refused(device: torch.device) -> None:
    """fp32, widths that are no multiple of 8, and two devices: an error that names the op."""
    for dtype, width in ((torch.float32, 24), (torch.bfloat16, 12)):
        problem = grouped_problem(width=width, dtype=dtype, device=device)
        for op in ("grouped_ffn", "grouped_ffn_combine"):
            assert "grouped_ffn" in refusal(partial(problem.call, op))
    values = grouped_values(dtype=torch.bfloat16, device=device)
    for op, name in (("permute", "row_token"), ("grouped_ffn", "up_proj"), ("combine", "y")):
        assert refusal(partial(call, op, values | {name: values[name].cpu()}))


# Backward


@check(
    *cycle(
        grid(
            layout=("halves", "apart", "uneven", "views"),
            sizes=((5, 8, 3, 16, 2), (37, 72, 5, 48, 2), (150, 128, 6, 80, 2), (90, 136, 1, 24, 1)),
        ),
        dtype=HALVES,
        routing=("random", "gaps"),
    ),
    *grid(layout=("halves", "apart"), sizes=((37, 41, 5, 7, 2), (200, 40, 3, 24, 2)),
          dtype=(DTYPES[0],), routing=("random",)),
    on=with_kernel,
)  # fmt: skip
def experts_may_lie_anywhere(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    layout: str,
    routing: str,
) -> None:
    """Weights with a dimension of experts give the bits of packed ones, gradients too."""
    problem = grouped_problem(*sizes, dtype, routing, device)
    other = Problem(problem.op, of_experts(problem.values, layout))
    assert_equal("rows", other.rows.call(), problem.rows.call())
    assert_equal("y", other.call(), problem.call())
    grad = problem.values["grad_y"]
    packed = dict(zip(problem.floats, problem.gradients(grad), strict=True))
    expected = of_experts(problem.values | packed, "")
    assert_all_equal("gradient", other.gradients(grad), [expected[name] for name in other.floats])


@check(*grid(dtype=DTYPES), on=with_kernel)
def each_argument_gets_its_gradient_alone(device: torch.device, dtype: torch.dtype) -> None:
    """Frozen weights pass the same gradient on, and skip the products of their own."""
    for problem in both_problems(device, dtype, 37):
        y, gate_rows, up_rows = problem.call(f"{problem.op}_train")
        grad = torch.randn(y.shape, device=device).to(dtype)
        everything = problem.gradients(grad)
        for recompute in (False, True):
            for position, name in enumerate(problem.floats):
                alone = problem.gradients(grad, recompute, (name,))
                assert_equal(f"gradient of {name} alone", alone[0], everything[position])
        backward = f"{problem.op}_backward"
        flags = [name for name in ARGUMENTS[backward] if name.startswith("needs_")]
        for wanted in flags:
            needs = {name: name == wanted for name in flags}
            kept = {"grad_y": grad, "gate_rows": gate_rows, "up_rows": up_rows}
            found = problem.call(backward, **kept, **needs)
            written = [tensor.numel() > 0 for tensor in found]
            assert written == [*(needs[name] for name in flags), *[needs[flags[-1]]] * 2]


# Element offsets beyond 2^31, where the memory allows them

LIMIT = 2**31


def needs_memory(device: torch.device, num_bytes: int) -> None:
    """Skips what does not fit into the free memory of a GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < num_bytes:
        raise Skip(f"needs {num_bytes / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


@check(on=(CUDA,))
def rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """permute and combine of small integers, whose sums are exact."""
    top_k, hidden_size = 8, 4096
    num_tokens = LIMIT // (top_k * hidden_size) + 1000
    needs_memory(device, 3 * 2 * num_tokens * top_k * hidden_size)
    topk_idx = draw_routing("repeated", num_tokens, 7, top_k).to(device)
    _, row_token, token_rows = ops.sort_by_expert(topk_idx, 7)
    x = torch.randint(-3, 4, (num_tokens, hidden_size), device=device, dtype=torch.int8).bfloat16()
    y = ops.permute(x, row_token, token_rows)
    assert y.numel() > LIMIT
    last = torch.arange(len(row_token) - 3000, len(row_token), device=device)
    for rows in (last, last - last[0]):
        assert_equal("permute", y[rows], x[row_token[rows].long()])
    back = ops.combine(y, None, token_rows)
    assert_equal("combine", back, (top_k * x.float()).bfloat16())


@check(on=(CUDA,))
def expert_rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    hidden_size, width, num_experts = 3584, 64, 4
    num_tokens = LIMIT // (2 * hidden_size) + 1000
    needs_memory(device, 12 * num_tokens * 2 * hidden_size * 2)
    sizes = (num_tokens, hidden_size, num_experts, width, 2)
    problem = grouped_problem(*sizes, torch.bfloat16, device=device).rows
    y, v = problem.call(), problem.values
    assert y.numel() > LIMIT
    starts = v["expert_offsets"].tolist()
    for expert in range(num_experts):
        own = slice(expert * width, (expert + 1) * width)
        weights = v["gate_proj"][own], v["up_proj"][own], v["down_proj"][:, own]
        for rows in (
            slice(starts[expert], starts[expert] + 64),
            slice(starts[expert + 1] - 64, starts[expert + 1]),
        ):
            tokens = v["x"][v["row_token"][rows].long()].float()
            expected = reference.swiglu(tokens, *(weight.float() for weight in weights))
            error = (y[rows].float() - expected).norm() / expected.norm()
            assert error < 0.02, f"expert {expert}: rows are off by {error:.2g}"


def spread_rows(tensor: Tensor) -> Tensor:
    """The same matrix with its last row more than 2^31 elements behind its first.

    Memory of the system is only taken for pages that are written.
    """
    rows, columns = tensor.shape
    stride = LIMIT // (rows - 1) // 8 * 8 + 8 + columns
    length = (rows - 1) * stride + columns
    if tensor.is_cuda:
        flat = torch.empty(length, dtype=tensor.dtype, device=tensor.device)
    else:
        try:
            memory = mmap.mmap(-1, length * tensor.element_size())
        except OSError as error:
            raise Skip(f"the system refuses {length >> 30} Gi elements: {error}") from error
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided((rows, columns), (stride, 1)).copy_(tensor)


# NOTE: torch's own bf16 product of 40 rows crashes on weights spread so far (torch 2.13, AVX-512),
# without any op of ours; so on the CPU weights are spread in fp32 alone.
@check(
    *grid(dtype=(torch.float32, torch.bfloat16)),
    on=lambda dtype: (CPU,) if dtype == torch.float32 else EVERYWHERE,
)
def rows_spread_over_2_to_the_31_elements(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda":
        needs_memory(device, 3 * LIMIT)
    v = grouped_values(20, 24, 5, 24, 2, dtype, device=device)
    pairs = (("route_topk", "x"), ("route_topk", "gate"), ("permute", "x"), ("combine", "y"))
    for op, name in pairs:
        found, expected = call(op, v | {name: spread_rows(v[name])}), call(op, v)
        if op != "route_topk":
            found, expected = [found], [expected]
        assert_all_equal(f"{op} of {name}", found, expected)
    any_tensor = dtype == torch.float32 or backend_of(device) != CPU
    for num_tokens in (20, 200):
        for problem in both_problems(device, dtype, num_tokens, hidden_size=24):
            plain = problem.call()
            for name in FLOATS if any_tensor else ("x",):
                spread = problem.call(**{name: spread_rows(problem.values[name])})
                torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-5)
