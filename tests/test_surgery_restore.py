# SPDX-License-Identifier: Apache-2.0
"""What is refused or interrupted leaves a model alone; restore_ gives the very same one back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import prune_models as bagel
import pytest
import torch
from prune_models import assert_equal, layer_of, outputs, small_bagel
from refusals import refused
from surgery_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Bare,
    Model,
    TensorMLP,
    TupleMLP,
    assert_same,
    attach_hook,
    drop_counts,
    ffn,
    snapshot,
    tokens,
)
from torch import Tensor, nn

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
from sparse_unified.surgery import exchange, prune, report
from sparse_unified.surgery import ffn as ffn_module

HALF = MoEConfig(num_experts=4, top_k=2)
MLPS = pytest.mark.parametrize("mlp", [TensorMLP, TupleMLP])


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
    refused("or parts pruned, got none among the 4 layers", restore_, model)


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
        refused(r"restore_: layer 1: .*must have been kept", restore_, each, error=RuntimeError)
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


def test_a_patch_is_the_block_s_own_and_one_of_the_user_stays() -> None:
    """What accelerate itself makes of it stands in test_surgery_hosts."""
    model = Model(TupleMLP)
    dense = ffn(model, 1)
    hook = attach_hook(dense)
    apply_moe_(model, HALF)
    twin = copy.deepcopy(model)
    assert ffn(twin, 1).forward.args[0] is ffn(twin, 1)
    assert hook.calls == ["pre TupleMLP", "post TupleMLP"]  # the run that shows what it returns
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
    assert whole["gen"].flops_per_pair == LAYERS * 4 * bagel.HEADS * bagel.HEAD_DIM
    assert whole["und"].kv_bytes_per_token == LAYERS * 8 * bagel.KEY_HEADS * bagel.HEAD_DIM

    report = prune_width_(model, PruneWidthConfig(component="gen", layers=[1, 2]))
    before, after = report.before["gen"], report.after["gen"]
    assert (report.before, report.after) == (whole, count_parameters(model))
    lost = 3 * bagel.HIDDEN * bagel.WIDTH
    assert before.parameters - after.parameters == lost
    assert before.flops_per_token - after.flops_per_token == 2 * lost
    part = report.parts[0]
    assert (part.before, part.after) == ("96 neurons", "48 neurons")
    assert (part.layer, part.component, part.part) == (1, "gen", "ffn")
    assert str(report).startswith("prune_width_: 2 parts changed (gen ffn 1-2)")

    report = skip_layers_(model, SkipLayersConfig(component="und", layers="all"))
    left = report.after["und"]
    assert left.parameters == left.bytes == left.flops_per_token == 0
    assert {part.after for part in report.parts} == {"skipped"}
    assert len(report.parts) == 2 * LAYERS


# What is refused

ONE = MoEConfig(num_experts=4, top_k=2, layers=[0])
AT = r"apply_moe_: layer 2( \(language_model\.model\.layers\.2(\.mlp_moe_gen)?\))?: "


def refuse(model: Any, match: str, config: Any = HALF) -> None:
    before = snapshot(model)
    refused(match, apply_moe_, model, config)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (MoEConfig, {"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        (MoEConfig, {"top_k": 17}, "top_k must be at most num_experts = 16, got 17"),
        (MoEConfig, {"layers": 3}, "layers must be a string or a sequence"),
        (PruneWidthConfig, {"block_size": 8}, "block_size must be 1 or 16 to 128, got 8"),
        (PruneHeadsConfig, {"component": "all"}, "component must be one of und, gen, both"),
        (SkipLayersConfig, {"layers": [1], "part": "mlp"}, "part must be one of"),
    ],
)
def test_configs_are_checked_when_they_are_made(kind: Any, fields: Any, match: str) -> None:
    refused(match, kind, error=(ValueError, TypeError), **fields)


# Models


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Bare(encoder=nn.Linear(2, 2)),
            r"must have decoder layers .*got a Bare \(encoder\)",
        ),
        (lambda: Bare(layers=nn.ModuleList([Bare(mlp=TensorMLP())] * 2)), r"layers: 2 x Bare \(ml"),
        (lambda: Bare(layers=nn.ModuleList()), "; layers: 0 x none"),
        (lambda: Model(num_layers=2), "layers must name at least one of 2 layers"),
    ],
)
def test_models_without_the_layers_are_described(make: Any, match: str) -> None:
    refuse(make(), match)


def test_several_lists_of_layers_are_not_guessed_at() -> None:
    stacks = [nn.ModuleList(Bare(mlp=TensorMLP()) for _ in range(3)) for _ in range(2)]
    refuse(
        Bare(encoder=Bare(blocks=stacks[0]), decoder=Bare(blocks=stacks[1])),
        r"one list of decoder layers, got 2: encoder\.blocks, decoder\.blocks; give the module",
        MoEConfig(num_experts=4, top_k=2, component="und"),
    )


def test_restore_without_a_change() -> None:
    refused("restore_: model must have FFNs replaced by apply_moe_", restore_, Model())
    refused("restore_: model must have decoder layers", restore_, nn.Linear(2, 2))


# FFNs: what happens to that of layer 2, and what is said about it.


class Packed(torch.Tensor):
    """A tensor that stores something else than its values."""


def _offload(layer: Any) -> None:
    attach_hook(layer.mlp_moe_gen.to("meta").gate_proj)


def _infinite(layer: Any) -> None:
    with torch.no_grad():
        layer.mlp_moe_gen.up_proj.weight[3, 1] = float("inf")


def _weight(of: Any) -> Any:
    def change(layer: Any) -> None:
        weight = nn.Parameter(of(torch.zeros(WIDTH, HIDDEN)), requires_grad=False)
        layer.mlp_moe_gen.gate_proj.weight = weight

    return change


class RowParallel(nn.Linear):
    """A linear layer as under tensor parallelism: its result is summed over processes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2  # what the other of two processes would add


