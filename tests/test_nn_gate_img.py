# SPDX-License-Identifier: Apache-2.0
"""Und blocks: text tokens go by `gate`, ViT tokens by `gate_img`."""

from __future__ import annotations

import pytest
import torch
from moe_cases import double_state, official_block, random_block, relative_error
from torch import Tensor

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
