# SPDX-License-Identifier: Apache-2.0
"""The properties that every kernel family must hold on a device, so that a model may run on it.

Routing, experts forward and backward, half of a width, the block; awkward shapes and BAGEL's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import ops
from sparse_unified.checks import CPU, CUDA, check
from sparse_unified.checks.problems import (
    DTYPES,
    FLOATS,
    HALVES,
    OPS,
    ROUTINGS,
    Problem,
    assert_all_equal,
    assert_as_good_as_torch,
    assert_equal,
    assert_gradients,
    assert_near,
    call,
    cycle,
    doubles,
    draw_routing,
    grid,
    grouped_problem,
    grouped_values,
    of_experts,
    poison,
    pruned_problem,
    torch_combine,
    with_kernel,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import backend, composed, reference

TOKENS = (0, 1, 37, 4096)
EXPERTS = ((16, 8), (32, 16), (5, 2), (12, 12), (1, 1), (33, 7))


def few(num_tokens: int = 0, **_: object) -> bool:
    return num_tokens < 1000


@check(
    *cycle(grid(num_tokens=TOKENS, experts=EXPERTS), dtype=DTYPES, hidden_size=(96, 300, 41, 130)),
    *cycle(grid(hidden_size=(3584, 8, 1), dtype=DTYPES), num_tokens=(37,), experts=EXPERTS),
    # More experts than are compared each with each.
    *grid(num_tokens=(37,), experts=((100, 9), (256, 8)), dtype=DTYPES, hidden_size=(96,)),
    small=few,
)
def route_of_exact_logits(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    experts: tuple[int, int],
    hidden_size: int,
) -> None:
    """Integers: sums are exact in every order, ties included."""
    num_experts, top_k = experts
    with torch.device(device):
        x = torch.randint(-3, 4, (num_tokens, hidden_size)).to(dtype)
        gate = torch.randint(-2, 3, (num_experts, hidden_size)).to(dtype)
    shapes = ((num_tokens, num_experts), (num_tokens, top_k))
    poison(device, *((shape, torch.float32) for shape in shapes))
    expected = reference.route_topk(x, gate, top_k)
    assert_all_equal("route_topk", ops.route_topk(x, gate, top_k), expected)


@check(
    *cycle(grid(routing=ROUTINGS, num_tokens=TOKENS), experts=EXPERTS),
    *cycle(grid(experts=(*EXPERTS, (256, 3), (3, 0))), routing=ROUTINGS, num_tokens=(300, 37)),
    # Both sides of the borders between tiles of the kernels, and between one block and several.
    *cycle(
        grid(experts=((7, 1), (33, 1), (256, 1)), num_tokens=(31, 33, 511, 513, 1023, 1025, 1537)),
        routing=("random", "gaps"),
    ),
    *grid(routing=("random", "repeated"), num_tokens=(1000, 70_000), experts=((16, 8), (200, 3))),
    small=lambda num_tokens, **_: num_tokens < 2000,
)
def sort_is_the_stable_one(
    device: torch.device, routing: str, num_tokens: int, experts: tuple[int, int]
) -> None:
    num_experts, top_k = experts
    with torch.device(device):
        topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
    expected = reference.sort_by_expert(topk_idx, num_experts)
    found = ops.sort_by_expert(topk_idx, num_experts)
    assert_all_equal("sort_by_expert", found, expected)
    # The invariants of routing, without the reference: every row once, of its own token.
    rows = found[2].reshape(-1).long()
    assert_equal("rows", rows.sort().values, torch.arange(len(rows), device=device))
    tokens = torch.arange(len(rows), device=device).int() // max(top_k, 1)
    assert_equal("row_token", found[1][rows], tokens)


@check(
    *cycle(
        grid(num_tokens=TOKENS, hidden_size=(1, 8, 67, 1000, 3584)),
        dtype=DTYPES,
        top_k=(8, 4, 1, 7),
    ),
    small=few,
)
def permute_and_combine(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, top_k: int
) -> None:
    v = grouped_values(num_tokens, hidden_size, 16, 0, top_k, dtype, device=device)
    x, y, token_rows = v["x"], v["y"], v["token_rows"]
    poison(device, (tuple(y.shape), dtype))
    assert_equal("permute", call("permute", v), reference.permute(x, v["row_token"]))
    poison(device, (tuple(x.shape), dtype))
    for weights, offset in ((v["weights"], v["weight_offset"]), (v["weights"], 0.0), (None, 2.0)):
        out = ops.combine(y, weights, token_rows, offset)
        exact = reference.combine(y.float(), weights, token_rows, offset)
        whole = None if weights is None else weights + offset
        assert_as_good_as_torch(out, torch_combine(y, whole, token_rows), exact)
        # One rounding of an fp32 sum, and the offset added in fp32.
        assert_equal("rounded once", out, ops.combine(y.float(), whole, token_rows).to(dtype))
    # Every row once: the sum over the rows of a token is K times the token, exact for integers.
    whole = (4 * x).round()
    back = ops.combine(call("permute", v | {"x": whole}), None, token_rows)
    assert_equal("combine of permute", back, (top_k * whole.float()).to(dtype))


@check(*grid(dtype=DTYPES, num_tokens=(1, 53, 300, 1000)), small=few)
def gradients_of_route_topk(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """Against fp64, both at once and each argument alone."""
    v = grouped_values(num_tokens, 72, 17, 0, 5, device=device)
    tensors = [(4 * v["x"]).round().to(dtype), (4 * v["gate"]).round().to(dtype)]
    grads = v["grad_logits"], v["grad_topk_logits"]
    wide = doubles(*tensors)
    exact = torch.autograd.grad(
        reference.route_topk(wide[0], wide[1], 5)[:2], wide, [grad.double() for grad in grads]
    )
    for trained in ((0, 1), (0,), (1,)):
        leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
        logits, topk_logits, topk_idx = ops.route_topk(leaves[0], leaves[1], 5)
        assert not topk_idx.requires_grad
        own = torch.autograd.grad((logits, topk_logits), [leaves[i] for i in trained], grads)
        assert_gradients(own, [exact[i] for i in trained], dtype)


@check(*grid(dtype=DTYPES, num_tokens=(1, 41, 300, 1000)), small=few)
def gradient_of_permute(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    v = grouped_values(num_tokens, 72, 5, 0, 3, dtype, device=device)
    x, row_token, grad = v["x"].requires_grad_(), v["row_token"], v["y"]
    (wide,) = doubles(x)
    own = torch.autograd.grad(ops.permute(x, row_token, v["token_rows"]), x, grad)
    exact = torch.autograd.grad(reference.permute(wide, row_token), wide, grad.double())
    assert_gradients(own, exact, dtype)


def assert_problem(problem: Problem) -> None:
    """The op and its training variant if any, outputs poisoned, as exact as torch in its dtype."""
    exact, in_torch = problem.exact(), problem.in_torch(*problem.leaves)
    device, shape = exact.device, (tuple(exact.shape), in_torch.dtype)
    poison(device, shape)
    y = problem.call()
    assert_as_good_as_torch(y, in_torch, exact)
    assert_equal("repeat", problem.call(), y)
    if f"{problem.op}_train" not in OPS:
        return
    poison(device, shape)
    trained, *activations = problem.call(f"{problem.op}_train")
    assert_as_good_as_torch(trained, in_torch, exact)
    for rows in activations:
        assert not rows.isnan().any(), "activations have elements that nothing wrote"


def assert_grouped(problem: Problem) -> None:
    """Rows of grouped_ffn, and what combines them."""
    assert_problem(problem.rows)
    assert_problem(problem)


@check(
    *cycle(
        grid(num_tokens=(0, 1, 37, 300), experts=((5, 2), (17, 8), (33, 33), (1, 1))),
        dtype=DTYPES,
        routing=ROUTINGS,
    ),
    *grid(num_tokens=(60, 150), experts=((5, 2), (5, 1)), dtype=DTYPES, routing=ROUTINGS),
    *grid(num_tokens=(400,), experts=((5, 2),), dtype=DTYPES, routing=("random",)),
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
    size = (136, 80) if num_tokens in (150, 400) else (40, 24)
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


@check(
    *cycle(
        grid(num_tokens=(0, 1, 37, 150), recompute=(False, True)),
        dtype=DTYPES,
        routing=("random", "last", "gaps", "one"),
    ),
    *grid(num_tokens=(90,), recompute=(False, True), dtype=DTYPES, routing=("random", "gaps")),
    *grid(num_tokens=(90,), recompute=(False,), dtype=DTYPES, routing=("random",), width=(592,)),
    # More rows an expert than the small tiles have: the kernels of Hopper.
    *grid(num_tokens=(400,), recompute=(False,), dtype=DTYPES, routing=("random",), width=(48,)),
    # An expert of more rows than the CPU takes at once.
    *grid(num_tokens=(600,), recompute=(False,), dtype=DTYPES, routing=("last",), width=(48,)),
    on=lambda num_tokens, **values: (CPU,) if num_tokens == 600 else with_kernel(**values),
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
        assert_gradients(own, problem.exact_gradients(grad), dtype, problem.leaves)
        for weight in (own[-3], own[-2], own[-1].t()):
            assert not weight[problem.idle()].any(), "a neuron without a row has a gradient"
        assert_all_equal("recomputed", problem.gradients(grad, not recompute), own)
        strided = problem.gradients(grad.t().contiguous().t(), recompute)
        assert_all_equal("gradient of another layout", strided, own)


@check(
    *cycle(
        grid(
            sizes=((37, 64, 5, 592, 2), (90, 72, 3, 1184, 2), (1, 8, 2, 8, 1), (300, 136, 9, 80, 8))
        ),
        layout=("", "halves", "views"),
        routing=("gaps", "random", "last"),
    ),
    *grid(sizes=((1000, 3584, 3, 1184, 2),), layout=("",), routing=("gaps",)),
    on=(CPU, CUDA),
    small=lambda sizes, **_: sizes[1] < 1000,
)  # fmt: skip
def grouped_mm_is_as_exact_as_torch(
    device: torch.device, sizes: tuple[int, ...], layout: str, routing: str
) -> None:
    """It runs experts on Blackwell: forward and gradients, on views of the weights."""
    problem = grouped_problem(*sizes, torch.bfloat16, routing, device).rows
    given = of_experts(problem.values, layout) if layout else problem.values
    products = mock.Mock(wraps=F.grouped_mm)

    def run(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
        maps = {name: given[name] for name in ("row_token", "expert_offsets", "token_rows")}
        with mock.patch.object(F, "grouped_mm", products):
            return composed.grouped_ffn(
                x, gate_proj=gate_proj, up_proj=up_proj, down_proj=down_proj, **maps
            )

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


def block_on(
    device: torch.device,
    dtype: torch.dtype,
    *,
    intermediate_size: int = 8 * 48,
    num_experts: int = 8,
    top_k: int = 3,
    **options: object,
) -> SparseMoE:
    """A block whose outputs have about unit size and whose router decides."""
    block = SparseMoE(
        64,
        intermediate_size,
        num_experts,
        top_k,
        device=device,
        dtype=dtype,
        **options,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            columns = block.layout.expert_width if name == "down_proj" else parameter.shape[1]
            drawn = torch.randn(parameter.shape, device=device) * columns**-0.5
            parameter.copy_(drawn)
    return block


def twin(block: SparseMoE) -> SparseMoE:
    """The same block on the CPU in fp32, where anything may run it."""
    other = copy.deepcopy(block).to("cpu", torch.float32)
    other.strict = False
    return other


@check(
    *grid(dtype=DTYPES, shared=(0, 1), gate_img=(False, True), num_tokens=(61,)),
    *grid(dtype=DTYPES, shared=(0,), gate_img=(False,), num_tokens=(0, 300)),
    on=with_kernel,
)
def block_is_that_of_the_cpu(
    device: torch.device, dtype: torch.dtype, shared: int, gate_img: bool, num_tokens: int
) -> None:
    """Outputs and gradients beside torch ops in fp32; integers route, so that no choice flips."""
    why = backend.CPU_REFUSAL if device.type == "cpu" else backend.device_refusal(device)
    block = block_on(
        device,
        dtype,
        intermediate_size=48 * (7 + shared),
        num_experts=7,
        num_shared_experts=shared,
        gate_img=gate_img,
        strict=why is None,
    )
    routers = [r for r in (block.gate, block.gate_img) if r is not None]
    with torch.no_grad():
        for router in routers:
            router.weight.copy_(torch.randint(-2, 3, router.weight.shape) / 8)
    exact = twin(block)
    with torch.device(device):
        x = (torch.randint(-4, 5, (num_tokens, 64)) / 4).to(dtype).requires_grad_()
        grad = torch.randn(num_tokens, 64).to(dtype)
        indexes = (torch.arange(0, 40), torch.arange(40, 61)) if gate_img else ()
    y, logits = block(x, *indexes)
    with torch.inference_mode():
        quick, _ = block(x, *indexes)
    wide = x.detach().float().cpu().requires_grad_()
    with mock.patch.object(backend, "choose", return_value="torch: asked for by a check"):
        expected, expected_logits = exact(wide, *(i.cpu() for i in indexes))
    assert_equal("logits", logits.cpu(), expected_logits)
    assert_near("y", y, expected, dtype)
    assert_near("y of inference", quick, expected, dtype)
    own = torch.autograd.grad(y, [x, *block.parameters()], grad, allow_unused=True)
    leaves, wide_grad = [wide, *exact.parameters()], grad.float().cpu()
    others = torch.autograd.grad(expected, leaves, wide_grad, allow_unused=True)
    names = ["x", *(name for name, _ in block.named_parameters())]
    for name, gradient, other in zip(names, own, others, strict=True):
        assert (gradient is None) == (other is None), f"{name} got a gradient, or none"
        if other is not None:
            assert_near(f"gradient of {name}", gradient, other, dtype)


def gradients(
    block: SparseMoE, run: Callable[..., object], x: Tensor, grad: Tensor
) -> list[Tensor]:
    """y, and the gradients of tokens and all weights."""
    leaf = x.detach().requires_grad_()
    y: Tensor = run(leaf)[0]  # type: ignore[index]
    leaves = (leaf, block.gate.weight, block.gate_proj, block.up_proj, block.down_proj)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@check(
    *grid(dtype=HALVES, backend=("aot_eager",)),
    {"dtype": torch.bfloat16, "backend": "inductor"},
    on=(CPU, CUDA),
    small=lambda backend, **_: backend == "aot_eager",
)
def block_compiles_as_one_graph(device: torch.device, dtype: torch.dtype, backend: str) -> None:
    torch.compiler.reset()
    block = block_on(device, dtype)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=False)
    x, grad = (torch.randn(37, 64, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        (y, logits), (other, other_logits) = block(x), compiled(x)
    assert_equal("logits", other_logits, logits)
    expected, found = (gradients(block, run, x, grad) for run in (block, compiled))
    if backend == "aot_eager":  # the same kernels in the same order
        assert_equal("y", other, y)
        return assert_all_equal("gradient", found, expected)
    assert_near("y", other, y, dtype)
    for own, exact in zip(found, expected, strict=True):
        assert_near("gradient", own, exact, dtype)


@check(*grid(dtype=HALVES, trains=(False, True)), on=(CUDA,))
def graph_replays_with_other_routing(
    device: torch.device, dtype: torch.dtype, trains: bool
) -> None:
    """Forward, and a training step: tokens routed at random, or all alike. Nothing can be captured
    that waits for the device or runs on another stream."""
    block = block_on(device, dtype)
    static, grad = (torch.randn(257, 64, device=device).to(dtype) for _ in range(2))

    def run() -> list[Tensor]:
        if trains:
            return gradients(block, block, static, grad)
        with torch.inference_mode():
            return list(block(static))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    alike = block.gate.weight[:1].detach().expand(257, -1) * 3
    for tokens in (torch.randn_like(static), alike, torch.randn_like(static)):
        static.copy_(tokens)
        expected = [t.detach().clone() for t in run()]
        with torch.inference_mode():
            for output in outputs:
                output.fill_(torch.nan)
        graph.replay()
        assert_all_equal("replay", [t.detach() for t in outputs], expected)
