# SPDX-License-Identifier: Apache-2.0
"""What cannot be swapped or pruned is refused by name, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prune_models import LAYERS as BAGEL_LAYERS
from prune_models import assert_equal, outputs, small_bagel
from surgery_models import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Bare,
    Model,
    TensorMLP,
    assert_same,
    attach_like_accelerate,
    snapshot,
)
from torch import Tensor, nn

from sparse_unified import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.surgery import exchange, prune, report
from sparse_unified.surgery import ffn as ffn_module

HALF = MoEConfig(num_experts=4, top_k=2)
ONE = MoEConfig(num_experts=4, top_k=2, layers=[0])
AT = r"apply_moe_: layer 2( \(language_model\.model\.layers\.2(\.mlp_moe_gen)?\))?: "


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def refuse(
    model: Any, match: str, config: Any = HALF, scores: Any = None, error: type = ValueError
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        apply_moe_(model, config, scores)
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


# Configs


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (MoEConfig, {"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        (MoEConfig, {"top_k": 17}, "top_k must be at most num_experts = 16, got 17"),
        (MoEConfig, {"partition": "spiral"}, "partition must be one of"),
        (PruneWidthConfig, {"keep_ratio": float("nan")}, "keep_ratio must be .* got nan"),
        (PruneWidthConfig, {"block_size": 8}, "block_size must be 1 or 16 to 128, got 8"),
        (PruneHeadsConfig, {"component": "all"}, "component must be one of und, gen, both"),
        (SkipLayersConfig, {"layers": []}, "layers must name at least one"),
        (SkipLayersConfig, {"layers": [1], "part": "mlp"}, "part must be one of"),
    ],
)
def test_configs_are_checked_when_they_are_made(kind: Any, fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kind(**fields)


def test_layers_are_text_or_a_sequence() -> None:
    with pytest.raises(TypeError, match="layers must be a string or a sequence"):
        MoEConfig(layers=3)  # type: ignore[arg-type]
    assert hash(MoEConfig(layers=[1, 2])) == hash(MoEConfig(layers=(1, 2)))


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
    with pytest.raises(ValueError, match="restore_: model must have FFNs replaced by apply_moe_"):
        restore_(Model())
    with pytest.raises(ValueError, match="restore_: model must have decoder layers"):
        restore_(nn.Linear(2, 2))


# FFNs: what happens to that of layer 2, and what is said about it.


class Packed(torch.Tensor):
    """A tensor that stores something else than its values."""


def _offload(layer: Any) -> None:
    attach_like_accelerate(layer.mlp_moe_gen.to("meta").gate_proj)


def _infinite(layer: Any) -> None:
    with torch.no_grad():
        layer.mlp_moe_gen.up_proj.weight[3, 1] = float("inf")


def _weight(of: Any) -> Any:
    def change(layer: Any) -> None:
        weight = nn.Parameter(of(torch.zeros(WIDTH, HIDDEN)), requires_grad=False)
        layer.mlp_moe_gen.gate_proj.weight = weight

    return change


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


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m: prune_width_(m, PruneWidthConfig(layers=[0, 4])), "layers must lie in 0 to 3"),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), torch.rand(BAGEL_LAYERS, 95)),
            r"prune_width_: layer 0: scores must have shape \[96\], got \[95\]",
        ),
        (
            lambda m: prune_width_(m, PruneWidthConfig(block_size=36)),
            "prune_width_: gen layer 0: block_size must divide the 96 neurons, got 36",
        ),
        (
            lambda m: prune_heads_(m, PruneHeadsConfig(), torch.rand(BAGEL_LAYERS, 5)),
            r"prune_heads_: layer 0: scores must have shape \[4\], got \[5\]",
        ),
    ],
)
def test_prunings_with_bad_input_leave_the_model_alone(run: Any, match: str) -> None:
    model = small_bagel()
    torch.rand(1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        run(model)
    assert_same(before, snapshot(model) | {"random": before["random"]})


def test_orders_that_make_no_sense_are_refused_by_name() -> None:
    model = small_bagel()
    sparse = MoEConfig(num_experts=4, top_k=2, layers=[1])
    apply_moe_(model, sparse)
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))

    def refused(run: Any, config: Any, match: str) -> None:
        with pytest.raises(ValueError, match=f"{run.__name__}: {match}"):
            run(model, config)

    refused(apply_moe_, sparse, "layer 1 .*FFN must be dense, .*got a SparseMoE")
    refused(prune_width_, PruneWidthConfig(layers=[1], budget="global"), ".*budget must be 'unifo")
    wide = PruneWidthConfig(layers=[1], block_size=32)
    refused(prune_width_, wide, "gen layer 1: block_size must divide the 24 neurons of an expert")
    refused(prune_width_, PruneWidthConfig(layers=[2]), "layers must have a gen FFN, got 2, which")
    refused(apply_moe_, MoEConfig(layers=[2]), "layers must have a gen FFN, got 2, which skip it")
    for component in ("gen", "both"):
        config = PruneHeadsConfig(component=component, layers=[2])
        refused(prune_heads_, config, "layers must have a .*gen attention, got 2, which skip it")
    for layers in ([2], "1-2"):
        config = SkipLayersConfig(component="gen", layers=layers)
        refused(skip_layers_, config, "layers must have a gen block left, got 2, which skip it")
    # "all" and "middle" pass over layers that lack it, unless all do.
    und = MoEConfig(num_experts=4, top_k=2, component="und", layers="all")
    assert len(apply_moe_(model, und).parts) == BAGEL_LAYERS
    assert len(prune_heads_(model, PruneHeadsConfig(component="both")).parts) == 2 * 3
    middle = SkipLayersConfig(component="gen", layers="middle")
    skip_layers_(model, middle)
    refused(skip_layers_, middle, "layers must have a gen block left, got 1, 2, which skip it")


def test_attentions_of_models_of_another_make_stay() -> None:
    model = Model()
    before = snapshot(model)
    for part in ("attention", "block"):
        with pytest.raises(ValueError, match=r"skip_layers_: layer 1 .*attention must be one that"):
            skip_layers_(model, SkipLayersConfig(component="gen", layers=[1], part=part))
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


def everything(model: Any) -> None:
    """One layer of each kind of change."""
    prune_width_(model, PruneWidthConfig(component="und", layers=[0]))
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="1-2"))
    prune_width_(model, PruneWidthConfig(layers=[1]))
    prune_heads_(model, PruneHeadsConfig(component="gen", layers=[1]))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))


RUNS = {
    "apply": lambda model: apply_moe_(model, HALF),
    "width": lambda model: prune_width_(model, PruneWidthConfig()),
    "skip": lambda model: skip_layers_(model, SkipLayersConfig(layers=[1])),
    "heads": lambda model: prune_heads_(model, PruneHeadsConfig(component="both")),
    "restore": restore_,
}
INSIDE = {
    "apply": [(exchange, "_move_hooks"), (report, "take_census"), (exchange, "_move_patch")],
    "width": [(prune, "cut_ffn"), (ffn_module, "cut_linear")],
    "skip": [(exchange, "like")],
    "heads": [(prune, "cut_linear")],
    "restore": [(exchange, "_move_hooks"), (exchange, "offloaded")],
}


@pytest.mark.parametrize(("run", "at"), [(run, at) for run in RUNS for at in INSIDE[run]])
def test_an_interrupt_in_the_middle_leaves_the_model_alone(
    run: str, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_bagel()
    layer = model.language_model.model.layers[1]
    hook = attach_like_accelerate(layer.mlp_moe_gen)
    layer.mlp_moe_gen.register_forward_hook(lambda *args: None)
    layer.mlp.register_forward_pre_hook(lambda *args: None)
    dense = outputs(model)
    if run == "restore":
        everything(model)
    before, wanted = snapshot(model), outputs(model)
    with monkeypatch.context() as patch:
        _interrupt(patch, *at, call=2)
        with pytest.raises(KeyboardInterrupt):
            RUNS[run](model)
    assert_same(before, snapshot(model))
    hook.calls.clear()
    assert_equal(wanted, outputs(model))
    assert hook.calls
    if run == "restore":
        restore_(model)
        assert_equal(dense, outputs(model))


def test_kept_meta_weights_are_not_put_back_under_real_ones() -> None:
    with torch.device("meta"):
        model = Model()
    apply_moe_(model, HALF, torch.rand(LAYERS, WIDTH))
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"layer 1: kept weights must hold data, got meta"):
        restore_(model)