def _put(name: str, module: Any) -> Any:
    return lambda layer: setattr(
        layer.mlp_moe_gen if name else layer, name or "mlp_moe_gen", module
    )


SCORES = torch.rand(LAYERS, WIDTH)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_put("", TensorMLP(HIDDEN, 22)), "ExpertLayout: num_experts must divide .*: 2, 11, 22"),
        (_put("", None), r"mlp_moe_gen must be a module of the layer, got a Layer \(mlp"),
        (_put("", Bare(fc1=nn.Linear(2, 2))), r"FFN must be dense, .* got a Bare \(fc1\)"),
        (lambda layer: layer.mlp_moe_gen.register_module("up_proj", nn.Identity()), "up_proj must"),
        (_put("down_proj", RowParallel(WIDTH, HIDDEN, bias=False)), "FFN must compute down_proj"),
        (_put("down_proj", nn.Linear(WIDTH, HIDDEN)), "no parameters but .* got down_proj.b"),
        (_put("down_proj", nn.Linear(25, HIDDEN, bias=False)), r"weights must have shapes .* 25\]"),
        (_weight(Tensor.double), "gate_proj.weight must be a plain tensor .*float64"),
        (_weight(lambda w: w.as_subclass(Packed)), "gate_proj.weight must be a plain .*Packed"),
        (
            lambda layer: setattr(layer.mlp_moe_gen.up_proj, "lora_A", nn.Linear(HIDDEN, 2)),
            r"up_proj must be a linear layer and nothing else, .*lora_A",
        ),
        (lambda layer: layer.mlp_moe_gen.up_proj.bfloat16(), "weights must have .* one dtype"),
        (lambda layer: layer.mlp_moe_gen.up_proj.to("meta"), "weights must have .* one device"),
        (lambda layer: layer.mlp_moe_gen.to("meta"), "scores must be given for weights without"),
        (_offload, "weights must be in memory, got weights offloaded"),
        (_infinite, "magnitude of its weights: scores must be finite, got inf for neuron 3"),
        (_put("forward", lambda x: (x, x, x)), r"forward must return y \[1, 8\] or"),
        (_put("forward", lambda x, y: x), r"forward must run on one token \[1, 8\], got TypeError"),
        (
            lambda layer: apply_moe_(Bare(layers=nn.ModuleList([layer])), ONE),
            "FFN must be dense, .* a SparseMoE",
        ),
    ],
)
def test_ffns_that_are_no_plain_swiglu_are_refused(change: Any, match: str) -> None:
    model = Model()
    change(model.layers[2])
    refuse(model, AT + ".*" + match)


def test_ffns_that_are_shared_are_refused() -> None:
    model = Model()
    model.layers[2].mlp_moe_gen = model.layers[1].mlp_moe_gen
    refuse(model, AT + r"FFN must be its own module, got that of .*layers\.1\.mlp_moe_gen")


@pytest.mark.parametrize(
    ("act", "scale", "dtype"),
    [(nn.GELU(), 1e-3, torch.bfloat16), (nn.GELU(), 30.0, torch.float32), (nn.ReLU(), 1.0, None)],
)
def test_an_activation_other_than_silu(act: nn.Module, scale: float, dtype: Any) -> None:
    model = Model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.layers[2].mlp_moe_gen.act_fn = act
    refuse(model, AT + r"FFN must compute down_proj\(silu\(gate_proj\(x\)\) \* up_proj\(x\)\)")


