# SPDX-License-Identifier: Apache-2.0
"""grouped_ffn, its variants, and pruned_ffn: forward and backward, on awkward and huge shapes."""

from __future__ import annotations

import mmap
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from problems import (
    ARGUMENTS,
    DTYPES,
    FLOATS,
    HALVES,
    ROUTINGS,
    Problem,
    Values,
    assert_all_equal,
    assert_as_good_as_torch,
    assert_equal,
    assert_gradients,
    both_problems,
    call,
    cycle,
    doubles,
    draw_routing,
    each_thread_count,
    grid,
    grouped_problem,
    grouped_values,
    layouts,
    poison,
    pruned_problem,
    refusal,
    torch_combine,
    with_kernel,
)
from registry import CPU, CUDA, EVERYWHERE, Skip, backend_of, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import composed, reference


def assert_problem(problem: Problem) -> None:
    """The op and its training variant, outputs poisoned, as exact as torch in its dtype."""
    exact, in_torch = problem.exact(), problem.in_torch(*problem.leaves)
    device, shape = exact.device, (tuple(exact.shape), in_torch.dtype)
    poison(device, shape)
    y = problem.call()
    assert_as_good_as_torch(y, in_torch, exact)
    poison(device, shape)
    trained, *activations = problem.call(f"{problem.op}_train")
    assert_as_good_as_torch(trained, in_torch, exact)
    for rows in activations:
        assert not rows.isnan().any(), "activations have elements that nothing wrote"
    assert_equal("repeat", problem.call(), y)


def assert_grouped(problem: Problem) -> None:
    """grouped_ffn, and what combines its rows."""
    assert_problem(problem)
    weights, token_rows = problem.values["weights"], problem.values["token_rows"]
    expected = reference.combine(problem.exact(), weights, token_rows)
    rows = problem.in_torch(*problem.leaves)
    poison(expected.device, (tuple(expected.shape), rows.dtype))
    out = problem.call("grouped_ffn_combine")
    assert_as_good_as_torch(out, torch_combine(rows, weights, token_rows), expected)
    assert_equal("repeat", problem.call("grouped_ffn_combine"), out)


# Forward


@check(
    *cycle(
        grid(num_tokens=(0, 1, 37, 300), experts=((5, 2), (17, 8), (33, 33), (1, 1))),
        dtype=DTYPES,
        routing=ROUTINGS,
    ),
    *grid(num_tokens=(60, 150), experts=((5, 2), (5, 1)), dtype=DTYPES, routing=ROUTINGS),
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
    sizes = (num_tokens, size[0], num_experts, size[1], top_k)
    assert_grouped(grouped_problem(*sizes, dtype, routing, device))


@check(
    *grid(dtype=DTYPES, sizes=((41, 64, 3, 592, 2), (41, 64, 3, 1184, 2))),
    *grid(dtype=HALVES, sizes=((37, 3584, 3, 592, 2), (1000, 3584, 3, 1184, 2))),
    *grid(dtype=HALVES[:1], sizes=((256, 3584, 32, 592, 16), (4096, 3584, 16, 1184, 8))),
    on=with_kernel,
    small=lambda sizes, **_: sizes[1] < 100,
)
def ffn_of_bagel(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    assert_grouped(grouped_problem(*sizes, dtype, device=device))


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
    # More neurons than one sum takes, in runs short and long, the last slice not full.
    *grid(blocks=((99, 16),), num_tokens=(3, 70, 257), dtype=DTYPES[:2], kept=("runs",),
          hidden_size=(1, 13, 33, 600)),
    on=lambda kept="", **values: (CPU,) if kept == "runs" else with_kernel(**values),
    small=lambda num_tokens, **_: num_tokens < 1000,
)  # fmt: skip
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
        "runs": dict.fromkeys([*range(40, 90), *range(0, 40, 2), *range(91, 99), 20, 39]),
    }
    problem = pruned_problem(
        num_tokens, hidden_size, count, block_size, list(lists[kept]), dtype, device
    )
    assert_problem(problem)
    if kept == "all":  # then it is the dense FFN
        x, *weights = (tensor.float() for tensor in problem.leaves)
        torch.testing.assert_close(problem.exact(), reference.swiglu(x, *weights))


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
        Problem("grouped_ffn_combine", grouped.values),
        pruned_problem(num_tokens, 40, dtype=dtype, device=device),
    ]
    # A library of the CPU may choose another kernel for another stride: rounding, no more.
    close = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 3e-2)
    rtol, atol = close if backend_of(device) == CPU else (0.0, 0.0)
    for problem in problems:
        expected = problem.call()
        for name in FLOATS:
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
        found = [grouped.call(), grouped.call("grouped_ffn_combine")]
        for problem in (grouped, pruned) if num_tokens >= 8 else ():
            y = problem.call()
            found += [y, *(problem.gradients(torch.ones_like(y)) if num_tokens < 1000 else ())]
        return found

    expected = run()
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    for _ in each_thread_count() if has_avx512 else range(3):
        assert_all_equal("repeat", run(), expected)


