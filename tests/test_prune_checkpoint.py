# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints: what is written, read again, verified, and composed with experts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_weights, make_dense, snapshot
from prune_models import (
    HEAD_DIM,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    WIDTH,
    assert_equal,
    load,
    outputs,
    small_bagel,
    write_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from sparse_unified.bagel import Bagel, BagelPipeline
from sparse_unified.checkpoint import Checkpoint, convert, info, invert, prune, verify
from sparse_unified.cli import main

Mode = PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


def apply_live(model: Bagel, modes: Sequence[Mode], scores: Any = None) -> None:
    for mode in modes:
        if isinstance(mode, PruneWidthConfig):
            prune_width_(model, mode, scores)
        elif isinstance(mode, PruneHeadsConfig):
            prune_heads_(model, mode, scores)
        else:
            skip_layers_(model, mode)


WIDTHS = [
    PruneWidthConfig(component="und", keep_ratio=0.5, block_size=16, budget="global"),
    PruneWidthConfig(component="gen", layers=[1, 2], keep_ratio=2 / 3, block_size=16),
]
HEADS = [
    PruneHeadsConfig(component="und", keep_ratio=0.5),
    PruneHeadsConfig(component="gen", keep_ratio=0.5, layers="0-2"),
]
DEPTH = [
    SkipLayersConfig(component="und", layers=[1, 3]),
    SkipLayersConfig(component="gen", layers=[3]),
    SkipLayersConfig(component="gen", layers=[0], part="attention"),
    SkipLayersConfig(component="gen", layers=[2], part="ffn"),
]
CASES = {
    "width": WIDTHS,
    "heads": HEADS,
    "heads of both": [PruneHeadsConfig(component="both", keep_ratio=0.75, budget="global")],
    "depth": DEPTH,
    "all": [*DEPTH, *WIDTHS[:1], *HEADS[:1]],
    "all, depth last": [*WIDTHS, *HEADS, *DEPTH],
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


# Composing


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
    assert Checkpoint(tmp_path / "out").moe is None
    assert not info(tmp_path / "out").problems
    load(tmp_path / "out")


def test_a_second_pruning_starts_from_the_first(dense: Path, tmp_path: Path) -> None:
    live = small_bagel()
    path = dense
    for i, modes in enumerate(
        (
            [PruneWidthConfig(component="gen", keep_ratio=0.75), HEADS[0]],
            [PruneWidthConfig(component="gen", keep_ratio=0.5), HEADS[1]],
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


# What was ranked


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
        prune(dense, tmp_path / name, [*WIDTHS, *HEADS], seed=seed)
    a, b, c = (snapshot(tmp_path / name)["ema.safetensors"] for name in "abc")
    assert a == b != c


def test_all_but_weights_and_recipe_is_copied(dense: Path, tmp_path: Path) -> None:
    before = snapshot(dense)
    prune(dense, tmp_path / "out", WIDTHS)
    after = snapshot(tmp_path / "out")
    assert snapshot(dense) == before
    assert set(after) - set(before) == {"sparse_unified.json"}
    assert {name for name in before if before[name] != after[name]} == {"ema.safetensors"}


# What is refused


def refuse(
    match: str, source: Path, tmp_path: Path, modes: Any, error: type = ValueError, **how: Any
) -> None:
    with pytest.raises(error, match=match) as caught:
        prune(source, tmp_path / "refused", modes, **how)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]


WHOLE = PruneWidthConfig()
NAN = torch.rand(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
NAN[2, 5] = float("nan")


@pytest.mark.parametrize(
    ("modes", "how", "match"),
    [
        ([], {}, "modes must name at least one"),
        (PruneWidthConfig(layers=[0, 4]), {}, "layers must lie in 0 to 3, got 4"),
        (SkipLayersConfig(layers="2-7"), {}, "layers must lie in 0 to 3, got 4"),
        (PruneWidthConfig(block_size=36), {}, "block_size must divide the 96 neurons of gen"),
        (WHOLE, {"scores": NAN}, "prune: layer 2: scores must be finite, got nan for neuron 5"),
        (WHOLE, {"scores": NAN[:, :9]}, r"layer 0: scores must have shape \[96\], got \[9\]"),
        (WHOLE, {"scores": NAN[:3]}, r"scores must have shape \[4 layers"),
        (WHOLE, {"scores": {"und": NAN}}, "scores must hold gen, got und"),
        (WHOLE, {"scores": {"gen": {1: NAN[1]}}}, "scores must have layers 0, 1, 2, 3, got no 0"),
        (HEADS[0], {"scores": {"und": NAN}}, "scores must hold und.heads, got und"),
        (WHOLE, {"scores": NAN, "seed": 1}, "scores and seed must not both be given"),
        (WHOLE, {"seed": "one"}, "seed must be an integer, got 'one'"),
        ([WHOLE, WHOLE], {}, "modes must name the width of gen once; prune the result again"),
        (
            [HEADS[0], PruneHeadsConfig(component="both")],
            {},
            "modes must name the heads of und once",
        ),
        (
            [DEPTH[1], PruneWidthConfig(layers=[3])],
            {},
            "layers must have a gen FFN, got 3, which skip it",
        ),
        (
            [DEPTH[2], PruneHeadsConfig(layers=[0])],
            {},
            "layers must have a gen attention, got 0, which skip it",
        ),
        ([DEPTH[1], DEPTH[1]], {}, "layers must have a gen block left, got 3, which skip it"),
    ],
)
def test_bad_input_is_refused_by_name(
    modes: Any, how: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    refuse(match, dense, tmp_path, modes, **how)


def test_experts_are_no_mode_of_pruning(dense: Path, tmp_path: Path) -> None:
    refuse("modes must be PruneWidthConfig", dense, tmp_path, MoEConfig(), error=TypeError)


def test_the_target_must_not_exist_nor_lie_in_the_source(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="target must not exist"):
        prune(dense, tmp_path / "out", WIDTHS)
    with pytest.raises(ValueError, match="target must lie outside"):
        prune(dense, dense / "out", WIDTHS)


def test_width_after_experts_is_refused_with_the_right_order(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    match = "FFNs must be dense .* got sparse layers 1-2; prune the width first, then convert"
    refuse(match, tmp_path / "sparse", tmp_path, PruneWidthConfig())
    report = prune(tmp_path / "sparse", tmp_path / "ends", PruneWidthConfig(layers=[0, 3]))
    assert report.after["gen"].parameters < report.before["gen"].parameters
    load(tmp_path / "ends")


def test_experts_of_skipped_or_indivisible_layers_are_refused(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "a", [DEPTH[3], PruneWidthConfig(layers=[1], keep_ratio=95 / 96)])
    with pytest.raises(ValueError, match="layers must have a gen FFN, got 2, which skip it"):
        convert(tmp_path / "a", tmp_path / "b", num_experts=4, top_k=2, layers=[2])
    with pytest.raises(ValueError, match=r"gen layer 1: ExpertLayout: .*divide the 95 neurons"):
        convert(tmp_path / "a", tmp_path / "b", num_experts=4, top_k=2)


def test_components_that_a_file_lacks_are_refused(dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    edit_weights(
        source, lambda w: [w.pop(k) for k in list(w) if ".layers." in k and "moe_gen" in k]
    )
    refuse("keys must hold gen FFNs", source, tmp_path, PruneWidthConfig())
    refuse("keys must hold a gen attention", source, tmp_path, PruneHeadsConfig())
    refuse("keys must hold gen layers", source, tmp_path, DEPTH[1])


def test_heads_need_their_number_in_the_config(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "source")
    match = "llm_config.json must give num_attention_heads"
    refuse(match, source, tmp_path, PruneHeadsConfig())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format="other"), "format must be sparse_unified.recipe 1"),
        (lambda c: c.update(format_version=2), "format must be sparse_unified.recipe 1, got"),
        (lambda c: c.update(steps={}), "steps must be a list, got dict"),
        (lambda c: c["steps"].append(3), "step 3: mode must be one of moe, width, heads, depth"),
        (lambda c: c["steps"][0].update(mode="height"), "step 0: mode must be one of"),
        (lambda c: c["steps"][0]["config"].pop("budget"), "step 0: config must have block_size"),
        (lambda c: c["steps"][0].update(extra=1), "step 0: config must have .* got .'extra'"),
        (lambda c: c["steps"][0]["config"].update(keep_ratio=2), "step 0: PruneWidthConfig: keep"),
        (lambda c: c["steps"][0]["config"].update(layers="all"), "layers must be a list of ind"),
        (lambda c: c["steps"][0].pop("widths"), "widths must be given for the layers of a width"),
        (lambda c: c["steps"][0]["widths"].update({"0": 0}), "width of layer 0 must be an integer"),
        (lambda c: c["steps"][0]["widths"].update({"0": 97}), "must be 1 to the 96 neurons left"),
        (lambda c: c["steps"][0]["widths"].update({"0": 32}), "layer 0 must have 48 neurons as in"),
        (lambda c: c["steps"][0]["config"].update(layers=[0, 1, 2, 9]), "widths must be given"),
        (lambda c: c["steps"][2].update(widths={"1": 3}), "widths must be given for the layers"),
        (lambda c: c["steps"][2]["config"].update(layers=[9]), "layers must be 0 to 3, got 9"),
        (lambda c: c["steps"][1]["heads"].update({"0": {}}), "heads of layer 0 must have keys"),
        (
            lambda c: c["steps"][1]["heads"]["0"].update(und=[1, 0]),
            "und of layer 0 must be ascending",
        ),
        (lambda c: c["steps"][1]["heads"]["0"].update(keys=[0]), "must be among its keys"),
        (
            lambda c: c["steps"][1]["heads"]["0"].update(keys=[0, 1, 2, 3, 9], gen=[0, 9]),
            "gen heads of layer 0 must be some of",
        ),
        (lambda c: c["steps"].pop(2), "got no whole layer 1"),
        (lambda c: c["steps"].pop(0), "layer 0 must have 48 neurons as in the keys, got 96"),
        (lambda c: c["steps"].pop(1), "must have 64 channels for the heads in sparse_unified"),
        (lambda c: c["steps"][2]["config"].update(layers=[1, 2]), "must not be there, as sparse_"),
    ],
)
def test_a_recipe_that_does_not_fit_the_keys_is_refused(
    change: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    modes = [PruneWidthConfig(component="und"), HEADS[0], SkipLayersConfig(layers=[1])]
    prune(dense, tmp_path / "out", modes)
    path = tmp_path / "out" / "sparse_unified.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match) as caught:
        load(tmp_path / "out")
    assert "sparse_unified.json" in str(caught.value) or "keys" in str(caught.value)
    assert info(tmp_path / "out").problems


def test_without_its_recipe_a_pruned_checkpoint_is_refused(dense: Path, tmp_path: Path) -> None:
    for name, modes in (("width", WIDTHS), ("depth", DEPTH[1:2])):
        prune(dense, tmp_path / name, modes)
        (tmp_path / name / "sparse_unified.json").unlink()
        with pytest.raises(ValueError, match=r"intermediate_size must be|no whole layer 3"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("mlp.gate_proj.weight", r"und layer 0 ffn, neuron 5: must be a dense neuron of its own"),
        ("self_attn.q_proj.weight", r"q_proj.weight: must be equal, got another value in channel"),
        ("self_attn.o_proj.weight", r"o_proj.weight: must be equal, got another value in channel"),
        ("self_attn.k_proj.bias", r"k_proj.bias: must be equal, got another value at element 5"),
        ("input_layernorm.weight", r"input_layernorm.weight: must be equal"),
    ],
)
def test_verify_names_what_was_changed_since(
    key: str, match: str, dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "out", [PruneWidthConfig(component="und"), HEADS[0]])

    def flip(weights: dict[str, Tensor]) -> None:
        weights[f"language_model.model.layers.0.{key}"].view(torch.int32)[5] ^= 1

    edit_weights(tmp_path / "out", flip)
    report = verify(tmp_path / "out", dense)
    assert not report.ok
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(report.to_text())


def test_verify_sees_a_neuron_that_was_changed_before_it_became_an_expert(
    dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "narrow", WIDTHS[1])
    key = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
    edit_weights(tmp_path / "narrow", lambda w: w[key][3].add_(1))
    convert(tmp_path / "narrow", tmp_path / "sparse", num_experts=4, top_k=2)
    assert verify(tmp_path / "sparse", tmp_path / "narrow").ok
    report = verify(tmp_path / "sparse", dense)
    assert [verdict.ok for verdict in report.layers] == [False, True]


def test_a_wrong_config_of_a_pruned_checkpoint_is_refused(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", WIDTHS)
    edit_config(tmp_path / "out", intermediate_size=None)
    with pytest.raises(ValueError, match="intermediate_size must be a positive integer, got None"):
        load(tmp_path / "out")


# The command


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--quiet"])


def test_the_command_prunes_verifies_and_shows(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--component", "und,gen", "--axis", "depth,width,heads", "--keep-ratio", ".5"]
    options += ["--skip-layers", "1", "--skip-part", "ffn", "--block-size", "16"]
    assert run("prune", dense, out, *options, "--budget", "global", "--layers", "all") == 0
    text = capsys.readouterr().out
    assert "depth: component und, layers 1, part ffn" in text
    assert "FLOPs per token" in text
    assert run("verify", out, "--against", dense) == 0
    assert "is a part of" in capsys.readouterr().out
    assert run("info", out) == 0
    assert "no FFN in 1" in capsys.readouterr().out
    modes = [
        *(SkipLayersConfig(component=c, layers=[1], part="ffn") for c in ("und", "gen")),
        *(PruneWidthConfig(component=c, block_size=16, budget="global") for c in ("und", "gen")),
        PruneHeadsConfig(component="both", budget="global"),
    ]
    live = small_bagel()
    apply_live(live, modes)
    assert_equal(outputs(live), outputs(load(out)))


def test_the_command_ranks_at_random_from_a_seed(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--component", "gen", "--keep-ratio", "0.5", "--criterion", "random"]
    assert run("prune", dense, tmp_path / "a", *options, "--seed", 3) == 0
    prune(dense, tmp_path / "b", PruneWidthConfig(), seed=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert run("prune", dense, tmp_path / "c", *options, "--json") == 0
    assert '"random, seed 0"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--component", "vit"], "--component: must be different ones of und, gen"),
        (["--component", "gen,gen"], "--component: must be different ones of und, gen"),
        (["--component", "gen"], "--keep-ratio must be given with --axis width"),
        (["--component", "gen", "--axis", "height"], "--axis: must be different ones of depth"),
        (["--component", "gen", "--keep-ratio", "0"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "1.5"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "nan"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--axis", "depth"], "--skip-layers must be given with --axis"),
        (
            ["--component", "gen", "--keep-ratio", "1", "--skip-layers", "1"],
            "--skip-layers must be given with an --axis that it belongs to",
        ),
        (
            ["--component", "gen", "--keep-ratio", "1", "--seed", "1"],
            "--seed must be given with --criterion random",
        ),
        (
            ["--component", "gen", "--keep-ratio", "1", "--scores", "x", "--criterion", "random"],
            "not allowed with argument",
        ),
    ],
)
def test_wrong_usage_of_the_command(
    options: list[str], message: str, dense: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run("prune", dense, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_loaded_from_pruned_checkpoints_can_be_copied(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", CASES["all"])
    model = load(tmp_path / "out")
    assert_equal(outputs(model), outputs(copy.deepcopy(model)))
    assert model.config.llm.pruned_und[1].intermediate_size == 0
    attention = model.language_model.model.layers[2].self_attn
    assert attention.q_proj.key_heads != tuple(range(KEY_HEADS))
    assert attention.k_proj.weight.shape == (KEY_HEADS * HEAD_DIM, HIDDEN)
