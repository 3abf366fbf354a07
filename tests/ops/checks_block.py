# SPDX-License-Identifier: Apache-2.0
"""SparseMoE and the denoising step of a small model on the device, beside the CPU and alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from checks_torch import block_on
from problems import DTYPES, assert_equal, grid, refusal, with_kernel
from registry import CUDA, check
from torch import Tensor

from sparse_unified.bagel import Bagel, Execution, SamplingConfig
from sparse_unified.bagel.model import Denoiser
from sparse_unified.bagel.sampler import build_guidance, initial_noise, sample_latents
from sparse_unified.mini.model import MiniTask, mini_config
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import backend


def twin(block: SparseMoE) -> SparseMoE:
    """The same block on the CPU in fp32, where anything may run it."""
    other = copy.deepcopy(block).to("cpu", torch.float32)
    other.strict = False
    return other


def assert_near(name: str, out: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    size = exact.double().norm().cpu()
    error, allowed = (out.double().cpu() - exact.double().cpu()).norm(), torch.finfo(dtype).eps
    assert error <= 4 * allowed * size, f"{name} is off by {error:.2g} of {size:.2g}"


@check(
    *grid(dtype=DTYPES, shared=(0, 1), gate_img=(False, True), num_tokens=(61,)),
    *grid(dtype=DTYPES, shared=(0,), gate_img=(False,), num_tokens=(0, 300)),
    on=with_kernel,
)
def block_is_that_of_the_cpu(
    device: torch.device, dtype: torch.dtype, shared: int, gate_img: bool, num_tokens: int
) -> None:
    """Outputs and gradients beside torch ops in fp32; integers route, so that no choice flips."""
    block = block_on(
        device,
        dtype,
        intermediate_size=48 * (7 + shared),
        num_experts=7,
        num_shared_experts=shared,
        gate_img=gate_img,
        strict=True,
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
    y.backward(grad)
    expected.backward(grad.float().cpu())
    assert x.grad is not None
    assert wide.grad is not None
    assert_near("gradient of x", x.grad, wide.grad, dtype)
    for (name, parameter), (_, other) in zip(
        block.named_parameters(), exact.named_parameters(), strict=True
    ):
        if other.grad is None:
            assert parameter.grad is None, f"{name} got a gradient"
            continue
        assert parameter.grad is not None, f"{name} got no gradient"
        assert_near(f"gradient of {name}", parameter.grad, other.grad, dtype)


@check(on=(CUDA,))
def block_says_what_runs_it(device: torch.device) -> None:
    assert block_on(device, torch.bfloat16, strict=True).active_backend == "cuda"
    for dtype, width in ((torch.float32, 48), (torch.bfloat16, 12)):
        block = block_on(device, dtype, intermediate_size=8 * width)
        assert block.active_backend.startswith("torch: "), block.active_backend
        x = torch.randn(37, 64, device=device).to(dtype)
        assert_near("fallback", block(x)[0], twin(block)(x.float().cpu())[0], dtype)
        block.strict = True
        assert "strict" in refusal(partial(block, x))


@check(
    *grid(dtype=DTYPES, num_tokens=(40, 300, 4096)),
    on=with_kernel,
    small=lambda num_tokens, **_: num_tokens < 1000,
)
def splitting_the_batch_changes_nothing(
    device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    block = block_on(device, dtype)
    x = torch.randn(num_tokens, 64, device=device).to(dtype)
    with torch.inference_mode():
        whole, logits = block(x)
        parts = [block(part) for part in x.split((1, 17, num_tokens - 18))]
    assert_equal("logits", torch.cat([part[1] for part in parts]), logits)
    # Another number of rows may take another tile: a rounding, no more.
    assert_near("y", torch.cat([part[0] for part in parts]), whole, dtype)


# The denoising step

KINDS = ("dense", "sparse")
GRID = (2, 3)
PROMPTS = ([[21, 30]], [[33, 40, 41, 42]])


@torch.no_grad()
def model_on(device: torch.device, kind: str) -> Bagel:
    """A small model in bf16, whose middle generation FFNs may be sparse."""
    config = mini_config(MiniTask.DIGITS)
    if kind == "sparse":
        llm = config.llm.with_experts("gen", range(1, 5), num_experts=16, top_k=8)
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
