# SPDX-License-Identifier: Apache-2.0
"""The choice of partition and of first routers, in live models, in files, and by command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analysis_models as models
import pytest
import torch
from checkpoint_files import make_dense
from refusals import refused
from routing_choice import block_ffn, unit_tokens
from surgery_models import LAYERS, Model, TensorMLP, ffn
from torch import Tensor

from sparse_unified import MoEConfig, apply_moe_, restore_
from sparse_unified.adapt import init_router_
from sparse_unified.analysis import FfnStatistics, StatisticsConfig, calibrate, collect
from sparse_unified.analysis.bagel_task import Settings
from sparse_unified.analysis.samples import Task, built_in_samples
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import Checkpoint, convert, keys
from sparse_unified.cli import main
from sparse_unified.surgery.decoder import find_adapter

INPUTS = StatisticsConfig(num_inputs=32)


def layer_inputs(hidden: int, layers: range = range(LAYERS), count: int = 40) -> dict[int, Tensor]:
    return {layer: unit_tokens(count, hidden=hidden, seed=layer) for layer in layers}


# Live models


def test_routers_start_small_and_those_of_und_alike() -> None:
    torch.manual_seed(0)
    model = Model(TensorMLP)
    how: dict[str, Any] = {"num_experts": 4, "top_k": 2, "component": "und"}
    apply_moe_(model, MoEConfig(**how, router_init="random", seed=4))
    drawn = ffn(model, 1, "und")
    assert drawn.gate.weight.any()
    assert torch.equal(drawn.gate.weight, drawn.gate_img.weight)
    assert not torch.equal(drawn.gate.weight, ffn(model, 2, "und").gate.weight)
    restore_(model)
    apply_moe_(model, MoEConfig(**how, router_init="activation"), inputs={"und": layer_inputs(8)})
    fitted = ffn(model, 1, "und")
    logits = layer_inputs(8)[1] @ fitted.gate.weight.detach().t()
    assert 0.0099 < float(logits.square().mean().sqrt()) < 0.1001
    assert not fitted.gate_shared.weight.any()


@pytest.mark.parametrize(
    ("changes", "inputs"),
    [
        ({"partition": "coactivation"}, None),
        ({"router_init": "activation"}, None),
        ({}, {1: torch.zeros(9, 8)}),
        ({"router_init": "activation"}, {1: torch.zeros(9, 8)}),
        ({"router_init": "activation"}, {"und": {}}),
        *(
            ({name: value}, dict.fromkeys(range(4), wrong))
            for name, value in (("router_init", "activation"), ("partition", "coactivation"))
            for wrong in (
                torch.zeros(9, 7),
                torch.zeros(3, 8),
                torch.full((9, 8), torch.nan),
                torch.zeros(9, 8, dtype=torch.int64),
            )
        ),
    ],
)
def test_unfit_inputs_leave_the_model_alone(changes: dict[str, Any], inputs: Any) -> None:
    model = Model(TensorMLP)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"apply_moe_: .*inputs"):
        apply_moe_(model, MoEConfig(num_experts=4, top_k=2, **changes), inputs=inputs)
    assert dict(model.named_modules()) == before


# Routers of blocks that are sparse already


def block_model(partition: str) -> Model:
    """Layers whose generation FFNs are blocks of neurons that fire together."""
    torch.manual_seed(0)
    model = Model(TensorMLP)
    for layer in range(LAYERS):
        own, _ = block_ffn(hidden=8, width=96, blocks=4, seed=layer)
        module = TensorMLP(8, 96)
        with torch.no_grad():
            for name, weight in zip(keys.PROJECTIONS, own, strict=True):
                getattr(module, name).weight.copy_(weight)
        model.layers[layer].mlp_moe_gen = module
    config = MoEConfig(num_experts=4, top_k=2, partition=partition)  # type: ignore[arg-type]
    inputs = layer_inputs(8, count=80) if partition == "coactivation" else None
    apply_moe_(model, config, inputs=inputs)
    return model


def test_a_fitted_router_beats_the_tie_in_every_block() -> None:
    model = block_model("coactivation")
    report = init_router_(model, "activation", statistics={"gen": layer_inputs(8, count=80)})
    assert [entry["layer"] for entry in report.layers] == [1, 2]
    for entry in report.layers:
        assert entry["error"] < 0.75 * entry["error_zero"]
    assert "error zero" in report.to_text()
    # The same as at conversion, as no weight of an expert has changed.
    fitted = [ffn(model, layer, "gen").gate.weight.clone() for layer in (1, 2)]
    init_router_(model, "random", seed=3)
    assert not torch.equal(ffn(model, 1, "gen").gate.weight, fitted[0])
    init_router_(model, "zero")
    assert not ffn(model, 1, "gen").gate.weight.any()
    restore_(model)
    config = MoEConfig(num_experts=4, top_k=2, partition="coactivation", router_init="activation")  # type: ignore[arg-type]
    apply_moe_(model, config, inputs=layer_inputs(8, count=80))
    for layer, weight in zip((1, 2), fitted, strict=True):
        assert torch.equal(ffn(model, layer, "gen").gate.weight, weight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "best"},
        {"method": "activation"},
        {"method": "zero", "statistics": {}},
        {"method": "activation", "statistics": {"gen": {}}},
        {"method": "random", "components": ["und"]},
        {"method": "random", "components": ["vit"]},
        {"method": "random", "seed": -1},
    ],
    ids=str,
)
def test_init_router_refuses(arguments: dict[str, Any]) -> None:
    model = block_model("snake")
    refused("init_router_: ", init_router_, model, **arguments)
    assert not ffn(model, 1, "gen").gate.weight.any()


# Inputs that statistics keep


def gather(model: Any, samples: dict[str, Tensor], count: int = 6) -> FfnStatistics:
    with collect(model, "text", config=StatisticsConfig(num_inputs=count)) as collector:
        for name, ids in samples.items():
            collector.begin(name)
            with torch.no_grad():
                model(ids)
    return collector.statistics()


def test_kept_inputs_are_what_the_ffn_saw_and_the_same_tokens_everywhere(tmp_path: Path) -> None:
    model = models.Bailing()
    ids = {name: torch.randint(3, 60, (1, 9)) for name in "abc"}
    seen: list[Tensor] = []
    (first,) = (f for f in find_adapter(model).ffns("und") if f.key == 0)
    handle = first.module.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    whole = gather(model, ids)
    handle.remove()
    kept = whole.inputs("und")[0]
    assert list(kept.shape) == [6, models.HIDDEN]
    rows = torch.cat(seen).bfloat16().float()
    assert all(bool((rows == x).all(1).any()) for x in kept)
    # Parts add up to one pass, whatever their order.
    parts = [gather(model, {name: ids[name]}) for name in "cab"]
    merged = parts[0].merge(*parts[1:])
    assert all(torch.equal(merged.inputs("und")[key], x) for key, x in whole.inputs("und").items())
    whole.save(tmp_path / "s.safetensors")
    loaded = FfnStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.inputs("und")[0], kept)
    assert gather(model, ids, count=99).of("text", "und")[0].inputs.shape[0] == 27


# Files


@pytest.fixture(scope="module")
def pipeline(golden: Any) -> Any:
    return BagelPipeline.from_pretrained(golden("t2i_dense"))


def test_live_model_and_file_agree(tmp_path: Path, pipeline: Any, golden: Any) -> None:
    dense = golden("t2i_dense")
    statistics = calibrate(
        pipeline,
        Task.GENERATION,
        built_in_samples(Task.GENERATION, 2),
        config=INPUTS,
        settings=Settings(size=(32, 32), num_timesteps=4),
    )
    inputs = statistics.inputs("gen")
    how: dict[str, Any] = {"num_experts": 4, "top_k": 2, "layers": "all"}
    how |= {"partition": "coactivation", "router_init": "activation"}
    convert(dense, tmp_path / "sparse", **how, inputs={"gen": inputs})  # type: ignore[dict-item]
    live = models.bagel()
    apply_moe_(live, MoEConfig(**how), inputs={"gen": inputs})  # type: ignore[dict-item]
    sparse = Checkpoint(tmp_path / "sparse")
    for key, weight in live.state_dict().items():
        if "mlp_moe_gen" in key:
            torch.testing.assert_close(sparse.read(key), weight, rtol=1e-5, atol=1e-7)


def test_recipes_of_earlier_versions_read_as_snake_and_zero(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    path = tmp_path / "sparse" / "sparse_unified.json"
    recipe = json.loads(path.read_text())
    for name in ("partition", "router_init", "seed"):
        del recipe["steps"][0]["config"][name]
    path.write_text(json.dumps(recipe))
    found = Checkpoint(tmp_path / "sparse").recipe
    assert found[0].config == MoEConfig(num_experts=4, top_k=2, layers=(1, 2))


# Commands


def test_statistics_of_another_model_or_without_inputs_are_refused(
    tmp_path: Path, pipeline: Any, golden: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, other = golden("t2i_dense"), make_dense(tmp_path / "other")
    stats, bare = str(tmp_path / "s.safetensors"), str(tmp_path / "bare")
    samples, quick = built_in_samples(Task.GENERATION, 1), Settings(size=(32, 32), num_timesteps=3)
    for path, config in ((stats, INPUTS), (bare, StatisticsConfig())):
        calibrate(pipeline, Task.GENERATION, samples, config=config, settings=quick).save(path)
    chosen = ["--partition", "coactivation", "--router-init", "activation"]
    counts = ["--num-experts", "4", "--top-k", "2", "--layers", "all", "--quiet"]
    for source, options, status, words in (
        (dense, chosen[:2], 2, "--stats must come with"),
        (dense, ["--stats", stats], 2, "--stats must come with"),
        (other, [*chosen, "--stats", stats], 1, "model must have the gen FFNs they were"),
        (dense, [*chosen, "--stats", bare], 1, "inputs of gen must be kept"),
    ):
        assert main(["convert", str(source), str(tmp_path / "x"), *options, *counts]) == status
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not (tmp_path / "x").exists()
