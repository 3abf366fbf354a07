# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints: what is written, read again, verified, and composed with experts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import snapshot
from prune_models import (
    DEPTH,
    FEWER_HEADS,
    GOLDEN,
    HEAD_DIM,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    WIDTH,
    WIDTHS,
    Mode,
    apply_live,
    assert_equal,
    load,
    outputs,
    small_bagel,
    write_model,
)
from safetensors.torch import load_file, save_file

from sparse_unified import (
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    apply_moe_,
    count_parameters,
    load_moe_,
    prune_heads_,
    prune_width_,
    skip_layers_,
)
from sparse_unified.bagel import BagelPipeline
from sparse_unified.checkpoint import Checkpoint, convert, info, invert, prune, verify
from sparse_unified.experts import Budget
from sparse_unified.fixtures import write_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


CASES = {
    "width": WIDTHS,
    "heads": FEWER_HEADS,
    "heads of both": [PruneHeadsConfig(component="both", keep_ratio=0.75, budget="global")],
    "depth": DEPTH,
    "all": [*DEPTH, *WIDTHS[:1], *FEWER_HEADS[:1]],
    "all, depth last": [*WIDTHS, *FEWER_HEADS, *DEPTH],
}
EACH = pytest.mark.parametrize("modes", CASES.values(), ids=CASES)


@EACH
def test_a_pruned_checkpoint_is_the_pruned_live_model_bit_for_bit(
    modes: list[Mode], dense: Path, tmp_path: Path
) -> None:
    report = prune(dense, tmp_path / "out", modes)
    live, loaded = small_bagel(), load(tmp_path / "out")
    apply_live(live, modes)
    weights = loaded.state_dict()
    assert set(weights) == set(live.state_dict()) == set(Checkpoint(tmp_path / "out").keys())
    assert all(torch.equal(weights[key], value) for key, value in live.state_dict().items())
    assert_equal(outputs(live), outputs(loaded))
    assert report.after == count_parameters(live)
    assert report.before == count_parameters(small_bagel())
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert report.bytes_written == written < report.bytes_before
    json.loads(report.to_json())
    assert "FLOPs per token" in report.to_text()


@EACH
def test_verify_proves_what_is_left_and_lists_what_is_gone(
    modes: list[Mode], dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "out", modes)
    report = verify(tmp_path / "out", dense)
    assert report.ok, report.to_text()
    assert all(len(part.removed) == part.total - part.kept > 0 for part in report.pruned)
    assert json.loads(report.to_json())["pruned"]
    assert not info(tmp_path / "out").problems
    live = small_bagel()
    apply_live(live, modes)
    lost = {
        (component, layer)
        for component, suffix in (("und", ""), ("gen", "_moe_gen"))
        for layer, module in enumerate(live.language_model.model.layers)
        if getattr(module, f"mlp{suffix}") is None
        or len(getattr(module, f"mlp{suffix}").gate_proj.weight) < WIDTH
    }
    assert lost == {(p.component, p.layer) for p in report.pruned if p.part == "ffn"}


def test_removed_neurons_and_heads_are_named_by_their_dense_numbers(
    dense: Path, tmp_path: Path
) -> None:
    scores = {"gen": torch.zeros(LAYERS, WIDTH), "gen.heads": torch.zeros(LAYERS, KEY_HEADS)}
    scores["gen"][:, 10:] = 1
    scores["gen.heads"][:, [0, 3]] = 1
    modes = [PruneWidthConfig(keep_ratio=86 / 96), PruneHeadsConfig(keep_ratio=0.5)]
    prune(dense, tmp_path / "out", modes, scores=scores)
    report = verify(tmp_path / "out", dense)
    assert report.ok
    removed = {(part.layer, part.part): part.removed for part in report.pruned}
    assert removed == {
        (layer, part): gone
        for layer in range(LAYERS)
        for part, gone in (("ffn", tuple(range(10))), ("query heads", (1, 2)))
    }
    assert "gen 0  ffn            86  96  0-9      ok" in report.to_text()


