# SPDX-License-Identifier: Apache-2.0
"""Prunings compose, are undone exactly, are counted, and refuse bad input."""

from __future__ import annotations

import copy
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
from swap_models import assert_same, snapshot
from torch import Tensor

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
    assert [entry.layer for entry in report.layers] == [1, 2]
    assert len(report.parts) > 20
    assert "restore_: 2 FFNs changed" in report.to_text()
    assert "restore_: " + str(len(report.parts)) in report.to_text()
    with pytest.raises(ValueError, match="or parts pruned, got none among the 4 layers"):
        restore_(model)


def test_only_the_latest_transform_is_undone_when_asked() -> None:
    model = small_bagel()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2))
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    before, wanted = snapshot(model), outputs(model)
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[1]))
    prune_width_(model, PruneWidthConfig(component="und"))
    assert {part.part for part in restore_(model, latest=True).parts} == {"ffn"}
    restore_(model, latest=True)
    assert_same(before, snapshot(model))
    assert_equal(wanted, outputs(model))
    assert not restore_(model, latest=True).layers
    assert isinstance(layer_of(model, 1).mlp_moe_gen, SparseMoE)
    assert len(restore_(model, latest=True).layers) == 2


def test_a_copy_of_a_pruned_model_is_restored_on_its_own() -> None:
    model = small_bagel()
    dense = outputs(model)
    everything(model)
    twin = copy.deepcopy(model)
    restore_(twin)
    assert_equal(dense, outputs(twin))
    assert layer_of(model, 1).self_attn.q_proj is None
    restore_(model)
    assert_equal(dense, outputs(model))


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


def test_the_state_dict_of_a_skipped_layer_has_no_keys_of_it() -> None:
    model = small_bagel()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    left = [key for key in model.state_dict() if "language_model.model.layers.1." in key]
    assert left
    assert all("_moe_gen" in key for key in left)


def test_without_kept_modules_there_is_no_way_back() -> None:
    model = small_bagel()
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]), keep_dense=False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"restore_: layer 1 .*must have been kept"):
        restore_(model)
    assert_same(before, snapshot(model))


def test_hooks_of_what_is_skipped_come_back() -> None:
    model = small_bagel()
    fired: list[int] = []
    layer_of(model, 1).mlp.register_forward_hook(lambda *_: fired.append(1))
    skip_layers_(model, SkipLayersConfig(component="und", layers=[1]))
    outputs(model)
    assert not fired
    restore_(model)
    outputs(model)
    assert fired