def test_prunings_with_bad_scores_leave_the_model_alone() -> None:
    """All else is refused by the plan that files share, see test_prune_checkpoint."""
    model = small_bagel()
    before = snapshot(model)
    for run, config, size in (
        (prune_width_, PruneWidthConfig(), bagel.WIDTH),
        (prune_heads_, PruneHeadsConfig(), bagel.KEY_HEADS),
    ):
        match = rf"{run.__name__}: layer 0: scores must have shape \[{size}\], got \[{size + 1}\]"
        refused(match, run, model, config, torch.ones(LAYERS, size + 1))
    assert_same(before, snapshot(model))


def test_orders_that_make_no_sense_are_refused_by_name() -> None:
    model = small_bagel()
    sparse = MoEConfig(num_experts=4, top_k=2, layers=[1])
    apply_moe_(model, sparse)
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))
    wide = PruneWidthConfig(layers=[1], block_size=32)
    for run, config, match in (
        (apply_moe_, sparse, "layer 1 .*FFN must be dense, .*got a SparseMoE"),
        (prune_width_, wide, "gen layer 1: block_size must divide the 24 neurons of an expert"),
        (apply_moe_, MoEConfig(layers=[2]), "layers must have a gen FFN, got 2, which skip it"),
        (
            prune_heads_,
            PruneHeadsConfig(component="both", layers=[2]),
            "layers must have a .*gen attention, got 2, which skip it",
        ),
    ):
        refused(f"{run.__name__}: {match}", run, model, config)  # type: ignore[attr-defined]
    # "all" and "middle" pass over layers that lack it, unless all do.
    und = MoEConfig(num_experts=4, top_k=2, component="und", layers="all")
    assert len(apply_moe_(model, und).parts) == LAYERS
    assert len(prune_heads_(model, PruneHeadsConfig(component="both")).parts) == 2 * 3
    middle = SkipLayersConfig(component="gen", layers="middle")
    skip_layers_(model, middle)
    refused(
        "layers must have a gen block left, got 1, 2, which skip it", skip_layers_, model, middle
    )


def test_attentions_of_models_of_another_make_stay() -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"skip_layers_: layer 1 .*attention must be one that"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers=[1]))
    with pytest.raises(ValueError, match=r"prune_heads_: layer 0 .*weights tell its heads, as in"):
        prune_heads_(model, PruneHeadsConfig())
    assert_same(before, snapshot(model))


# Errors and interrupts in the middle


def _interrupt(patch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Lets a call of a function of a module be interrupted when it is done."""
    function, calls = getattr(module, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(function(*args, **kwargs))
        if len(calls) == call:
            raise KeyboardInterrupt
        return calls[-1]

    patch.setattr(module, name, interrupted)


@pytest.mark.parametrize(
    ("run", "module", "name"),
    [
        (lambda m: apply_moe_(m, HALF), exchange, "_move_hooks"),
        (lambda m: apply_moe_(m, HALF), exchange, "_move_patch"),
        (lambda m: apply_moe_(m, HALF), report, "take_census"),
        (lambda m: prune_width_(m, PruneWidthConfig()), prune, "cut_ffn"),
        (lambda m: prune_width_(m, PruneWidthConfig()), ffn_module, "cut_linear"),
        (lambda m: skip_layers_(m, SkipLayersConfig(layers=[1])), exchange, "like"),
        (lambda m: prune_heads_(m, PruneHeadsConfig(component="both")), prune, "cut_linear"),
        (restore_, exchange, "_move_hooks"),
        (restore_, exchange, "offloaded"),
    ],
)
def test_an_interrupt_in_the_middle_leaves_the_model_alone(
    run: Any, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_bagel()
    layer = model.language_model.model.layers[1]
    hook = attach_hook(layer.mlp_moe_gen)
    layer.mlp_moe_gen.register_forward_hook(lambda *args: None)
    layer.mlp.register_forward_pre_hook(lambda *args: None)
    dense = outputs(model)
    if run is restore_:
        everything(model)
    before, wanted = snapshot(model), outputs(model)
    with monkeypatch.context() as patch:
        _interrupt(patch, module, name, call=2)
        with pytest.raises(KeyboardInterrupt):
            run(model)
    assert_same(before, snapshot(model))
    hook.calls.clear()
    assert_equal(wanted, outputs(model))
    assert hook.calls
    if run is restore_:
        restore_(model)
        assert_equal(dense, outputs(model))


def test_kept_meta_weights_are_not_put_back_under_real_ones() -> None:
    with torch.device("meta"):
        model = Model()
    apply_moe_(model, HALF, torch.rand(LAYERS, WIDTH))
    model.to_empty(device="cpu")
    refused(r"layer 1: kept weights must hold data, got meta", restore_, model, error=RuntimeError)
