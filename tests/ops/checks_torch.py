# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an op (opcheck, compile, graphs, streams), and of the block and its model."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial

import torch
from awkward import refusal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_unified import ops
from sparse_unified.bagel import Bagel, Execution, SamplingConfig
from sparse_unified.bagel.model import Denoiser
from sparse_unified.bagel.sampler import build_guidance, initial_noise, sample_latents
from sparse_unified.checks import CPU, CUDA, check
from sparse_unified.checks.kernels import block_on, twin
from sparse_unified.checks.problems import (
    ARGUMENTS,
    FLOATS,
    KERNELS,
    OPS,
    Values,
    assert_equal,
    assert_near,
    call,
    grid,
    grouped_problem,
    grouped_values,
    pruned_values,
)
from sparse_unified.mini.model import mini_config
from sparse_unified.ops import backend


def forms_of(op: str, device: torch.device, dtype: torch.dtype, num_tokens: int) -> list[Values]:
    """Arguments of an op, in each form that it takes."""
    draw = pruned_values if op.startswith("pruned") else grouped_values
    values = draw(num_tokens, dtype=dtype, device=device)
    none = torch.tensor([], dtype=torch.int32, device=device)
    changes: dict[str, list[Values]] = {
        "route_topk": [{"top_k": 5}],
        "combine": [{"weights": None}],
        "pruned_ffn": [{"kept_blocks": none}],
        "ffn_importance": [{"token_weights": None}],
    }
    if op.endswith("backward"):
        flags = [name for name in ARGUMENTS[op] if name.startswith("needs_")]
        changes[op] = [{name: False} for name in flags]
    forms = [values, *(values | change for change in changes.get(op, []))]
    return [{name: form[name] for name in ARGUMENTS[op]} for form in forms]


@check(
    *grid(op=tuple(OPS), dtype=(torch.bfloat16,), num_tokens=(20,)),
    *grid(op=tuple(OPS), dtype=(torch.float32,), num_tokens=(0,)),
    on=lambda dtype, **_: (CPU, CUDA) if dtype == torch.bfloat16 else (CPU,),
)
def opcheck(device: torch.device, op: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Schema, fake and autograd as torch wants them; the fake has the kernel's strides too."""
    kernel = getattr(KERNELS, op).default
    forms = [tuple(form.values()) for form in forms_of(op, device, dtype, num_tokens)]
    for arguments in forms:
        torch.library.opcheck(kernel, arguments)
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        real, fake = (
            r if isinstance(r, tuple) else (r,) for r in (kernel(*arguments), kernel(*meta))
        )
        for own, other in zip(real, fake, strict=True):
            assert other.device.type == "meta"
            facts = [(t.shape, t.dtype, t.stride()) for t in (own, other)]
            assert facts[0] == facts[1], f"{op}: {facts}"
    if OPS[op] and num_tokens:
        for argument in forms[0]:
            if isinstance(argument, Tensor) and argument.is_floating_point():
                argument.requires_grad_()
        torch.library.opcheck(kernel, forms[0])


@check(
    *grid(op=("route_topk", "grouped_ffn_combine", "pruned_ffn"), has_backward=(True,)),
    *grid(op=("combine", "grouped_ffn", "ffn_importance"), has_backward=(False,)),
    on=(CPU,),
)
def a_missing_or_second_derivative_is_refused_and_not_zero(
    device: torch.device, op: str, has_backward: bool
) -> None:
    arguments = list(forms_of(op, device, torch.float32, 6)[0].values())
    leaf = arguments[0].requires_grad_()
    found = getattr(ops, op)(*arguments)
    y = found[0] if isinstance(found, tuple) else found
    if not has_backward:
        assert f"{op}: arguments must not need a gradient" in refusal(lambda: y.sum().backward())
        return
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    wanted = f"{op}_backward: arguments must not need a gradient"
    assert wanted in refusal(lambda: torch.autograd.grad(first.sum(), leaf))


def all_ops(x: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """All ops in a row; sums so that every output takes part in the gradient."""
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, 2)
    expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, gate.shape[0])
    arguments = (x, topk_logits, row_token, token_rows, expert_offsets, *weights)
    out = ops.grouped_ffn_combine(*arguments, 1.0)
    out = out + ops.grouped_ffn_combine(*arguments, recompute=True)
    kept = torch.tensor([1, 0], dtype=torch.int32)
    rows = ops.permute(x, row_token, token_rows).mean()
    return out + rows + logits.mean() + ops.pruned_ffn(x, kept, *weights, 16)


