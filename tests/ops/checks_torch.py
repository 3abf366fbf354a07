# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an op: opcheck, fullgraph compile, graphs, streams, the device guard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from problems import (
    HALVES,
    assert_equal,
    draw_routing,
    ffn_case,
    grid,
    pruned_problem,
    refusal,
)
from registry import CPU, CUDA, Skip, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

# Which of the ops on the left is differentiable.
OPS = {
    "route_topk": True,
    "route_topk_backward": False,
    "sort_by_expert": False,
    "permute": True,
    "combine": True,
    "combine_backward": False,
    "grouped_ffn": True,
    "grouped_ffn_train": True,
    "grouped_ffn_combine": False,
    "grouped_ffn_backward": False,
    "pruned_ffn": True,
    "pruned_ffn_train": True,
    "pruned_ffn_backward": False,
    "ffn_importance": False,
}


def block_on(
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 8 * 48,
    num_experts: int = 8,
    top_k: int = 3,
    **options: object,
) -> SparseMoE:
    """A block whose outputs have about unit size and whose router decides."""
    block = SparseMoE(
        hidden_size,
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


def arguments_of(
    op: str, device: torch.device, dtype: torch.dtype, num_tokens: int
) -> list[tuple[object, ...]]:
    """Arguments of an op, in each form that it takes."""
    case = ffn_case(num_tokens, dtype=dtype, device=device)
    pruned = pruned_problem(num_tokens, dtype=dtype, device=device)
    with torch.device(device):
        topk_idx = draw_routing("random", num_tokens, 5, 2)
        gate = torch.randn(5, 40).to(dtype)
        rows = torch.randn(2 * num_tokens, 40).to(dtype)
        grad = torch.randn(num_tokens, 40).to(dtype)
        active = tuple(torch.randn(2 * num_tokens, 24).to(dtype) for _ in range(2))
        kept_rows = tuple(torch.randn(num_tokens, 32).to(dtype) for _ in range(2))
        router_grads = torch.randn(num_tokens, 5), torch.randn(num_tokens, 2)
        token_weights = torch.rand(num_tokens)
        kept = torch.tensor([2, 0], dtype=torch.int32)
    both = ((True, True), (True, False), (False, True))
    x, *weights = pruned.leaves
    listed = (x, kept, *weights)
    combined = (case.weights, case.token_rows)
    arguments: dict[str, list[tuple[object, ...]]] = {
        "route_topk": [(case.x, gate, 2), (case.x, gate, 5)],
        "route_topk_backward": [(*router_grads, topk_idx, case.x, gate, *n) for n in both],
        "sort_by_expert": [(topk_idx, 5)],
        "permute": [(case.x, case.row_token, case.token_rows)],
        "combine": [(rows, *combined), (rows, None, case.token_rows)],
        "combine_backward": [(grad, rows, *combined, *needs) for needs in both],
        "grouped_ffn": [case.arguments, (*case.arguments, case.token_rows)],
        "grouped_ffn_train": [(*case.arguments, case.token_rows)],
        "grouped_ffn_combine": [case.fused_arguments],
        "grouped_ffn_backward": [(rows, *case.arguments, *active, *needs) for needs in both],
        "pruned_ffn": [(*listed, 16), (x, kept[:0], *weights, 16)],
        "pruned_ffn_train": [(*listed, 16)],
        "pruned_ffn_backward": [(grad, *listed, *kept_rows, 16, *needs) for needs in both],
        "ffn_importance": [(x, *weights[:2], 0.1), (x, *weights[:2], 0.1, token_weights)],
    }
    return arguments[op]


@check(
    *grid(op=tuple(OPS), dtype=(torch.bfloat16,), num_tokens=(20,)),
    *grid(op=tuple(OPS), dtype=(torch.float32,), num_tokens=(0,)),
    on=lambda dtype, **_: (CPU, CUDA) if dtype == torch.bfloat16 else (CPU,),
)
def opcheck(device: torch.device, op: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Schema, fake and autograd as torch wants them; the fake has the kernel's strides too."""
    call = getattr(torch.ops.sparse_unified, op).default
    forms = arguments_of(op, device, dtype, num_tokens)
    for arguments in forms:
        torch.library.opcheck(call, arguments)
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        real, fake = (r if isinstance(r, tuple) else (r,) for r in (call(*arguments), call(*meta)))
        for own, other in zip(real, fake, strict=True):
            assert other.device.type == "meta"
            facts = [(t.shape, t.dtype, t.stride()) for t in (own, other)]
            assert facts[0] == facts[1], f"{op}: {facts}"
        if OPS[op] and num_tokens and arguments is forms[0]:
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.is_floating_point():
                    argument.requires_grad_()
            torch.library.opcheck(call, arguments)


@check(*grid(op=("route_topk", "combine", "grouped_ffn", "pruned_ffn")), on=(CPU,))
def a_second_derivative_is_refused_and_not_zero(device: torch.device, op: str) -> None:
    arguments = arguments_of(op, device, torch.float32, 6)[0]
    leaf = arguments[0]
    assert isinstance(leaf, Tensor)
    leaf.requires_grad_()
    found = getattr(ops, op)(*arguments)
    y = found[0] if isinstance(found, tuple) else found
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    wanted = f"{op}_backward: arguments must not need a gradient"
    assert wanted in refusal(lambda: torch.autograd.grad(first.sum(), leaf))


@check(*grid(op=("grouped_ffn_combine", "ffn_importance")), on=(CPU,))
def ops_without_a_backward_refuse_one(device: torch.device, op: str) -> None:
    arguments = arguments_of(op, device, torch.float32, 6)[0]
    assert isinstance(arguments[0], Tensor)
    arguments[0].requires_grad_()
    found = getattr(ops, op)(*arguments)
    y = found[0] if isinstance(found, tuple) else found
    assert op in refusal(lambda: y.sum().backward())


def all_ops(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """All ops in a row; sums so that every output takes part in the gradient."""
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 2)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, gate.shape[0])
    rows = ops.grouped_ffn(x, row_token, expert_offsets, *weights, token_rows)
    again = (row_token, expert_offsets, *weights)
    rows = rows + ops.permute(x, row_token, token_rows) + ops.grouped_ffn(x, *again, recompute=True)
    kept = torch.tensor([1, 0], dtype=torch.int32)
    out = ops.combine(rows, 1 + topk_logits, token_rows) + ops.combine(rows, None, token_rows)
    return out + logits.mean() + ops.pruned_ffn(x, kept, *weights, 16)


def all_inputs(num_tokens: int = 19) -> list[Tensor]:
    case = ffn_case(num_tokens, 24, 4, 16, 2)
    return [t.detach().requires_grad_() for t in (case.x, torch.randn(4, 24) / 5, *case.experts)]


@check(on=(CPU,))
def all_ops_compile_as_one_graph_for_every_number_of_tokens(device: torch.device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(all_ops, fullgraph=True, backend=counter, dynamic=True)
    inputs = all_inputs()
    for num_tokens in (19, 8, 33):
        inputs[0] = torch.randn(num_tokens, 24, requires_grad=True)
        found = []
        for run in (function, all_ops):
            out = run(*inputs)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@check(on=(CPU,))
def all_ops_compile_with_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = [t.detach() for t in all_inputs()]  # compiling backward takes 10 s
    case = ffn_case(19, 24, 4, 16, 2)

    def function(*inputs: Tensor) -> Tensor:
        fused = ops.grouped_ffn_combine(inputs[0], *case.fused_arguments[1:])
        importance = ops.ffn_importance(inputs[0], *inputs[2:4], 0.1)
        return all_ops(*inputs) + fused + importance[0].mean()

    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


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
    x = torch.randn(37, 64, device=device).to(dtype)
    with torch.no_grad():
        (y, logits), (other, other_logits) = block(x), compiled(x)
    assert_equal("logits", other_logits, logits)
    torch.testing.assert_close(other, y, rtol=1e-2, atol=1e-2)
    grad = torch.randn(37, 64, device=device).to(dtype)
    grads = []
    for run in (block, compiled):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        run(leaf)[0].backward(grad)
        assert leaf.grad is not None
        assert block.gate_proj.grad is not None
        grads.append((leaf.grad, block.gate_proj.grad.clone()))
    for own, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-2, atol=2e-2)


def captured(
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def some_tokens(device: torch.device, dtype: torch.dtype, kind: str, gate: Tensor) -> Tensor:
    """Tokens [257, 64] that are routed at random, or all alike."""
    if kind == "random":
        return torch.randn(257, 64, device=device).to(dtype)
    return gate[:1].detach().expand(257, -1).contiguous() * 3


@check(*grid(dtype=HALVES), on=(CUDA,))
def graph_replays_with_other_routing(device: torch.device, dtype: torch.dtype) -> None:
    block = block_on(device, dtype)
    static = some_tokens(device, dtype, "random", block.gate.weight)
    with torch.inference_mode():
        graph, (y, logits) = captured(lambda: block(static))
        for kind in ("random", "one", "random"):
            static.copy_(some_tokens(device, dtype, kind, block.gate.weight))
            expected = block(static)
            y.fill_(torch.nan)
            graph.replay()
            assert_equal(f"y, {kind}", y, expected[0])
            assert_equal(f"logits, {kind}", logits, expected[1])


@check(*grid(dtype=HALVES), on=(CUDA,))
def graph_replays_a_training_step(device: torch.device, dtype: torch.dtype) -> None:
    block = block_on(device, dtype)
    static = some_tokens(device, dtype, "random", block.gate.weight)
    grad = torch.randn(257, 64, device=device).to(dtype)
    weights = (block.gate.weight, block.gate_proj, block.up_proj, block.down_proj)

    def run() -> tuple[Tensor, ...]:
        x = static.detach().requires_grad_()
        y, _ = block(x)
        return (y, *torch.autograd.grad(y, (x, *weights), grad))

    graph, outputs = captured(run)
    for kind in ("random", "one"):
        with torch.no_grad():
            static.copy_(some_tokens(device, dtype, kind, block.gate.weight))
        expected = [t.clone() for t in run()]
        for output in outputs:
            output.detach().fill_(torch.nan)
        graph.replay()
        for position, (own, other) in enumerate(zip(outputs, expected, strict=True)):
            assert_equal(f"output {position}, {kind}", own.detach(), other.detach())


@check(on=(CUDA,))
def ops_run_on_the_stream_of_the_caller(device: torch.device) -> None:
    """On a stream that is busy, tokens that are written last must be those that are read."""
    block = block_on(device, torch.bfloat16)
    first, last = (torch.randn(257, 64, device=device).bfloat16() for _ in range(2))
    with torch.inference_mode():
        expected = block(last)[0]
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        x = first.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            x.copy_(last)
            y = block(x)[0]
            y = y.clone()
        assert not side.query(), "the op waited for its stream"
        side.synchronize()
        assert_equal("y", y, expected)


@check(on=(CUDA,))
def ops_do_not_wait_for_the_device(device: torch.device) -> None:
    """Forward and backward return while the device still sleeps."""
    block = block_on(device, torch.bfloat16)
    x = torch.randn(257, 64, device=device).bfloat16().requires_grad_()
    block(x)[0].sum().backward()  # loads what is loaded once
    torch.cuda.synchronize()
    before = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    before.record()
    block(x)[0].sum().backward()
    assert not before.query(), "an op waited for the device"
    torch.cuda.synchronize()


@check(on=(CUDA,))
def ops_run_on_the_device_of_their_tensors(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("needs two CUDA devices")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    case = ffn_case(dtype=torch.bfloat16, device=other)
    before = torch.cuda.current_device()
    out = ops.grouped_ffn_combine(*case.fused_arguments)
    assert out.device == other
    assert torch.cuda.current_device() == before
    wide = [t.float() if t.is_floating_point() else t for t in case.arguments]
    rows = reference.grouped_ffn(*wide)
    expected = reference.combine(rows, case.weights, case.token_rows)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@check(on=(CUDA,))
def tensors_on_two_devices_are_refused(device: torch.device) -> None:
    case = ffn_case(dtype=torch.bfloat16, device=device)
    for call in (
        lambda: ops.permute(case.x, case.row_token.cpu(), case.token_rows),
        lambda: ops.grouped_ffn(case.x, *case.arguments[1:3], *(w.cpu() for w in case.experts)),
        lambda: ops.combine(case.x.cpu(), None, case.token_rows),
    ):
        assert refusal(call)