@check(*grid(dtype=DTYPES, num_tokens=(40, 300)), on=with_kernel)
def non_finite_tokens_touch_only_their_rows(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    for problem in both_problems(device, dtype, num_tokens):
        clean = problem.call()
        x = problem.values["x"].clone()
        x[3], x[7, 5] = torch.nan, torch.inf
        token = problem.token_of_row()
        bad_rows = (token == 3) | (token == 7)
        y = problem.call(x=x)
        assert_equal("rows that stay finite", y.isfinite().all(1), ~bad_rows)
        assert_equal("rows", y[~bad_rows], clean[~bad_rows])


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
    unused = torch.zeros_like(grouped.values["weights"])
    assert grouped.call("grouped_ffn_combine", weights=unused).abs().max() == 0


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
    for problem in (
        grouped_problem(num_tokens, 72, 5, width, 2, dtype, routing, device),
        pruned_problem(num_tokens, 72, 7, 64, dtype=dtype, device=device),
    ):
        grad = torch.randn(problem.exact().shape, device=device).to(dtype)
        own = problem.gradients(grad, recompute)
        assert_gradients(own, problem.exact_gradients(grad), dtype)
        for weight in (own[1], own[2], own[3].t()):
            assert not weight[problem.idle()].any(), "a neuron without a row has a gradient"
        assert_all_equal("recomputed", problem.gradients(grad, not recompute), own)
        strided = problem.gradients(grad.t().contiguous().t(), recompute)
        assert_all_equal("gradient of another layout", strided, own)


def of_experts(values: Values, layout: str) -> Values:
    """The same weights with a dimension of experts, laid out in some way."""
    count = values["num_experts"]
    gate, up = (values[name].unflatten(0, (count, -1)) for name in ("gate_proj", "up_proj"))
    down = values["down_proj"].unflatten(1, (count, -1)).transpose(0, 1)
    if layout == "halves":  # as transformers keeps them
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
        down = down.contiguous()
    elif layout == "apart":
        gate, up = (F.pad(weight, (0, 8, 0, 3), value=torch.nan) for weight in (gate, up))
        gate, up = gate[:, :-3, :-8], up[:, :-3, :-8]
        down = F.pad(down, (0, 16, 0, 5), value=torch.nan)[:, :-5, :-16]
    elif layout == "uneven":  # the two differ in how far experts lie apart
        gate = F.pad(gate, (0, 0, 0, 1), value=torch.nan)[:, :-1]
    return values | {"gate_proj": gate, "up_proj": up, "down_proj": down}


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
    assert_equal("y", other.call(), problem.call())
    combined = [own.call("grouped_ffn_combine") for own in (other, problem)]
    assert_equal("combined", *combined)
    grad = torch.randn(combined[0].shape[0] * sizes[4], sizes[1], device=device).to(dtype)
    own, expected = other.gradients(grad), list(problem.gradients(grad))
    expected[1:] = [of_experts(problem.values | dict(zip(FLOATS, expected, strict=True)), "")[name]
                    for name in FLOATS[1:]]  # fmt: skip
    assert_all_equal("gradient", own, expected)


@check(
    *cycle(
        grid(
            sizes=((37, 64, 5, 592, 2), (90, 72, 3, 1184, 2), (1, 8, 2, 8, 1), (300, 136, 9, 80, 8))
        ),
        layout=("", "halves", "views"),
        routing=("gaps", "random", "last"),
    ),
    on=(CPU, CUDA),
)  # fmt: skip
def grouped_mm_is_as_exact_as_torch(
    device: torch.device, sizes: tuple[int, ...], layout: str, routing: str
) -> None:
    """It runs the experts on Blackwell: forward and gradients, on views of the weights."""
    problem = grouped_problem(*sizes, torch.bfloat16, routing, device)
    given = of_experts(problem.values, layout) if layout else problem.values
    products = mock.Mock(wraps=F.grouped_mm)

    def run(*leaves: Tensor) -> Tensor:
        names = ARGUMENTS[problem.op]
        values = given | dict(zip(FLOATS, leaves, strict=True))
        with mock.patch.object(F, "grouped_mm", products):
            return composed.grouped_ffn(**{name: values[name] for name in names})

    leaves = [given[name].detach().requires_grad_() for name in FLOATS]
    y = run(*leaves)
    assert_as_good_as_torch(y.detach(), problem.in_torch(*problem.leaves), problem.exact())
    assert_equal("repeat", run(*leaves), y)
    weights = [call.args[1] for call in products.call_args_list[:3]]
    for own, leaf in zip(weights, leaves[1:], strict=True):
        assert own.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    grad = torch.randn_like(y)
    own = list(torch.autograd.grad(y, leaves, grad))
    if layout:
        own[1:] = [own[1].flatten(0, 1), own[2].flatten(0, 1), own[3].transpose(0, 1).flatten(1)]
    assert_gradients(own, problem.exact_gradients(grad), torch.bfloat16)
    for weight in (own[1], own[2], own[3].t()):
        assert not weight[problem.idle()].any(), "a neuron without a row has a gradient"


@check(*grid(dtype=DTYPES), on=with_kernel)
def each_argument_gets_its_gradient_alone(device: torch.device, dtype: torch.dtype) -> None:
    """Frozen weights pass the same gradient on, and skip the products of their own."""
    for problem in both_problems(device, dtype, 37):
        y, gate_rows, up_rows = problem.call(f"{problem.op}_train")
        grad = torch.randn(y.shape, device=device).to(dtype)
        everything = problem.gradients(grad)
        for recompute in (False, True):
            for position, name in enumerate(FLOATS):
                alone = problem.gradients(grad, recompute, (name,))
                assert_equal(f"gradient of {name} alone", alone[0], everything[position])
        for needs_x, needs_weights in ((True, False), (False, True)):
            needs = {"needs_x": needs_x, "needs_weights": needs_weights}
            kept = {"grad_y": grad, "gate_rows": gate_rows, "up_rows": up_rows}
            found = problem.call(f"{problem.op}_backward", **kept, **needs)
            written = [tensor.numel() > 0 for tensor in found]
            assert written == [needs_x, *[needs_weights] * 3]


@check()
def tokens_with_unequal_numbers_of_rows_get_their_gradients(device: torch.device) -> None:
    """Token 0 has three rows and token 1 one: no [T, K] map exists, and none is needed."""
    dtype = torch.float32 if backend_of(device) == CPU else torch.bfloat16
    problem = grouped_problem(2, 16, 2, 8, 2, dtype, device=device)
    problem.values["row_token"] = torch.tensor([0, 0, 0, 1], dtype=torch.int32, device=device)
    problem.values["token_rows"] = None
    grad = torch.randn(4, 16, device=device).to(dtype)
    assert_gradients(problem.gradients(grad), problem.exact_gradients(grad), dtype)


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
    problem = grouped_problem(*sizes, torch.bfloat16, device=device)
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
