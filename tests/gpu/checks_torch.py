# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an op: opcheck, fullgraph compile, graphs, streams, the device guard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from device_cases import HALVES, assert_equal, case_on, grid, has_kernel, needs_cuda, refusal
from op_cases import draw_routing
from registry import Skip, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import reference

OPS = (
    "route_topk",
    "sort_by_expert",
    "permute",
    "combine",
    "grouped_ffn",
    "grouped_ffn_train",
    "grouped_ffn_combine",
)


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


def arguments_of(op: str, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    case = case_on(device, num_tokens=20, dtype=dtype)
    routing = draw_routing("random", 20, 5, 2).to(device)
    gate = torch.randn(5, 40, device=device).to(dtype)
    rows = torch.randn(40, 40, device=device).to(dtype)
    arguments: dict[str, tuple[object, ...]] = {
        "route_topk": (case.x, gate, 2),
        "sort_by_expert": (routing, 5),
        "permute": (case.x, case.row_token, case.token_rows),
        "combine": (rows, case.weights, case.token_rows),
        "grouped_ffn": (*case.arguments, case.token_rows),
        "grouped_ffn_train": (*case.arguments, case.token_rows),
        "grouped_ffn_combine": case.fused_arguments,
    }
    return arguments[op]


@check(*grid(op=OPS))
def op_has_a_kernel_on_the_device(device: torch.device, op: str) -> None:
    assert has_kernel(device, op), f"{op} has no kernel for {device.type}"


@check(*grid(op=OPS, dtype=HALVES))
def opcheck(device: torch.device, op: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(op, device, dtype)
    if op not in ("sort_by_expert", "grouped_ffn_combine"):
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                argument.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.sparse_unified, op).default, arguments)


@check(
    *grid(dtype=HALVES, backend=("aot_eager",)),
    {"dtype": torch.bfloat16, "backend": "inductor"},
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


@check(*grid(dtype=HALVES))
def graph_replays_with_other_routing(device: torch.device, dtype: torch.dtype) -> None:
    needs_cuda(device)
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


@check(*grid(dtype=HALVES))
def graph_replays_a_training_step(device: torch.device, dtype: torch.dtype) -> None:
    needs_cuda(device)
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


@check()
def ops_run_on_the_stream_of_the_caller(device: torch.device) -> None:
    """On a stream that is busy, tokens that are written last must be those that are read."""
    needs_cuda(device)
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


@check()
def ops_do_not_wait_for_the_device(device: torch.device) -> None:
    """Forward and backward return while the device still sleeps."""
    needs_cuda(device)
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


@check()
def ops_run_on_the_device_of_their_tensors(device: torch.device) -> None:
    needs_cuda(device)
    if torch.cuda.device_count() < 2:
        raise Skip("needs two CUDA devices")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    case = case_on(other, dtype=torch.bfloat16)
    before = torch.cuda.current_device()
    out = ops.grouped_ffn_combine(*case.fused_arguments)
    assert out.device == other
    assert torch.cuda.current_device() == before
    wide = [t.float() if t.is_floating_point() else t for t in case.arguments]
    rows = reference.grouped_ffn(*wide)
    expected = reference.combine(rows, case.weights, case.token_rows)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@check()
def tensors_on_two_devices_are_refused(device: torch.device) -> None:
    needs_cuda(device)
    case = case_on(device, dtype=torch.bfloat16)
    for call in (
        lambda: ops.permute(case.x, case.row_token.cpu(), case.token_rows),
        lambda: ops.grouped_ffn(case.x, *case.arguments[1:3], *(w.cpu() for w in case.experts)),
        lambda: ops.combine(case.x.cpu(), None, case.token_rows),
    ):
        assert refusal(call)
