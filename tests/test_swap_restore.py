# SPDX-License-Identifier: Apache-2.0
"""restore_ gives the very same model back; hooks and patches go with the FFN both ways."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from swap_models import (
    Model,
    TensorMLP,
    TupleMLP,
    assert_same,
    attach_like_accelerate,
    ffn,
    snapshot,
    tokens,
)
from torch import nn

from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.nn import SparseMoE

HALF = MoEConfig(num_experts=4, top_k=2)
MLPS = pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@MLPS
def test_restore_puts_back_the_very_same_model(mlp: type[TensorMLP]) -> None:
    model = Model(mlp)
    ffn(model, 2).eval()
    ffn(model, 1).gate_proj.requires_grad_(False)
    outputs, before = model(tokens(), tokens()), snapshot(model)
    apply_moe_(model, HALF)
    apply_moe_(model, MoEConfig(num_experts=2, top_k=1, component="und", layers=[0, 1]))
    apply_moe_(model, MoEConfig(num_experts=2, top_k=1, layers="0"))
    model(tokens(), tokens())
    report = restore_(model)
    assert sorted((e.layer, e.component) for e in report.layers) == [
        (0, "gen"), (0, "und"), (1, "gen"), (1, "und"), (2, "gen")
    ]  # fmt: skip
    assert_same(drop_counts(before), drop_counts(snapshot(model)))
    for old, new in zip(outputs, model(tokens(), tokens()), strict=True):
        assert torch.equal(old, new)


def drop_counts(state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the call counters, which the forward passes of the test itself move."""
    return state | {
        "values": {n: v for n, v in state["values"].items() if not n.endswith("act_cnt")}
    }


def test_restore_forgets_what_the_block_has_learned() -> None:
    model = Model()
    before = snapshot(model)
    apply_moe_(model, HALF)
    with torch.no_grad():
        for parameter in ffn(model, 1).parameters():
            parameter.add_(1)
    restore_(model)
    assert_same(before, snapshot(model))


def test_restore_follows_mode_dtype_and_device_of_the_model() -> None:
    model = Model()
    dense = ffn(model, 1)
    apply_moe_(model, HALF)
    model.to(torch.bfloat16).eval()
    assert dense.gate_proj.weight.dtype == torch.float32
    restore_(model)
    assert ffn(model, 1) is dense
    assert dense.gate_proj.weight.dtype == torch.bfloat16
    assert not dense.training
    assert not dense.gate_proj.training


def test_a_round_trip_through_another_dtype_loses_nothing() -> None:
    model = Model()
    before = snapshot(model)["values"]
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    model.language_model.model.layers.to(torch.bfloat16).to(torch.float32)
    restore_(model)
    gen = [name for name in before if "mlp_moe_gen" in name]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in gen)


def test_kept_weights_are_no_part_of_the_model() -> None:
    model = Model()
    dense = ffn(model, 1)
    apply_moe_(model, HALF)
    names = set(model.state_dict())
    assert not any("_replaced" in name for name in names)
    assert "language_model.model.layers.1.mlp_moe_gen.experts.3.up_proj.weight" in names
    assert dense not in set(model.modules())


def test_without_kept_weights_the_dense_module_is_gone() -> None:
    model = Model()
    dense = weakref.ref(ffn(model, 1))
    apply_moe_(model, HALF, keep_dense=False)
    gc.collect()
    assert dense() is None
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"restore_: layer 1 .*must have been kept"):
        restore_(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_is_restored_on_its_own(how: Any) -> None:
    model = Model()
    values = snapshot(model)["values"]
    apply_moe_(model, HALF)
    twin = how(model)
    restore_(twin)
    assert isinstance(ffn(model, 1), SparseMoE)
    assert isinstance(ffn(twin, 1), TensorMLP)
    assert all(torch.equal(values[name], value) for name, value in twin.state_dict().items())
    restore_(model)
    assert ffn(model, 1) is not ffn(twin, 1)


@MLPS
def test_hooks_keep_firing_and_go_back(mlp: type[TensorMLP]) -> None:
    model = Model(mlp)
    fired: list[str] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, *_: Any, **__: Any) -> None:
            fired.append(f"{name} {type(module).__name__}")

        return hook

    dense = ffn(model, 1)
    handle = dense.register_forward_hook(record("after"), with_kwargs=True)
    dense.register_forward_pre_hook(record("before"))
    dense.register_full_backward_hook(record("back"))
    dense.gate_proj.register_forward_hook(record("inner"))
    apply_moe_(model, HALF)
    assert fired == []

    model(tokens(), tokens())[1].sum().backward()
    assert fired == ["before SparseMoE", "after SparseMoE", "back SparseMoE"]
    handle.remove()
    ffn(model, 1).register_forward_hook(record("late"))
    restore_(model)
    fired.clear()
    model(tokens(), tokens())[1].sum().backward()
    name = mlp.__name__
    assert fired == [f"before {name}", "inner Linear", f"late {name}", f"back {name}"]


def test_a_patched_forward_like_accelerates_moves_to_the_block_and_back() -> None:
    model = Model(TupleMLP)
    dense = ffn(model, 1)
    hook = attach_like_accelerate(dense)
    old = dense._old_forward
    apply_moe_(model, HALF)
    block = ffn(model, 1)
    assert block._hf_hook is hook
    assert block.return_router_logits
    hook.calls.clear()
    logits = block(tokens(), packed_text_indexes=None)[1]
    assert hook.calls == ["pre SparseMoE", "post SparseMoE"]
    assert logits.shape == (5, 4)

    twin = copy.deepcopy(model)
    assert ffn(twin, 1).forward.args[0] is ffn(twin, 1)

    restore_(model)
    assert dense._hf_hook is hook
    assert dense._old_forward == old
    assert dense.forward.args[0] is dense
    hook.calls.clear()
    dense(tokens())
    assert hook.calls == ["pre TupleMLP", "post TupleMLP"]


def test_a_patch_taken_off_the_block_does_not_come_back() -> None:
    model = Model()
    dense = ffn(model, 1)
    attach_like_accelerate(dense)
    apply_moe_(model, HALF)
    block = ffn(model, 1)
    block.forward = block._old_forward  # as accelerate's remove_hook_from_module does
    del block._old_forward, block._hf_hook
    restore_(model)
    assert "forward" not in vars(dense)
    assert not hasattr(dense, "_hf_hook")


def test_a_forward_of_ones_own_on_the_instance_stays_with_the_dense_module() -> None:
    model = Model()
    dense = ffn(model, 1)
    plain = dense.forward
    dense.forward = lambda x: plain(x)
    apply_moe_(model, HALF)
    assert "forward" not in vars(ffn(model, 1))
    patched = dense.forward
    restore_(model)
    assert ffn(model, 1).forward is patched
