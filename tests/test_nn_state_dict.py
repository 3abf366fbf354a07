# SPDX-License-Identifier: Apache-2.0
"""SparseMoE's state dict: official per-expert keys, strict both ways, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import random_block
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparse_unified.nn import SparseMoE


def expected_shapes(moe: SparseMoE) -> dict[str, list[int]]:
    d, h, s = moe.hidden_size, moe.layout.expert_width, moe.layout.shared_width
    shapes = {"gate.weight": [moe.num_experts, d], "gate_shared.weight": [1, d]}
    if moe.gate_img is not None:
        shapes["gate_img.weight"] = [moe.num_experts, d]
    owners = {f"experts.{e}": h for e in range(moe.num_experts)}
    if s:
        owners["shared_expert"] = s
    for owner, width in owners.items():
        shapes[f"{owner}.gate_proj.weight"] = [width, d]
        shapes[f"{owner}.up_proj.weight"] = [width, d]
        shapes[f"{owner}.down_proj.weight"] = [d, width]
    return shapes


BLOCKS = [
    {},
    {"intermediate_size": 96, "num_experts": 4, "num_shared_experts": 2},
    {"gate_img": True},
    {"num_experts": 1, "top_k": 1},
]


@pytest.mark.parametrize("fields", BLOCKS)
def test_keys_and_shapes_are_the_official_ones(fields: dict[str, int]) -> None:
    moe = random_block(**fields)
    state = moe.state_dict()
    assert {key: list(t.shape) for key, t in state.items()} == expected_shapes(moe)
    assert {key: list(t.shape) for key, t in moe.official_views().items()} == expected_shapes(moe)


def test_save_load_save_is_byte_stable(tmp_path: Path) -> None:
    for number, fields in enumerate(BLOCKS):
        moe, other = random_block(**fields), random_block(**fields)
        first, second = tmp_path / f"{number}.first", tmp_path / f"{number}.second"
        save_file(moe.state_dict(), first)  # takes copies that are contiguous alone
        other.load_state_dict(load_file(first))
        assert all(map(torch.equal, moe.parameters(), other.parameters()))
        save_file(other.state_dict(), second)
        assert first.read_bytes() == second.read_bytes()


class Layer(nn.Module):
    """Two blocks under names of their own, as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = random_block(gate_img=True)
        self.mlp_moe_gen = random_block()


@pytest.mark.parametrize("prefix", ["", "mlp."])
def test_missing_and_unexpected_keys_are_all_named(prefix: str) -> None:
    module = Layer() if prefix else random_block(gate_img=True)
    state = module.state_dict()
    missing = ["experts.3.up_proj.weight", "experts.0.down_proj.weight", "gate.weight"]
    extra = ["experts.5.up_proj.weight", "shared_expert.up_proj.weight", "gate.bias", "up_proj"]
    for key in missing:
        del state[prefix + key]
    for key in extra:
        state[prefix + key] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    for key in (*missing, *extra):
        assert f'"{prefix}{key}"' in str(caught.value)
    result = module.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {prefix + key for key in missing}
    assert set(result.unexpected_keys) == {prefix + key for key in extra}


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.empty(11, 24), "have shape [12, 24], got [11, 24]"),
        (torch.empty(24, 12).t()[:, :3], "have shape [12, 24], got [12, 3]"),
        ([1.0], "have shape [12, 24], got list"),
        (torch.empty(12, 24, device="meta"), "hold data, got a meta tensor"),
    ],
)
def test_values_that_do_not_fit_are_named_and_nothing_is_written(value: Any, got: str) -> None:
    moe = random_block()
    before = moe.up_proj.detach().clone()
    state = random_block().state_dict() | {"experts.1.up_proj.weight": value}
    for assign in (False, True):
        with pytest.raises(RuntimeError) as caught:
            moe.load_state_dict(state, assign=assign)
        assert f"SparseMoE: experts.1.up_proj.weight must {got}" in str(caught.value)
        assert torch.equal(moe.up_proj, before)