def test_depth_makes_the_file_smaller_and_keeps_the_numbers_of_layers(
    dense: Path, tmp_path: Path
) -> None:
    modes = [SkipLayersConfig(component=component, layers=[1]) for component in ("und", "gen")]
    prune(dense, tmp_path / "out", modes)
    prefix = "language_model.model.layers."
    found = Checkpoint(tmp_path / "out").specs
    assert {key[len(prefix)] for key in found if key.startswith(prefix)} == {"0", "2", "3"}
    config = json.loads((tmp_path / "out" / "llm_config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS
    sizes = [(path / "ema.safetensors").stat().st_size for path in (dense, tmp_path / "out")]
    assert sizes[1] < 0.85 * sizes[0]
    assert verify(tmp_path / "out", dense).ok


def test_width_then_experts_then_heads_then_depth(dense: Path, tmp_path: Path) -> None:
    steps = [tmp_path / name for name in ("narrow", "sparse", "heads", "final")]
    width = PruneWidthConfig(component="gen", keep_ratio=2 / 3, budget="global", block_size=16)
    prune(dense, steps[0], width)
    report = convert(steps[0], steps[1], num_experts=4, top_k=2)
    prune(steps[1], steps[2], PruneHeadsConfig(component="both", keep_ratio=0.5))
    prune(steps[2], steps[3], [SkipLayersConfig(component="gen", layers=[2]), *DEPTH[:1]])

    live = small_bagel()
    prune_width_(live, width)
    apply_moe_(live, MoEConfig(num_experts=4, top_k=2))
    assert_equal(outputs(live), outputs(load(steps[1])))
    widths = [live.language_model.model.layers[i].mlp_moe_gen.layout.expert_width for i in (1, 2)]
    assert report.expert_widths == tuple(widths)
    prune_heads_(live, PruneHeadsConfig(component="both", keep_ratio=0.5))
    skip_layers_(live, SkipLayersConfig(component="gen", layers=[2]))
    skip_layers_(live, DEPTH[0])
    assert_equal(outputs(live), outputs(load(steps[3])))
    for path in steps:
        assert not info(path).problems
        assert verify(path, dense).ok, verify(path, dense).to_text()
    assert verify(steps[3], steps[0]).ok
    assert verify(steps[3], steps[2]).ok

    found = info(steps[3])
    assert [step["mode"] for step in found.recipe] == ["width", "moe", "heads", "depth", "depth"]
    gen = next(part for part in found.components if part.name == "gen")
    assert gen.sparse_layers == (1,)
    assert any("no FFN in 2" in text for text in gen.pruned)
    assert "step 0" in found.to_text()
    assert "depth: component gen, layers 2, part block" in found.to_text()
    config = json.loads((steps[3] / "llm_config.json").read_text())
    assert config["transformed_gen"] == [1]


def test_shared_experts_of_different_widths_load_and_verify(dense: Path, tmp_path: Path) -> None:
    scores = torch.rand(LAYERS, WIDTH) + torch.rand(LAYERS, 1)
    narrow = PruneWidthConfig(component="und", budget=Budget.GLOBAL, block_size=16)
    prune(dense, tmp_path / "narrow", narrow, scores=scores)
    how: Any = {"num_experts": 3, "top_k": 2, "num_shared_experts": 1}
    report = convert(tmp_path / "narrow", tmp_path / "out", component="und", layers="all", **how)
    assert len(set(report.expert_widths)) > 1
    assert verify(tmp_path / "out", dense).ok
    assert not info(tmp_path / "out").problems
    live = small_bagel()
    prune_width_(live, narrow, scores)
    apply_moe_(live, MoEConfig(component="und", layers="all", **how))
    assert_equal(outputs(live), outputs(load(tmp_path / "out")))


def test_a_sparse_checkpoint_of_another_tool_is_pruned(tmp_path: Path) -> None:
    source = write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "source")
    assert not (source / "sparse_unified.json").exists()
    modes = [SkipLayersConfig(component="gen", layers=[1]), PruneHeadsConfig(component="both")]
    prune(source, tmp_path / "out", modes)
    whole, live = load(source), load(source)
    apply_live(live, modes)
    weights = load(tmp_path / "out").state_dict()
    assert weights.keys() == live.state_dict().keys() < whole.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in live.state_dict().items())
    assert not info(tmp_path / "out").problems
    assert verify(tmp_path / "out", source).ok


