# SPDX-License-Identifier: Apache-2.0
"""Peers compute the sparse FFN, are found out when they do not, and never end a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_unified.bench.cases import CASES, Case
from sparse_unified.bench.check import (
    WrongResultError,
    check_backward,
    check_forward,
    expert_weights,
    reference,
)
from sparse_unified.bench.measure import Roof, Session, WallTimer
from sparse_unified.bench.peers import PEERS, Provider, Setting, draw_weights
from sparse_unified.bench.peers.base import missing_package, needs_cuda, needs_dtype
from sparse_unified.bench.peers.packages import aligned_layout
from sparse_unified.bench.suites import block_suite
from sparse_unified.ops import reference as op_reference

CASE = Case(name="small", tokens=67, hidden_size=48, intermediate_size=224, num_experts=7, top_k=3)
CPU = torch.device("cpu")
ON_CPU = (
    "dense",
    "dense_half",
    "dense_onednn",
    "dense_ours",
    "expert_loop",
    "grouped_mm",
    "transformers_grouped_mm",
    "transformers_batched_mm",
    "transformers_sparse_unified",
    "sparse_unified",
)
ELSEWHERE = ("vllm", "deepgemm", "sonicmoe")


def setting(dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(case=CASE, dtype=dtype, device=CPU)


def build(name: str, dtype: torch.dtype = torch.float32) -> Provider:
    peer = PEERS[name]
    assert peer.unavailable(setting(dtype)) is None
    return peer.build(setting(dtype), draw_weights(CASE, dtype))


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(CASE.tokens, CASE.hidden_size).to(dtype)


def test_reference_is_the_block_of_the_ops() -> None:
    weights = draw_weights(CASE, torch.float32)
    x = tokens()
    logits, topk_logits, topk_idx = op_reference.route_topk(x, weights.gate, CASE.top_k)
    by_expert = expert_weights(1 + topk_logits, topk_idx, CASE.num_experts)
    expected, _ = op_reference.sparse_ffn(
        x, weights.gate, CASE.top_k, weights.gate_proj, weights.up_proj, weights.down_proj
    )
    torch.testing.assert_close(reference(x, by_expert, weights), expected, rtol=1e-4, atol=1e-5)
    assert 0.5 < logits.std() < 2
    assert 0.2 < expected.std() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_CPU)
def test_peer_computes_the_reference(name: str, dtype: torch.dtype) -> None:
    if name == "dense_onednn" and (reason := PEERS[name].unavailable(setting(dtype))):
        pytest.skip(reason)
    provider, x = build(name, dtype), tokens(dtype)
    weights = draw_weights(CASE, dtype)
    check_forward(provider, x, CASE, weights)
    if PEERS[name].trains:
        check_backward(provider, x, torch.randn_like(x), CASE, weights)


def test_compiled_dense_computes_the_reference() -> None:
    check_forward(build("dense_compile"), tokens(), CASE, draw_weights(CASE, torch.float32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: torch.cat((y[:5], y[6:7], y[6:])), "output is off"),  # one token is another
        (lambda y: y * 1.1, "output is off"),
        (lambda y: y.index_fill(0, torch.tensor([66]), torch.nan), "output is off by nan"),
        (lambda y: y[:-1], "output is .66, 48."),
        (lambda y: y.double(), "torch.float64"),
    ],
)
def test_a_wrong_output_is_found(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    provider = build("grouped_mm")
    run = provider.forward
    provider.forward = lambda x: spoil(run(x))  # type: ignore[method-assign]
    with pytest.raises(WrongResultError, match=message):
        check_forward(provider, tokens(), CASE, draw_weights(CASE, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_expert_row_is_found(dtype: torch.dtype) -> None:
    provider = build("grouped_mm", dtype)
    run = provider.run

    def losing(x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        weights = weights.clone()
        weights[33, 2] = 0
        return run(x, weights, topk_idx)

    provider.run = losing
    with pytest.raises(WrongResultError, match="output is off"):
        check_forward(provider, tokens(dtype), CASE, draw_weights(CASE, dtype))


def test_a_gradient_that_passes_by_the_router_is_found() -> None:
    provider = build("grouped_mm")
    run = provider.run
    provider.run = lambda x, weights, topk_idx: run(x, weights.detach(), topk_idx)
    x = tokens()
    with pytest.raises(WrongResultError, match="gradient of the tokens"):
        check_backward(provider, x, x, CASE, draw_weights(CASE, torch.float32))


def test_wrong_and_absent_peers_are_listed_and_the_others_measured() -> None:
    class Wrong(type(build("dense"))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    dense = PEERS["dense"]
    peers = {
        "dense": dense,
        "wrong": replace(dense, name="wrong", build=Wrong),
        "absent": replace(dense, name="absent", unavailable=lambda _: "not installed"),
        "forward_only": replace(dense, name="forward_only", trains=False),
        "sparse_unified": PEERS["sparse_unified"],
    }
    suite = block_suite(CASE, torch.float32, "fwd_bwd", CPU, peers=peers)
    roof = Roof(tflops=1.0, gbps=10.0)
    session = Session(device=CPU, timer=WallTimer(), roof=roof, repeats=1)
    measured = session.measure(suite.subject, suite.candidates)
    assert [r.provider for r in measured.records] == ["dense", "sparse_unified"]
    reasons = {m.provider: m.reason for m in measured.missing}
    assert reasons["wrong"].startswith("WrongResultError: output is off")
    assert reasons["absent"] == "not installed"
    assert reasons["forward_only"] == "has no backward"


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_experts_get_no_gradient(frozen: bool) -> None:
    direction = "fwd_bwd_frozen" if frozen else "fwd_bwd"
    built: list[Provider] = []
    ours = PEERS["sparse_unified"]
    peer = replace(ours, build=lambda s, w: built.append(ours.build(s, w)) or built[-1])
    suite = block_suite(CASE, torch.float32, direction, CPU, peers={"ours": peer})
    suite.candidates["ours"].build()
    learns = {name for name, p in built[0].named_parameters() if p.requires_grad}
    assert ("block.up_proj" in learns) is not frozen
    assert "block.gate.weight" in learns


@pytest.mark.parametrize("name", ELSEWHERE)
def test_peers_of_other_devices_say_so(name: str) -> None:
    reason = PEERS[name].unavailable(setting())
    assert reason is not None
    assert "CUDA" in reason


def test_batched_weights_that_fit_nowhere_are_refused() -> None:
    asked = Setting(case=CASES["bagel-16to8-T4096"], dtype=torch.bfloat16, device=CPU)
    reason = PEERS["transformers_batched_mm"].unavailable(asked)
    assert reason is not None
    assert reason.startswith("would gather 777 GiB")


def test_reasons_name_what_is_missing() -> None:
    assert missing_package("torch", "torch") is None
    assert missing_package("no_such_module", "no-such-thing") == "no-such-thing is not installed"
    assert needs_cuda(setting()) == "needs CUDA, got cpu"
    assert needs_dtype(setting()) == "takes bfloat16 or float16, got float32"
    assert needs_dtype(setting(torch.float16), torch.bfloat16) == "takes bfloat16, got float16"
    assert needs_dtype(setting(torch.bfloat16)) is None


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("kind", ["random", "one", "gaps"])
def test_aligned_rows_belong_to_their_expert(alignment: int, kind: str) -> None:
    num_experts = 5
    topk_idx = torch.randint(num_experts, (37, 2))
    if kind != "random":
        topk_idx = torch.full_like(topk_idx, 3) if kind == "one" else 2 * (topk_idx // 2)
    row_of_slot, owner = aligned_layout(topk_idx, num_experts, alignment)
    flat = topk_idx.reshape(-1)
    assert row_of_slot.unique().numel() == flat.numel()
    assert torch.equal(owner[row_of_slot].long(), flat)
    assert owner.dtype == torch.int32
    assert owner.numel() % alignment == 0
    for expert in flat.unique():
        assert (owner == expert).nonzero()[0].item() % alignment == 0
        # Rows of an expert are as many tiles as it needs.
        tiles = -(-(flat == expert).sum().item() // alignment)
        assert (owner == expert).sum().item() == tiles * alignment