def test_assign_takes_device_and_dtype_of_the_state() -> None:
    source = random_block(dtype=torch.bfloat16)
    moe = SparseMoE(24, 60, 5, 2, device="meta")
    moe.up_proj.requires_grad_(False)
    moe.load_state_dict(source.state_dict(), assign=True)
    assert {p.device.type for p in moe.parameters()} == {"cpu"}
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert moe.gate_proj.requires_grad
    assert not moe.up_proj.requires_grad
    x = torch.randn(6, 24).bfloat16()
    assert torch.equal(moe(x)[0], source(x)[0])


def test_routers_start_at_zero_and_experts_do_not() -> None:
    moe = SparseMoE(24, 60, 5, 2, gate_img=True)
    for router in (moe.gate, moe.gate_shared, moe.gate_img):
        assert router.weight.abs().max() == 0
    for weight in (moe.gate_proj, moe.up_proj, moe.down_proj):
        assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5


def test_state_dict_with_gradients_keeps_the_graph() -> None:
    moe = random_block()
    state: dict[str, Tensor] = moe.state_dict(keep_vars=True)
    state["experts.2.up_proj.weight"].sum().backward()
    assert moe.up_proj.grad[24:36].min() == 1
    assert moe.up_proj.grad.sum() == 12 * 24


def test_pre_hooks_run_before_keys_are_looked_up_and_the_dtype_is_converted() -> None:
    source, moe = random_block(), random_block(dtype=torch.bfloat16)
    state = {key.replace("experts.", "old."): value for key, value in source.state_dict().items()}

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: object) -> None:
        for key in [key for key in state if "old." in key]:
            state[key.replace("old.", "experts.")] = state.pop(key)

    moe.register_load_state_dict_pre_hook(rename)
    moe.load_state_dict(state)
    assert torch.equal(moe.down_proj, source.down_proj.bfloat16())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assigning_a_part_keeps_the_rest_or_zeroes_it(device: str) -> None:
    source = random_block(dtype=torch.bfloat16)
    moe = random_block() if device == "cpu" else SparseMoE(24, 60, 5, 2, device=device)
    rest = moe.up_proj[12:].bfloat16() if device == "cpu" else torch.zeros(48, 24).bfloat16()
    state = {key: value for key, value in source.state_dict().items() if "experts.0." in key}
    moe.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(moe.up_proj[:12], source.up_proj[:12])
    assert torch.equal(moe.up_proj[12:], rest)


# What others hang on a block


class Extra(SparseMoE):
    """A block with state of its own beside buffers and parameters."""

    steps = 0

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "attach",
    [
        lambda moe: moe.register_buffer("usage", torch.rand(4)),
        lambda moe: moe.register_parameter("scale", nn.Parameter(torch.rand(3))),
        lambda moe: setattr(moe, "steps", int(torch.randint(1, 99, ()))),
        lambda moe: prune.random_unstructured(moe, "gate_proj", 0.5),
        lambda moe: nn.utils.weight_norm(moe, "up_proj"),
        lambda moe: parametrize.register_parametrization(moe, "down_proj", Halved()),
    ],
)
def test_what_hangs_on_a_block_is_saved_and_loaded(attach: Any) -> None:
    blocks = [Extra(24, 64, 4, 2).eval() for _ in range(2)]
    for moe in blocks:
        nn.init.normal_(moe.gate.weight)
        attach(moe)
    first, second = blocks
    x = torch.randn(5, 24)
    assert not torch.equal(first(x)[0], second(x)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], second(x)[0])
    assert first.steps == second.steps
    for own, other in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(own, other)
    if "gate_proj" in first._parameters and "up_proj" in first._parameters:
        return
    # Weights that are computed from others are not mistaken for those of the experts.
    before = second(x)[0]
    plain = SparseMoE(24, 64, 4, 2).state_dict()
    experts = {key: value for key, value in plain.items() if "expert" in key}
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict(experts)
    assert set(experts) == set(second.load_state_dict(experts, strict=False).unexpected_keys)
    assert torch.equal(second(x)[0], before)
