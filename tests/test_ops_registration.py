# SPDX-License-Identifier: Apache-2.0
"""What torch is told about each op: schema, fake, autograd, and how it compiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_cases import ffn_case
from torch import Tensor

from sparse_unified import ops

LIBRARY = Path(__file__).parent.parent / "csrc" / "bindings" / "library.cpp"

# Callers, saved graphs and other languages rely on these. A new optional argument with a default
# goes to the end of a pinned schema; anything else needs a new op.
SCHEMAS = {
    "route_topk": "(Tensor x, Tensor gate, int top_k) -> (Tensor, Tensor, Tensor)",
    "route_topk_backward": "(Tensor grad_logits, Tensor grad_topk_logits, Tensor topk_idx, "
    "Tensor x, Tensor gate, bool needs_x, bool needs_gate) -> (Tensor, Tensor)",
    "sort_by_expert": "(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor)",
    "permute": "(Tensor x, Tensor row_token, Tensor token_rows) -> Tensor",
    "combine": "(Tensor y, Tensor? weights, Tensor token_rows) -> Tensor",
    "combine_backward": "(Tensor grad_out, Tensor y, Tensor weights, Tensor token_rows, "
    "bool needs_y, bool needs_weights) -> (Tensor, Tensor)",
    "grouped_ffn": "(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
    "Tensor up_proj, Tensor down_proj, Tensor? token_rows=None) -> Tensor",
    "grouped_ffn_train": "(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
    "Tensor up_proj, Tensor down_proj, Tensor? token_rows=None) -> (Tensor, Tensor, Tensor)",
    "grouped_ffn_combine": "(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
    "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj) -> Tensor",
    "grouped_ffn_backward": "(Tensor grad_y, Tensor x, Tensor row_token, Tensor expert_offsets, "
    "Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, "
    "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "pruned_ffn": "(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
    "Tensor down_proj, int block_size) -> Tensor",
    "pruned_ffn_train": "(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
    "Tensor down_proj, int block_size) -> (Tensor, Tensor, Tensor)",
    "pruned_ffn_backward": "(Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, "
    "Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, int block_size, "
    "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "ffn_importance": "(Tensor x, Tensor gate_proj, Tensor up_proj, float threshold=0., "
    "Tensor? token_weights=None) -> (Tensor, Tensor, Tensor)",
}


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.sparse_unified, name).default


def test_every_registered_op_is_pinned() -> None:
    registered = set(re.findall(r'm\.def\(\s*"(\w+)\(', LIBRARY.read_text()))
    assert registered == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_backward_compatible(name: str) -> None:
    pinned = torch._C.parse_schema(f"sparse_unified::{name}{SCHEMAS[name]}")
    assert overload(name)._schema.is_backward_compatible_with(pinned)


def example_inputs(dtype: torch.dtype, num_tokens: int) -> dict[str, list[tuple[object, ...]]]:
    """Arguments of every op, tensors without requires_grad."""
    case = ffn_case(num_tokens, 12, 5, 6, 2, dtype)
    num_rows = 2 * num_tokens
    x, gate = case.x, torch.randn(5, 12).to(dtype)
    topk_idx = torch.randint(5, (num_tokens, 2), dtype=torch.int32)
    y = torch.randn(num_rows, 12).to(dtype)
    grad_out = torch.randn(num_tokens, 12).to(dtype)
    activations = torch.randn(num_rows, 6).to(dtype), torch.randn(num_rows, 6).to(dtype)
    both = [(True, True), (True, False), (False, True)]
    router_grads = torch.randn(num_tokens, 5), torch.randn(num_tokens, 2)
    wide = ffn_case(num_tokens, 12, 3, 16, 2, dtype)
    kept = torch.tensor([2, 0], dtype=torch.int32)
    pruned = (x, kept, *wide.experts)
    kept_rows = torch.randn(num_tokens, 32).to(dtype), torch.randn(num_tokens, 32).to(dtype)
    return {
        "route_topk": [(x, gate, 2), (x, gate, 5)],
        "route_topk_backward": [(*router_grads, topk_idx, x, gate, *needs) for needs in both],
        "sort_by_expert": [(topk_idx, 5)],
        "permute": [(x, case.row_token, case.token_rows)],
        "combine": [(y, case.weights, case.token_rows), (y, None, case.token_rows)],
        "combine_backward": [
            (grad_out, y, case.weights, case.token_rows, *needs) for needs in both
        ],
        "grouped_ffn": [case.arguments, (*case.arguments, case.token_rows)],
        "grouped_ffn_train": [case.arguments, (*case.arguments, case.token_rows)],
        "grouped_ffn_combine": [case.fused_arguments],
        "grouped_ffn_backward": [(y, *case.arguments, *activations, *needs) for needs in both],
        "pruned_ffn": [(*pruned, 16), (x, kept[:0], *wide.experts, 16)],
        "pruned_ffn_train": [(*pruned, 16)],
        "pruned_ffn_backward": [(grad_out, *pruned, *kept_rows, 16, *needs) for needs in both],
        "ffn_importance": [
            (x, *wide.experts[:2], 0.1),
            (x, *wide.experts[:2], 0.1, torch.rand(num_tokens)),
        ],
    }


DIFFERENTIABLE = (
    "route_topk",
    "permute",
    "combine",
    "grouped_ffn",
    "grouped_ffn_train",
    "pruned_ffn",
    "pruned_ffn_train",
)


def with_grad(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        argument.detach().clone().requires_grad_()
        if isinstance(argument, Tensor) and argument.is_floating_point()
        else argument
        for argument in arguments
    )


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize(("dtype", "num_tokens"), [(torch.bfloat16, 7), (torch.float32, 0)])
def test_opcheck(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    for arguments in example_inputs(dtype, num_tokens)[name]:
        torch.library.opcheck(overload(name), arguments)
        if name in DIFFERENTIABLE and num_tokens:
            torch.library.opcheck(overload(name), with_grad(arguments))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("num_tokens", [0, 7])
def test_fake_has_the_shapes_and_dtypes_of_the_kernel(name: str, num_tokens: int) -> None:
    for arguments in example_inputs(torch.bfloat16, num_tokens)[name]:
        real = overload(name)(*arguments)
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        fake = overload(name)(*meta)
        for own, other in zip(
            real if isinstance(real, tuple) else (real,),
            fake if isinstance(fake, tuple) else (fake,),
            strict=True,
        ):
            assert other.device.type == "meta"
            assert (own.shape, own.dtype, own.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def block(x: Tensor, gate: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """All ops in a row; sums so that every output takes part in the gradient."""
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 2)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, gate.shape[0])
    rows = ops.grouped_ffn(x, row_token, expert_offsets, gate_proj, up_proj, down_proj, token_rows)
    rows = rows + ops.permute(x, row_token, token_rows)
    out = ops.combine(rows, 1 + topk_logits, token_rows) + ops.combine(rows, None, token_rows)
    return out + logits.mean()


def assert_compiles(function: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> None:
    def run(of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = of(*inputs)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    for own, other in zip(run(compiled(function, backend)), run(function), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def block_inputs() -> list[Tensor]:
    case = ffn_case(19, 24, 5, 8, 2)
    tensors = (case.x, torch.randn(5, 24) / 5, *case.experts)
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_all_ops_compile_without_a_graph_break() -> None:
    assert_compiles(block, block_inputs(), "aot_eager")


def test_all_ops_compile_with_inductor() -> None:
    inputs = [t.detach() for t in block_inputs()]  # compiling backward takes 10 s
    torch.testing.assert_close(compiled(block, "inductor")(*inputs), block(*inputs))


@pytest.mark.parametrize("recompute", [False, True])
def test_grouped_ffn_compiles_without_a_graph_break(recompute: bool) -> None:
    case = ffn_case(19, 24, 5, 8, 2)

    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ops.grouped_ffn(
            x, case.row_token, case.expert_offsets, gate, up, down, recompute=recompute
        )

    inputs = [t.detach().clone().requires_grad_() for t in (case.x, *case.experts)]
    assert_compiles(function, inputs, "aot_eager")


def test_grouped_ffn_combine_compiles_without_a_graph_break() -> None:
    case = ffn_case(19, 24, 5, 8, 2)
    function = compiled(ops.grouped_ffn_combine, "aot_eager")
    torch.testing.assert_close(
        function(*case.fused_arguments), ops.grouped_ffn_combine(*case.fused_arguments)
    )


def test_one_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    inputs = block_inputs()
    for num_tokens in (19, 8, 33):
        x = torch.randn(num_tokens, 24, requires_grad=True)
        torch.testing.assert_close(function(x, *inputs[1:]), block(x, *inputs[1:]))
    assert counter.frame_count == 1
