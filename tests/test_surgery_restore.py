# SPDX-License-Identifier: Apache-2.0
"""restore_ gives the very same model back; hooks and patches go both ways; reports count."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from prune_models import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    WIDTH,
    assert_equal,
    layer_of,
    outputs,
    small_bagel,
)
from surgery_models import (
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

from sparse_unified import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    count_parameters,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.bagel import Bagel
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
    assert sorted((e.layer, e.component) for e in report.parts) == [
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


def everything(model: Bagel) -> None:
    prune_width_(model, PruneWidthConfig(component="und", keep_ratio=0.5, block_size=16))
    prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=2 / 3, block_size=16))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="gen"))
    prune_heads_(model, PruneHeadsConfig(component="und", keep_ratio=0.5))
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.75))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2], part="ffn"))
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1, 3]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[3]))


def test_width_then_experts_then_heads_then_depth_compose_and_are_undone_exactly() -> None:
    model = small_bagel()
    layer_of(model, 1).mlp.train()
    before, dense = snapshot(model), outputs(model)
    everything(model)
    assert isinstance(layer_of(model, 1).mlp_moe_gen, SparseMoE)
    assert layer_of(model, 1).mlp_moe_gen.layout.expert_width == 16
    pruned = outputs(model)
    assert all(torch.isfinite(x).all() for x in pruned)
    report = restore_(model)
    assert_same(before, snapshot(model))
    assert_equal(dense, outputs(model))
    assert len(report.parts) == 2 * 2 * LAYERS
    with pytest.raises(ValueError, match="or parts pruned, got none among the 4 layers"):
        restore_(model)


def test_what_comes_back_follows_dtype_and_mode_of_the_model() -> None:
    model = Model()
    before, dense = snapshot(model)["values"], ffn(model, 1)
    for dtype in (torch.float32, torch.bfloat16):  # there and back loses nothing
        apply_moe_(model, HALF)
        prune_width_(model, PruneWidthConfig(component="und"))
        with torch.no_grad():
            ffn(model, 1).up_proj.add_(1)  # what the block learns is forgotten
        model.to(torch.bfloat16).to(dtype).eval()
        assert dense.gate_proj.weight.dtype == torch.float32
        restore_(model)
        assert ffn(model, 1) is dense
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(m.training for m in (dense, dense.gate_proj))
        for name, value in before.items():
            if "layers.1." in name:
                assert torch.equal(model.state_dict()[name], value.to(dtype))


def test_what_was_taken_out_follows_dtype_and_mode_of_the_model() -> None:
    model = small_bagel()
    layer_of(model, 1).input_layernorm.double()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    restore_(model)
    assert layer_of(model, 1).input_layernorm.weight.dtype == torch.float64
    prune_width_(model, PruneWidthConfig(component="und"))
    model.bfloat16()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    model.train()
    restore_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert "absent" not in " ".join(name for name, _ in model.named_buffers())


def test_kept_and_skipped_modules_are_no_part_of_the_model() -> None:
    model = Model()
    dense = ffn(model, 1)
    apply_moe_(model, HALF)
    assert (
        "language_model.model.layers.1.mlp_moe_gen.experts.3.up_proj.weight" in model.state_dict()
    )
    assert dense not in set(model.modules())
    bagel = small_bagel()
    skip_layers_(bagel, SkipLayersConfig(component="und", layers=[1]))
    left = [key for key in bagel.state_dict() if "language_model.model.layers.1." in key]
    assert left
    assert all("_moe_gen" in key for key in left)


def test_without_kept_modules_there_is_no_way_back() -> None:
    model, bagel = Model(), small_bagel()
    dense = weakref.ref(ffn(model, 1))
    apply_moe_(model, HALF, keep_dense=False)
    gc.collect()
    assert dense() is None
    skip_layers_(bagel, SkipLayersConfig(component="und", layers=[1]), keep_dense=False)
    for each in (model, bagel):
        before = snapshot(each)
        with pytest.raises(RuntimeError, match=r"restore_: layer 1: .*must have been kept"):
            restore_(each)
        assert_same(before, snapshot(each))


def test_a_copy_of_a_pruned_model_is_restored_on_its_own() -> None:
    model = small_bagel()
    dense = outputs(model)
    everything(model)
    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = how(model)
        restore_(twin)
        assert_equal(dense, outputs(twin))
        assert layer_of(model, 1).self_attn.q_proj is None
        assert isinstance(layer_of(model, 1).mlp_moe_gen, SparseMoE)
    restore_(model)
    assert_equal(dense, outputs(model))


def test_many_transforms_on_top_of_each_other_are_copied_and_undone() -> None:
    model = Model(num_layers=2)
    before = snapshot(model)
    for i in range(100):
        prune_width_(model, PruneWidthConfig(layers=[i % 2], keep_ratio=1.0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore_(twin)
        assert all(torch.equal(v, twin.state_dict()[n]) for n, v in before["values"].items())
    restore_(model)
    assert_same(before, snapshot(model))


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


def test_a_patch_taken_off_the_block_does_not_come_back_and_one_of_the_user_stays() -> None:
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
    plain = dense.forward
    dense.forward = patched = lambda x: plain(x)
    apply_moe_(model, HALF)
    assert "forward" not in vars(ffn(model, 1))
    restore_(model)
    assert ffn(model, 1).forward is patched


def test_reports_count_what_is_there() -> None:
    model = small_bagel()
    whole = count_parameters(model)
    decoder = model.language_model.model.layers
    assert sum(c.parameters for c in whole.values()) == sum(p.numel() for p in decoder.parameters())
    assert whole["gen"].bytes == 4 * whole["gen"].parameters
    matrices = sum(
        p.numel() for n, p in decoder.named_parameters() if "moe_gen" in n and p.ndim > 1
    )
    assert whole["gen"].flops_per_token == 2 * matrices
    assert whole["gen"].flops_per_pair == LAYERS * 4 * HEADS * HEAD_DIM
    assert whole["und"].kv_bytes_per_token == LAYERS * 2 * KEY_HEADS * HEAD_DIM * 4

    report = prune_width_(model, PruneWidthConfig(component="gen", layers=[1, 2]))
    before, after = report.before["gen"], report.after["gen"]
    assert (report.before, report.after) == (whole, count_parameters(model))
    lost = 2 * 3 * HIDDEN * WIDTH // 2
    assert before.parameters - after.parameters == lost
    assert before.flops_per_token - after.flops_per_token == 2 * lost
    part = report.parts[0]
    assert (part.before, part.after) == ("96 neurons", "48 neurons")
    assert (part.layer, part.component, part.part) == (1, "gen", "ffn")
    text = str(report)
    assert text.startswith("prune_width_: 2 parts changed (gen ffn 1-2)")
    assert "FLOPs per token" in text

    report = skip_layers_(model, SkipLayersConfig(component="und", layers="all"))
    left = report.after["und"]
    assert left.parameters == left.bytes == left.flops_per_token == 0
    assert {part.after for part in report.parts} == {"skipped"}
    assert len(report.parts) == 2 * LAYERS