@check(*grid(backend=("aot_eager", "inductor")), on=(CPU,))
def all_ops_compile_as_one_graph(device: torch.device, backend: str) -> None:
    """For every number of tokens, with their gradients, which take inductor 10 s."""
    torch._dynamo.reset()
    values = grouped_values(19, 24, 4, 16, 2)
    leaves = [values[name].requires_grad_() for name in ("gate", *FLOATS[1:])]

    def run(x: Tensor, *leaves: Tensor) -> Tensor:
        out = all_ops(x, *leaves)
        if backend == "inductor":
            rows = call("grouped_ffn", values | {"x": x})
            out = (
                out
                + ops.combine(rows, None, values["token_rows"])
                + ops.ffn_importance(x, *leaves[1:3], 0.1)[0].mean()
            )
        return out

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=backend != "inductor")
    for num_tokens in (19,) if backend == "inductor" else (19, 8, 33):
        x = torch.randn(num_tokens, 24)
        if backend == "inductor":
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, *leaves), run(x, *leaves))
            continue
        found = []
        for function in (compiled, run):
            out = function(x.requires_grad_(), *leaves)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, *leaves))))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@check()
def a_thread_may_begin_with_a_backward_pass(device: torch.device) -> None:
    """Nothing that this thread runs before has bound it to the device."""
    problem = grouped_problem(150, 64, 3, 48, dtype=torch.bfloat16, device=device)
    x, *others = problem.leaves
    x.requires_grad_()
    grad = problem.values["grad_y"]
    found: list[Tensor] = []

    def run() -> None:
        y = problem.run(x, *others)
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, x, grad)))
        thread.start()
        thread.join()

    run()
    run()  # the allocator has what it needs, and makes no call
    assert_equal("gradient", found[1], found[0])


# The block, beside the CPU and alone


@check(on=(CUDA,))
def block_says_what_runs_it(device: torch.device) -> None:
    block = block_on(device, torch.bfloat16, strict=True)
    assert block.active_backend == (
        backend.GROUPED_MM if backend.prefers_grouped_mm(device) else backend.CUDA
    )
    for dtype, width in ((torch.float32, 48), (torch.bfloat16, 12)):
        block = block_on(device, dtype, intermediate_size=8 * width)
        assert block.active_backend.startswith("torch: "), block.active_backend
        x = torch.randn(37, 64, device=device).to(dtype)
        assert_near("fallback", block(x)[0], twin(block)(x.float().cpu())[0], dtype)
        block.strict = True
        assert "strict" in refusal(partial(block, x))


# The denoising step

KINDS = ("dense", "sparse")
GRID = (2, 3)
PROMPTS = ([[21, 30]], [[33, 40, 41, 42]])


@torch.no_grad()
def model_on(device: torch.device, kind: str) -> Bagel:
    """A small model in bf16, whose middle generation FFNs may be sparse."""
    config = mini_config()
    if kind == "sparse":
        llm = config.llm.with_experts("gen", range(1, 3), num_experts=16, top_k=8)
        config = replace(config, llm=llm)
    model = Bagel(config, device=device, dtype=torch.bfloat16)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=math.prod(weight.shape[1:]) ** -0.5)
    return model


def draw(model: Bagel, prompt: list[list[int]], execution: Execution | None = None) -> Tensor:
    """Denoises one image with guidance on in some of the steps."""
    noise = [initial_noise(GRID[0] * GRID[1], model.config.token_channels, 0)]
    config = SamplingConfig(num_timesteps=9)
    guidance = build_guidance(model, prompt)
    return sample_latents(model, guidance, noise, [GRID], config, execution=execution)[0]


@check(*grid(kind=KINDS), on=(CUDA,))
def step_waits_for_nothing(device: torch.device, kind: str) -> None:
    """A denoising step in two branches."""
    model = model_on(device, kind)
    [guidance] = build_guidance(model, PROMPTS[0])
    denoiser = Denoiser(model, [GRID], [[guidance.full, guidance.without_text]])
    tokens = [initial_noise(GRID[0] * GRID[1], model.config.token_channels, 0).to(device)]
    time = torch.full((1,), 0.7, device=device)
    expected = denoiser(tokens, time)[0]  # loads what is loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = denoiser(tokens, time)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal("velocity", out, expected)


@check(
    *grid(kind=KINDS, graphs=(True,), how=("replayed",)),
    *grid(kind=KINDS, graphs=(False, True), how=("compiled",)),
    on=(CUDA,),
)
def steps_draw_the_image_of_plain_ones(
    device: torch.device, kind: str, graphs: bool, how: str
) -> None:
    """Replayed from graphs bit for bit; compiled nearly."""
    torch.compiler.reset()
    model = model_on(device, kind)
    execution = Execution(compile=how == "compiled", cuda_graphs=graphs)
    for prompt in PROMPTS:
        plain, other = draw(model, prompt), draw(model, prompt, execution)
        if how == "replayed":
            assert_equal("image", other, plain)
        error = float((other - plain).norm() / plain.norm())
        # The compiler rounds to bf16 at other places; a token may then take another expert.
        assert error < 0.1, f"the image is off by {error:.2g}, allowed 0.1"
