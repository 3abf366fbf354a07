# SPDX-License-Identifier: Apache-2.0
"""Chains of pruning and conversion: the file is the live model, each step verifies and is told."""

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
    KEY_HEADS,
    LAYERS,
    WIDTH,
    WIDTHS,
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
    restore_,
)
from sparse_unified.checkpoint import Checkpoint, convert, info, invert, prune, verify
from sparse_unified.cli import main
from sparse_unified.experts.keep import Budget
from sparse_unified.fixtures import write_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


GEN_HALF = PruneWidthConfig(component="gen", keep_ratio=0.5)
BOTH = PruneHeadsConfig(component="both", keep_ratio=0.5)
BLOCKS = PruneWidthConfig(component="gen", keep_ratio=2 / 3, budget="global", block_size=16)
UND_BLOCKS = PruneWidthConfig(component="und", budget=Budget.GLOBAL, block_size=16)
FOUR = {"num_experts": 4, "top_k": 2}
SHARED = {"num_experts": 3, "top_k": 2, "num_shared_experts": 1}

# A list of modes is pruned, options of a conversion convert.
CHAINS: dict[str, list[Any]] = {
    "width": [WIDTHS],
    "heads of both": [[PruneHeadsConfig(component="both", keep_ratio=0.75, budget="global")]],
    "all": [[*DEPTH, *WIDTHS[:1], *FEWER_HEADS[:1]]],
    "all, depth last": [[*WIDTHS, *FEWER_HEADS, *DEPTH]],
    "experts, width": [FOUR, [GEN_HALF]],
    "two shared, width": [FOUR | {"num_shared_experts": 2}, [GEN_HALF]],
    "width, experts, heads, depth": [[BLOCKS], FOUR, [BOTH], [DEPTH[3], DEPTH[0]]],
    "width, experts, width and heads, depth": [[BLOCKS], FOUR, [GEN_HALF, BOTH], DEPTH[:1]],
    "width, shared experts": [[UND_BLOCKS], SHARED | {"component": "und", "layers": "all"}],
    "again and again": [
        [PruneWidthConfig(component="gen", keep_ratio=0.75), FEWER_HEADS[0]],
        [GEN_HALF, FEWER_HEADS[1]],
        [PruneHeadsConfig(component="und", keep_ratio=0.5, layers=[0]), *DEPTH],
        [GEN_HALF],
    ],
    "all sparse layers go": [FOUR, [SkipLayersConfig(component="gen", layers=[1, 2])]],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_in_files_is_the_chain_on_the_live_model(
    name: str, dense: Path, tmp_path: Path
) -> None:
    live, paths, modes = small_bagel(), [dense], []
    for number, step in enumerate(CHAINS[name]):
        out = tmp_path / str(number)
        if isinstance(step, dict):
            convert(paths[-1], out, **step)
            apply_moe_(live, MoEConfig(**step))
            modes.append("moe")
        else:
            before = count_parameters(live)
            report = prune(paths[-1], out, step)
            apply_live(live, step)
            modes += [mode.mode for mode in step]
            assert (report.before, report.after) == (before, count_parameters(live))
            sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
            assert report.bytes_written == sum(sizes) < report.bytes_before
            assert json.loads(report.to_json())["steps"]
            assert "FLOPs per token" in report.to_text()
        loaded = load(out)
        weights = loaded.state_dict()
        assert set(weights) == set(live.state_dict()) == set(Checkpoint(out).specs)
        assert all(torch.equal(weights[key], value) for key, value in live.state_dict().items())
        assert not info(out).problems
        for against in paths:
            verdict = verify(out, against)
            assert verdict.ok, verdict.to_text()
            assert all(len(p.removed) == p.total - p.kept > 0 for p in verdict.pruned)
        paths.append(out)
    assert_equal(outputs(live), outputs(loaded))
    assert_equal(outputs(loaded), outputs(copy.deepcopy(loaded)))
    assert [step["mode"] for step in info(paths[-1]).recipe] == modes
    restore_(live)
    assert_equal(outputs(live), outputs(small_bagel()))


def test_a_sparse_checkpoint_of_another_tool_is_pruned(tmp_path: Path) -> None:
    source = write_checkpoint(GOLDEN / "t2i_moe", tmp_path / "source")
    assert not (source / "sparse_unified.json").exists()
    modes = [SkipLayersConfig(component="gen", layers=[1]), PruneHeadsConfig(component="both")]
    prune(source, tmp_path / "out", modes)
    live = load(source)
    apply_live(live, modes)
    weights = load(tmp_path / "out").state_dict()
    assert all(torch.equal(weights[key], value) for key, value in live.state_dict().items())
    assert not info(tmp_path / "out").problems
    assert verify(tmp_path / "out", source).ok


def test_invert_gives_the_pruned_checkpoint_back_and_refuses_what_it_cannot(
    dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "narrow", WIDTHS)
    convert(tmp_path / "narrow", tmp_path / "sparse", **FOUR)
    invert(tmp_path / "sparse", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "narrow")
    prune(tmp_path / "sparse", tmp_path / "shallow", DEPTH[:1])
    with pytest.raises(ValueError, match=r"last step in sparse_unified.json must be .*got a depth"):
        invert(tmp_path / "shallow", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_load_moe_takes_experts_into_models_that_are_as_wide(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "sparse", **FOUR)
    prune(tmp_path / "sparse", tmp_path / "out", GEN_HALF)
    model = small_bagel()
    with pytest.raises(ValueError, match=r"load_moe_.*\[48, 64\] in the file, \[96, 64\]"):
        load_moe_(model, tmp_path / "out")
    prune_width_(model, GEN_HALF)
    load_moe_(model, tmp_path / "out")
    expected = load(tmp_path / "out").state_dict()
    for key, value in model.state_dict().items():
        if ".mlp_moe_gen.experts." in key:
            assert torch.equal(value, expected[key])


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
    config = json.loads((tmp_path / "out" / "llm_config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS
    assert verify(tmp_path / "out", dense).ok


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_scores_decide_and_may_come_from_a_file(form: str, dense: Path, tmp_path: Path) -> None:
    sizes = (("gen", WIDTH, ""), ("und", WIDTH, ""), ("gen", KEY_HEADS, ".heads"))
    scores = {
        f"{name}{end}": {i: torch.rand(size) for i in range(LAYERS)} for name, size, end in sizes
    }
    heads = PruneHeadsConfig(component="gen")
    live = small_bagel()
    for width in WIDTHS:
        prune_width_(live, width, {width.component: scores[width.component]})
    prune_heads_(live, heads, {"gen": scores["gen.heads"]})
    flat = {f"{n}.{i}{e}": scores[n + e][i] for n, _, e in sizes for i in range(LAYERS)}
    save_file(flat, tmp_path / "scores.safetensors")
    given = tmp_path / "scores.safetensors" if form == "file" else scores
    report = prune(dense, tmp_path / "out", [*WIDTHS, heads], scores=given)
    assert_equal(outputs(live), outputs(load(tmp_path / "out")))
    assert report.steps[0]["scores"] == ("file scores.safetensors" if form == "file" else "given")


def test_given_scores_are_in_expert_order_and_random_ones_repeat(
    dense: Path, tmp_path: Path
) -> None:
    convert(dense, tmp_path / "sparse", **FOUR)
    scores = torch.zeros(LAYERS, WIDTH)
    scores[:, 1::2] = 1  # every second neuron of each expert
    prune(tmp_path / "sparse", tmp_path / "out", PruneWidthConfig(layers=[1]), scores=scores)
    key = "language_model.model.layers.1.mlp_moe_gen.experts.2.{}_proj.weight"
    old, new = Checkpoint(tmp_path / "sparse"), Checkpoint(tmp_path / "out")
    assert torch.equal(new.read(key.format("gate")), old.read(key.format("gate"))[1::2])
    assert torch.equal(new.read(key.format("down")), old.read(key.format("down"))[:, 1::2])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prune(dense, tmp_path / name, [*WIDTHS, *FEWER_HEADS], seed=seed)
    a, b, c = (snapshot(tmp_path / name)["ema.safetensors"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("experts.1.up_proj", "of its own, got 1 others: experts.1.neuron 0"),
        ("gate", "gate.weight: must be equal, got another value"),
        ("swapped", "neurons must stay in their expert, got others"),
    ],
)
def test_verify_sees_experts_that_are_not_the_ones_pruned(
    what: str, message: str, dense: Path, tmp_path: Path
) -> None:
    convert(dense, tmp_path / "sparse", **FOUR)
    prune(tmp_path / "sparse", tmp_path / "out", PruneWidthConfig())
    weights = load_file(tmp_path / "out" / "ema.safetensors")
    prefix = "language_model.model.layers.1.mlp_moe_gen."
    if what == "swapped":
        for name in ("gate_proj", "up_proj", "down_proj"):
            first, second = (f"{prefix}experts.{e}.{name}.weight" for e in (0, 1))
            weights[first], weights[second] = weights[second], weights[first]
    else:
        weights[f"{prefix}{what}.weight"][0, 0] += 1
    save_file(weights, tmp_path / "out" / "ema.safetensors")
    verdict = verify(tmp_path / "out", tmp_path / "sparse")
    (failed,) = [part for part in verdict.pruned if not part.ok]
    assert (verdict.ok, failed.layer, failed.part) == (False, 1, "ffn")
    assert any(message in problem for problem in failed.problems)


def test_the_command_prunes_as_the_function_does(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--component", "und,gen", "--axis", "depth,width,heads", "--keep-ratio", ".5"]
    options += ["--skip-layers", "1", "--skip-part", "ffn", "--block-size", "16"]
    options += ["--budget", "global", "--layers", "all", "--criterion", "random", "--seed", "3"]
    for command, text in (
        (("prune", dense, out, *options), "FLOPs per token"),
        (("verify", out, "--against", dense), "is a part of"),
        (("info", out), "no FFN in 1"),
    ):
        assert main([*map(str, command), "--quiet"]) == 0
        assert text in capsys.readouterr().out
    modes = [
        *(SkipLayersConfig(component=c, layers=[1], part="ffn") for c in ("und", "gen")),
        *(PruneWidthConfig(component=c, block_size=16, budget="global") for c in ("und", "gen")),
        PruneHeadsConfig(component="both", budget="global"),
    ]
    prune(dense, tmp_path / "called", modes, seed=3)
    assert snapshot(out) == snapshot(tmp_path / "called")