def test_invert_gives_the_pruned_checkpoint_back_and_refuses_what_it_cannot(
    dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "narrow", WIDTHS)
    convert(tmp_path / "narrow", tmp_path / "sparse", num_experts=4, top_k=2)
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "narrow")
    convert(dense, tmp_path / "plain", num_experts=4, top_k=2)
    invert(tmp_path / "plain", tmp_path / "dense")
    assert snapshot(tmp_path / "dense") == snapshot(dense)
    prune(tmp_path / "sparse", tmp_path / "shallow", DEPTH[:1])
    with pytest.raises(ValueError, match=r"last step in sparse_unified.json must be .*got a depth"):
        invert(tmp_path / "shallow", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert not info(tmp_path / "shallow").problems


def test_all_sparse_layers_can_go(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    prune(tmp_path / "sparse", tmp_path / "out", SkipLayersConfig(component="gen", layers=[1, 2]))
    assert not Checkpoint(tmp_path / "out").experts
    assert not info(tmp_path / "out").problems
    load(tmp_path / "out")


def test_a_second_pruning_starts_from_the_first(dense: Path, tmp_path: Path) -> None:
    live = small_bagel()
    path = dense
    for i, modes in enumerate(
        (
            [PruneWidthConfig(component="gen", keep_ratio=0.75), FEWER_HEADS[0]],
            [PruneWidthConfig(component="gen", keep_ratio=0.5), FEWER_HEADS[1]],
            [PruneHeadsConfig(component="und", keep_ratio=0.5, layers=[0]), *DEPTH],
            [PruneWidthConfig(component="gen", keep_ratio=0.5)],
        )
    ):
        prune(path, tmp_path / str(i), modes)
        path = tmp_path / str(i)
        apply_live(live, modes)
        assert_equal(outputs(live), outputs(load(path)))
        assert verify(path, dense).ok
        assert not info(path).problems


def test_load_moe_takes_experts_of_pruned_widths_into_a_pruned_model(
    dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "narrow", [WIDTHS[1], DEPTH[0]])
    convert(tmp_path / "narrow", tmp_path / "sparse", num_experts=4, top_k=2)
    model = load(tmp_path / "narrow")
    load_moe_(model, tmp_path / "sparse")
    assert_equal(outputs(model), outputs(load(tmp_path / "sparse")))
    with pytest.raises(ValueError, match=r"load_moe_.*\[64, 64\] in the file, \[96, 64\]"):
        load_moe_(small_bagel(), tmp_path / "sparse")


def test_shards_are_kept_and_those_left_empty_go(dense: Path, tmp_path: Path) -> None:
    sharded = write_model(tmp_path / "sharded", num_shards=2)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    weights = load_file(dense / "ema.safetensors")
    skipped = [k for k in weights if k.startswith("language_model.model.layers.1.")]
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    names |= dict.fromkeys(skipped, "model-00002-of-00002.safetensors")
    for name in set(names.values()):
        save_file({k: w for k, w in weights.items() if names[k] == name}, sharded / name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))
    modes = [SkipLayersConfig(component=c, layers=[1]) for c in ("und", "gen")]
    prune(sharded, tmp_path / "out", [*modes, *WIDTHS[:1]])
    assert not (tmp_path / "out" / "model-00002-of-00002.safetensors").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights) - set(skipped)
    total = sum(w.nbytes for w in load(tmp_path / "out").state_dict().values())
    assert index["metadata"]["total_size"] == total
    assert verify(tmp_path / "out", dense).ok


def test_the_pipeline_generates_and_answers(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    prune(dense, tmp_path / "out", CASES["all, depth last"])
    pipeline = BagelPipeline.from_pretrained(tmp_path / "out")
    result = pipeline.generate("a cat", seed=0, size=(32, 48), num_timesteps=3)
    assert result.images[0].size == (48, 32)


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_scores_decide_and_may_come_from_a_file(form: str, dense: Path, tmp_path: Path) -> None:
    scores: Any = {
        name: {i: torch.rand(size) for i in range(LAYERS)}
        for name, size in (("gen", WIDTH), ("und", WIDTH), ("gen.heads", KEY_HEADS))
    }
    live = small_bagel()
    prune_width_(live, WIDTHS[0], {"und": scores["und"]})
    prune_width_(live, WIDTHS[1], {"gen": scores["gen"]})
    prune_heads_(live, PruneHeadsConfig(component="gen"), {"gen": scores["gen.heads"]})
    given = scores
    if form == "file":
        flat = {
            f"{name.partition('.')[0]}.{i}{'.heads' if '.' in name else ''}": value
            for name, layers in scores.items()
            for i, value in layers.items()
        }
        save_file(flat, tmp_path / "scores.safetensors")
        given = tmp_path / "scores.safetensors"
    report = prune(
        dense, tmp_path / "out", [*WIDTHS, PruneHeadsConfig(component="gen")], scores=given
    )
    assert_equal(outputs(live), outputs(load(tmp_path / "out")))
    assert report.steps[0]["scores"] == ("file scores.safetensors" if form == "file" else "given")


def test_random_ranking_is_the_same_for_the_same_seed(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prune(dense, tmp_path / name, [*WIDTHS, *FEWER_HEADS], seed=seed)
    a, b, c = (snapshot(tmp_path / name)["ema.safetensors"] for name in "abc")
    assert a == b != c


def test_all_but_weights_and_recipe_is_copied(dense: Path, tmp_path: Path) -> None:
    before = snapshot(dense)
    prune(dense, tmp_path / "out", WIDTHS)
    after = snapshot(tmp_path / "out")
    assert snapshot(dense) == before
    assert set(after) - set(before) == {"sparse_unified.json"}
    assert {name for name in before if before[name] != after[name]} == {"ema.safetensors"}


def test_models_loaded_from_pruned_checkpoints_can_be_copied(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", CASES["all"])
    model = load(tmp_path / "out")
    assert_equal(outputs(model), outputs(copy.deepcopy(model)))
    assert model.config.llm.layer(1, "und").width == 0
    attention = model.language_model.model.layers[2].self_attn
    assert attention.q_proj.key_heads != tuple(range(KEY_HEADS))
    assert attention.k_proj.weight.shape == (KEY_HEADS * HEAD_DIM, HIDDEN)