@pytest.mark.parametrize("name", ["count_component", "put_in"])
def test_an_interrupted_pruning_leaves_the_model_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_unified.surgery import prune

    model = small_bagel()
    before, wanted = snapshot(model), outputs(model)
    for run in (
        lambda: prune_width_(model, PruneWidthConfig()),
        lambda: skip_layers_(model, SkipLayersConfig(layers=[1])),
        lambda: prune_heads_(model, PruneHeadsConfig(component="both")),
    ):
        function, calls = getattr(prune, name), []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)  # noqa: B023
            if len(calls) == 2:  # noqa: B023
                raise KeyboardInterrupt
            return function(*args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(prune, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert_same(before, snapshot(model))
        assert_equal(wanted, outputs(model))


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
    assert report.before == whole["gen"]
    assert report.after == count_parameters(model)["gen"]
    lost = 2 * 3 * HIDDEN * WIDTH // 2
    assert report.before.parameters - report.after.parameters == lost
    assert report.before.flops_per_token - report.after.flops_per_token == 2 * lost
    part = report.parts[0]
    assert (part.before, part.after) == ("96 neurons", "48 neurons")
    assert (part.layer, part.component, part.part) == (1, "gen", "ffn")
    text = str(report)
    assert text.startswith("prune_width_: 2 parts changed (gen ffn 1-2)")
    assert "FLOPs per token" in text
    assert report.to_dict()["after"]["parameters"] == report.after.parameters

    report = skip_layers_(model, SkipLayersConfig(component="und", layers="all"))
    assert report.after.parameters == report.after.bytes == report.after.flops_per_token == 0
    assert {part.after for part in report.parts} == {"skipped"}
    assert len(report.parts) == 2 * LAYERS


def test_idle_experts_cost_no_arithmetic() -> None:
    model = small_bagel()
    dense = count_parameters(model)["gen"]
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers="all"))
    sparse = count_parameters(model)["gen"]
    routers = LAYERS * HIDDEN * 5
    assert sparse.parameters == dense.parameters + routers
    idle = LAYERS * 3 * HIDDEN * WIDTH // 2
    assert sparse.flops_per_token == dense.flops_per_token - 2 * idle + 2 * routers


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (PruneWidthConfig, {"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, got 0"),
        (PruneWidthConfig, {"keep_ratio": 1.01}, "keep_ratio must be above 0 and at most 1"),
        (PruneWidthConfig, {"keep_ratio": float("nan")}, "keep_ratio must be .* got nan"),
        (PruneWidthConfig, {"keep_ratio": True}, "keep_ratio must be .* got True"),
        (PruneWidthConfig, {"keep_ratio": "half"}, "keep_ratio must be .* got 'half'"),
        (PruneWidthConfig, {"component": "vit"}, "component must be one of und, gen, got 'vit'"),
        (PruneWidthConfig, {"component": "both"}, "component must be one of und, gen, got 'both'"),
        (PruneWidthConfig, {"block_size": 8}, "block_size must be 1 or 16 to 128, got 8"),
        (PruneWidthConfig, {"block_size": 129}, "block_size must be 1 or 16 to 128, got 129"),
        (PruneWidthConfig, {"block_size": 16.0}, "block_size must be 1 or 16 to 128"),
        (PruneWidthConfig, {"budget": "all"}, "budget must be one of 'uniform', 'global', got"),
        (PruneWidthConfig, {"layers": "3-1"}, "layers must ascend"),
        (PruneHeadsConfig, {"keep_ratio": -0.5}, "keep_ratio must be above 0"),
        (PruneHeadsConfig, {"component": "all"}, "component must be one of und, gen, both"),
        (SkipLayersConfig, {"layers": []}, "layers must name at least one"),
        (SkipLayersConfig, {"layers": [1], "part": "mlp"}, "part must be one of 'block', 'att"),
        (SkipLayersConfig, {"layers": [1], "component": "both"}, "component must be one of und"),
    ],
)
def test_configs_are_checked_when_they_are_made(kind: Any, fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{match}|{match}"):
        kind(**fields)


def some(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def _nan(*shape: int) -> Tensor:
    scores = some(*shape)
    scores[-1, 1] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda m: prune_width_(m, PruneWidthConfig(layers=[0, 4])), "layers must lie in 0 to 3"),
        (lambda m: prune_heads_(m, PruneHeadsConfig(layers="2-9")), "layers must lie in 0 to 3"),
        (lambda m: skip_layers_(m, SkipLayersConfig(layers="9")), "layers must lie in 0 to 3"),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), some(LAYERS, 95)),
            r"prune_width_: layer 0 .*scores must have shape \[96\], got \[95\]",
        ),
        (lambda m: prune_width_(m, PruneWidthConfig(), _nan(LAYERS, WIDTH)), "layer 3 .*finite"),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), {"und": some(LAYERS, WIDTH)}),
            "prune_width_: scores must hold component gen, got und",
        ),
        (
            lambda m: prune_width_(m, PruneWidthConfig(), {"gen": {0: some(WIDTH)}}),
            "scores must be given for the selected layers, 0, 1, 2, 3, got none for 1, 2, 3",
        ),
        (
            lambda m: prune_width_(m, PruneWidthConfig(block_size=36)),
            "layer 0.*block_size must divide the 96 neurons, got 36",
        ),
        (
            lambda m: prune_heads_(m, PruneHeadsConfig(), some(LAYERS, 5)),
            r"prune_heads_: layer 0 .*scores must have shape \[4\], got \[5\]",
        ),
        (lambda m: prune_heads_(m, PruneHeadsConfig(), _nan(LAYERS, 4)), "layer 3 .*finite"),
    ],
)
def test_bad_input_leaves_the_model_alone(run: Any, match: str) -> None:
    model = small_bagel()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        run(model)
    assert_same(before, snapshot(model))


def test_configs_of_another_type_are_refused() -> None:
    for run in (prune_width_, prune_heads_, skip_layers_):
        with pytest.raises(TypeError, match=f"{run.__name__}: config must be a"):
            run(small_bagel(), MoEConfig())


def test_orders_that_make_no_sense_are_refused_by_name() -> None:
    model = small_bagel()
    apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[1]))
    with pytest.raises(ValueError, match=r"layer 1 .*FFN must be dense, got a SparseMoE"):
        apply_moe_(model, MoEConfig(num_experts=2, top_k=1, layers=[1]))
    with pytest.raises(ValueError, match=r"layer 1.*budget must be 'uniform' for sparse FFNs"):
        prune_width_(model, PruneWidthConfig(layers=[1], budget="global"))
    with pytest.raises(ValueError, match=r"layer 1.*block_size must divide the 24 neurons of an"):
        prune_width_(model, PruneWidthConfig(layers=[1], block_size=32))
    skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match="layers must have a gen FFN, got 2, which skip it"):
        prune_width_(model, PruneWidthConfig(layers=[2]))
    with pytest.raises(ValueError, match="apply_moe_: layers must have a gen FFN, got 2, which"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, layers=[2]))
    report = apply_moe_(model, MoEConfig(num_experts=4, top_k=2, component="und", layers="all"))
    assert len(report.layers) == LAYERS
    with pytest.raises(ValueError, match="layers must have a gen block left, got 2, which skip it"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match="layers must have a gen attention, got 2, which"):
        prune_heads_(model, PruneHeadsConfig(component="gen", layers=[2]))
    with pytest.raises(ValueError, match="layers must have a und and gen attention, got 2, which"):
        prune_heads_(model, PruneHeadsConfig(component="both", layers=[2]))
    assert len(prune_heads_(model, PruneHeadsConfig(component="both")).parts) == 2 * 3
    with pytest.raises(ValueError, match="layers must have a gen block left, got 2, which skip it"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers="1-2"))
    skip_layers_(model, SkipLayersConfig(component="gen", layers="middle"))
    with pytest.raises(ValueError, match="layers must have a gen block left, got 1, 2, which"):
        skip_layers_(model, SkipLayersConfig(component="gen", layers="middle"))
