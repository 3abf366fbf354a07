# SPDX-License-Identifier: Apache-2.0
"""SparseMoE: the official block's semantics, both routers of und blocks, and what follows."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from moe_cases import double_state, golden_block, official_block, random_block, relative_error
from torch import Tensor
from torch.autograd import forward_ad

from sparse_unified.nn import SparseMoE
from sparse_unified.nn import sparse_moe as sparse_moe_module
from sparse_unified.ops import backend


@pytest.mark.parametrize("name", ["moe_block", "moe_block_shared"])
def test_recorded_blocks_are_reproduced(name: str) -> None:
    moe, tensors = golden_block(name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, router_logits = moe.train(grad)(tensors["input"])
        assert relative_error(y, tensors["output"]) < 1e-5
        assert relative_error(router_logits, tensors["router_logits"]) < 1e-5


@pytest.mark.parametrize(("num_shared_experts", "top_k"), [(0, 1), (1, 3), (2, 4)])
def test_block_equals_the_official_semantics(num_shared_experts: int, top_k: int) -> None:
    moe = random_block(24, 120, 4, top_k, num_shared_experts)
    x = torch.randn(21, 24, requires_grad=True)
    grads = torch.randn(21, 24), torch.randn(21, 4)
    y, logits = moe(x)
    torch.autograd.backward((y, logits), grads)

    state = {key: value.requires_grad_() for key, value in double_state(moe).items()}
    x64 = x.detach().double().requires_grad_()
    y64, logits64 = official_block(x64, state, top_k)
    torch.autograd.backward((y64, logits64), tuple(grad.double() for grad in grads))
    assert relative_error(y.detach(), y64.detach()) < 1e-6
    assert relative_error(logits.detach(), logits64.detach()) < 1e-6
    assert relative_error(x.grad, x64.grad) < 1e-5
    # The fused weights' gradients under official names.
    named = copy.deepcopy(moe)
    with torch.no_grad():
        for own, weight in zip(named.parameters(), moe.parameters(), strict=True):
            own.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    for key, gradient in named.state_dict().items():
        if state[key].grad is not None:
            assert relative_error(gradient, state[key].grad) < 1e-5, key


def test_a_fresh_block_weighs_every_selected_expert_by_one() -> None:
    moe, x = SparseMoE(24, 96, 4, 2), torch.randn(5, 24)
    # A pure tie goes to the first two experts.
    gate, up, down = moe.gate_proj[:48], moe.up_proj[:48], moe.down_proj[:, :48]
    half = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    assert relative_error(moe(x)[0].detach(), (half @ down.t()).detach()) < 1e-6


def test_leading_dimensions_are_tokens_none_too_and_logits_can_be_left_out() -> None:
    for moe in (random_block(), random_block(24, 60, 4, 2, 1)):
        x = torch.randn(2, 3, 5, 24)
        y, logits = moe(x)
        assert y.shape == x.shape
        assert (logits.shape, logits.dtype) == ((30, moe.num_experts), torch.float32)
        assert torch.equal(y.view(30, 24), moe(x.view(30, 24))[0])
        assert torch.equal(moe(x.transpose(0, 2))[0], moe(x.transpose(0, 2).contiguous())[0])
        empty, no_logits = moe(x[:0])
        assert (empty.shape, no_logits.shape) == ((0, 3, 5, 24), (0, moe.num_experts))
        empty.sum().backward()
        assert moe.gate_proj.grad.abs().max() == 0
        moe.return_router_logits = False
        assert torch.equal(moe(x), y)


def test_frozen_experts_still_pass_the_gradient_on() -> None:
    moe, x = random_block(), torch.randn(30, 24, requires_grad=True)
    moe(x)[0].square().sum().backward()
    expected = x.grad, moe.gate.weight.grad
    x.grad = None
    moe.zero_grad()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(moe, name).requires_grad_(False)
    moe(x)[0].square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(moe.gate.weight.grad, expected[1])
    assert moe.gate_proj.grad is None


# Backends, modes, devices


def test_autocast_keeps_the_dtype_of_the_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        moe = random_block(dtype=dtype)
        x = torch.randn(20, 24)
        expected = moe(x.to(dtype))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, logits = moe(x)
        assert torch.equal(y, expected)
        assert logits.dtype == torch.float32
    shared = random_block(24, 60, 4, 2, 1)
    expected = shared(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(shared(x)[0], expected) < 1e-2
        shared(x)[0].sum().backward()
    assert shared.gate_proj.grad.isfinite().all()


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_composed_ops_equal_the_kernels(
    num_shared_experts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moe = random_block(24, 60, 4, 2, num_shared_experts)
    x = torch.randn(50, 24)
    expected = moe(x)
    monkeypatch.setattr(backend, "choose", lambda *_, **__: "torch: no kernel in this test")
    monkeypatch.setattr(sparse_moe_module, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="sparse_unified"):
        y, logits = moe(x)
        moe(x)
    assert len(caplog.records) == 1
    assert moe.active_backend.startswith("torch: ")
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-6)
    moe.strict = True
    with pytest.raises(RuntimeError, match="strict must be met by a kernel, got torch: no kernel"):
        moe(x)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 18944, 24, 4), "num_experts must divide .*got 24; .*counts do: 2, 4, 8, 16, 32, 37"),
        ((8, 64, 4, 5), "top_k must be an integer from 1 to num_experts = 4, got 5"),
        ((8, 64, 4, 0), "top_k must be an integer from 1 to num_experts = 4, got 0"),
        ((8, 64, 4, 2.0), "top_k must be an integer from 1 to num_experts = 4, got 2.0"),
        ((0, 64, 4, 2), "hidden_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMoE(*arguments, device="meta")


def test_bad_inputs_are_named() -> None:
    moe = random_block()
    with pytest.raises(ValueError, match=r"ends in hidden_size = 24, got shape \[3, 25\]"):
        moe(torch.randn(3, 25))
    for x in ([1.0] * 24, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="x must be a tensor that ends in hidden_size = 24"):
            moe(x)
    with pytest.raises(RuntimeError, match="must have dtype bfloat16, got float32"):
        moe(torch.randn(3, 24).bfloat16())
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16, got float64"):
        random_block(dtype=torch.float64)(torch.randn(3, 24).double())
    assert "'meta'" in SparseMoE(8, 16, 2, 1, device="meta").active_backend
    with pytest.raises(RuntimeError, match="must be on one device, got cpu and meta"):
        moe(torch.empty(3, 24, device="meta"))


# Derivatives that the kernels do not have


def test_forward_mode_derivatives_are_refused() -> None:
    moe = random_block(24, 60, 4, 2, 1).requires_grad_(False)
    x = torch.randn(5, 24)
    with pytest.raises(RuntimeError, match="route_topk: arguments must have no tangent"):
        torch.func.jvp(lambda z: moe(z)[0], (x,), (x,))
    with forward_ad.dual_level():
        moe(x)  # nothing has a tangent
        with pytest.raises(RuntimeError, match="must have no tangent"):
            moe(forward_ad.make_dual(x, x))


# Und blocks: text tokens go by `gate`, ViT tokens by `gate_img`

TEXT, VIT = torch.tensor([0, 7, 3, 5, 11]), torch.tensor([1, 2, 9, 4])  # 6, 8, 10 in neither

CASES = {
    "no indices": (None, None),
    "text alone": (torch.arange(12), None),
    "vit alone": (None, torch.arange(12)),
    "some vit, no text given": (None, VIT),
    "both, some tokens in neither": (TEXT, VIT),
    "no text tokens": (TEXT[:0], torch.arange(12)),
    "no vit tokens": (torch.arange(12), VIT[:0]),
    "neither": (TEXT[:0], VIT[:0]),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_routed_and_trained_by_their_own_router(case: str) -> None:
    text, vit = CASES[case]
    moe = random_block(24, 60, 4, 2, len(case) % 2, gate_img=True)
    x = torch.randn(12, 24, requires_grad=True)
    y, logits = moe(x, text, vit)
    narrow = (None if indexes is None else indexes.int() for indexes in (text, vit))
    assert torch.equal(moe(x, *narrow)[0], y)
    grads = torch.randn(12, 24), torch.randn(12, 4)
    torch.autograd.backward((y, logits), grads)
    state = {key: value.requires_grad_() for key, value in double_state(moe).items()}
    x64 = x.detach().double().requires_grad_()
    y64, logits64 = official_block(x64, state, 2, text, vit)
    torch.autograd.backward((y64, logits64), tuple(grad.double() for grad in grads))
    assert relative_error(y.detach(), y64.detach()) < 1e-6
    torch.testing.assert_close(logits.double(), logits64, rtol=1e-5, atol=1e-6)
    pairs = [(x, x64)]
    pairs += [(getattr(moe, n).weight, state[f"{n}.weight"]) for n in ("gate", "gate_img")]
    for own, expected in pairs:
        wanted = torch.zeros(()) if expected.grad is None else expected.grad
        got = torch.zeros(()) if own.grad is None else own.grad
        assert (got.double() - wanted).norm() <= 1e-5 * max(float(wanted.norm()), 1e-3)


def test_gen_blocks_ignore_the_indices() -> None:
    moe = random_block()
    x = torch.randn(12, 24)
    assert torch.equal(moe(x, TEXT, VIT)[0], moe(x)[0])
    assert torch.equal(moe(x, packed_vit_token_indexes=VIT)[0], moe(x)[0])


def test_indices_are_read_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = random_block(24, 60, 5, 2, gate_img=True), torch.randn(12, 24)
    expected = moe(x, TEXT, VIT)[0]

    def wait(self: Tensor) -> None:
        raise AssertionError("the host waited for the device")

    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(Tensor, "aminmax", wait)
    assert torch.equal(moe(x, TEXT, VIT)[0], expected)


@pytest.mark.parametrize("name", ["packed_text_indexes", "packed_vit_token_indexes"])
@pytest.mark.parametrize(
    ("indexes", "error", "got"),
    [
        (torch.ones(12, dtype=torch.bool), TypeError, "be an int64 or int32 tensor, got torch.b"),
        ([0, 1], TypeError, "be an int64 or int32 tensor, got list"),
        (torch.tensor([[0, 1]]), ValueError, r"have shape \[n\], got \[1, 2\]"),
        (torch.tensor([0, 12]), ValueError, "be from 0 to 11, got 12"),
        (torch.tensor([3, -1]), ValueError, "be from 0 to 11, got -1"),
    ],
)
def test_wrong_indices_are_named(
    name: str, indexes: Tensor, error: type[Exception], got: str
) -> None:
    moe = random_block(gate_img=True)
    others = {"packed_text_indexes": TEXT, "packed_vit_token_indexes": VIT} | {name: indexes}
    with pytest.raises(error, match=f"^SparseMoE: {name} must {got}"):
        moe(torch.randn(12, 24), **others)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "most"), [(16, 8, 0.45), (32, 16, 0.30)], ids=["16/8", "32/16"]
)
def test_training_keeps_no_row_of_an_expert(num_experts: int, top_k: int, most: float) -> None:
    """Of BAGEL's proportions: beside tokens, weights and routing only gate and up [R, h], which is
    60 % less than with y [R, D] at 16/8, 75 % at 32/16, and with the tokens 56 % and 72 %."""
    hidden_size, width, num_tokens = 224, 1184, 64
    block = random_block(hidden_size, width, num_experts, top_k)
    x = torch.randn(num_tokens, hidden_size, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        block(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    sizes = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in own]
    num_rows, element = num_tokens * top_k, x.element_size()
    rows = num_rows * hidden_size * element
    assert all(size < rows for size in sizes)
    activations = 2 * num_rows * (width // num_experts) * element
    routing = num_tokens * (num_experts + 5 * top_k) * 4 + 4 * (num_experts + 1)
    assert sum(sizes) <= x.nbytes + activations + routing
    assert sum(sizes) <= most * (sum(sizes) + rows)
