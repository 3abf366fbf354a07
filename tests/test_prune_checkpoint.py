# SPDX-License-Identifier: Apache-2.0
"""Chains of pruning and conversion: the file is the live model; what cannot be is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_weights, snapshot
from prune_models import (
    DEPTH,
    FEWER_HEADS,
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
from refusals import refused
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
    restore_,
)
from sparse_unified.analysis import save_scores, score
from sparse_unified.checkpoint import Checkpoint, convert, info, invert, prune, verify
from sparse_unified.experts.keep import Budget


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


def test_a_sparse_checkpoint_of_another_tool_is_pruned(golden: Any, tmp_path: Path) -> None:
    source = golden("t2i_moe")
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
    refused(r"load_moe_.*\[48, 64\] in the file, \[96, 64\]", load_moe_, model, tmp_path / "out")
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


@pytest.mark.parametrize("experts", [FOUR, FOUR | {"num_shared_experts": 2}], ids=["4", "4+2"])
def test_a_scores_file_is_of_the_model_it_names(
    experts: dict[str, int], dense: Path, tmp_path: Path
) -> None:
    path, directory, out = (tmp_path / name for name in ("scores.safetensors", "sparse", "out"))
    live = load(dense)
    save_scores(path, score("magnitude", live), model=live)
    # Experts, in a file or live, have their neurons in another order than the dense FFN.
    convert(dense, directory, **experts, scores=path)
    sparse = load(directory)
    match = "must be of this model, whose gen FFNs have the hash .*; calibrate this model, or"
    refuse(match, directory, tmp_path, GEN_HALF, scores=path)
    for model, run, config in (
        (sparse, prune_width_, GEN_HALF),
        (small_bagel(seed=1), prune_width_, GEN_HALF),
        (small_bagel(seed=1), prune_heads_, PruneHeadsConfig()),
        (small_bagel(seed=1), apply_moe_, MoEConfig(**experts)),
    ):
        refused(f"{run.__name__}: scores: .*{match}", run, model, config, path)
    refused("data to tell a model", prune_width_, small_bagel().to("meta"), GEN_HALF, path)
    apply_moe_(live, MoEConfig(**experts), path)
    assert_equal(outputs(live), outputs(sparse))
    # Those of the sparse model are taken, wherever it is.
    save_scores(path, score("magnitude", sparse), model=SimpleNamespace(model=sparse))
    prune(directory, out, GEN_HALF, scores=path)
    prune_width_(sparse, GEN_HALF, path)
    assert_equal(outputs(sparse), outputs(load(out)))


# What cannot be pruned or read as pruned is refused by name, and damage is found


def refuse(
    match: str, source: Path, tmp_path: Path, modes: Any, error: type = ValueError, **how: Any
) -> None:
    refused(match, prune, source, tmp_path / "refused", modes, error=error, **how)
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]


WHOLE = PruneWidthConfig()
NAN = torch.rand(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
NAN[2, 5] = float("nan")


@pytest.mark.parametrize(
    ("modes", "how", "match"),
    [
        ([], {}, "modes must name at least one"),
        (PruneWidthConfig(layers=[0, 4]), {}, "layers must lie in 0 to 3, got 4"),
        (PruneWidthConfig(block_size=36), {}, "gen layer 0: block_size must divide the 96"),
        (WHOLE, {"scores": NAN}, "prune: layer 2: scores must be finite, got nan for neuron 5"),
        (WHOLE, {"scores": NAN[:, :9]}, r"layer 0: scores must have shape \[96\], got \[9\]"),
        (WHOLE, {"scores": NAN[:3]}, r"scores must have shape \[4 layers"),
        (WHOLE, {"scores": {"und": NAN}}, "scores must hold gen, got und"),
        (WHOLE, {"scores": {"gen": {1: NAN[1]}}}, "scores must have layers 0, 1, 2, 3, got no 0"),
        (FEWER_HEADS[0], {"scores": {"und": NAN}}, "scores must hold und.heads, got und"),
        (WHOLE, {"scores": NAN, "seed": 1}, "scores and seed must not both be given"),
        (WHOLE, {"seed": "one"}, "seed must be an integer, got 'one'"),
        ([WHOLE, WHOLE], {}, "modes must name the width of gen once"),
        ([FEWER_HEADS[0], PruneHeadsConfig(component="both")], {}, "the heads of und once"),
        ([DEPTH[1], PruneWidthConfig(layers=[3])], {}, "must have a gen FFN, got 3"),
        ([DEPTH[2], PruneHeadsConfig(layers=[0])], {}, "must have a gen attention, got 0"),
        ([DEPTH[1], DEPTH[1]], {}, "layers must have a gen block left, got 3"),
        (MoEConfig(), {"error": TypeError}, "modes must be PruneWidthConfig"),
    ],
)
def test_bad_input_is_refused_by_name(
    modes: Any, how: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    refuse(match, dense, tmp_path, modes, **how)


def test_what_experts_cannot_have_is_refused(dense: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    convert(dense, sparse, num_experts=4, top_k=2)
    at = "prune: gen layer 1: "
    refuse(at + "budget must be 'uniform'", sparse, tmp_path, PruneWidthConfig(budget="global"))
    wide = PruneWidthConfig(layers=[1], block_size=32)
    refuse(at + "block_size must divide the 24 neurons of an expert", sparse, tmp_path, wide)
    prune(dense, tmp_path / "a", [DEPTH[3], PruneWidthConfig(layers=[1], keep_ratio=95 / 96)])
    for layers, match in (
        ([2], "layers must have a gen FFN, got 2"),
        ("middle", r"gen layer 1: ExpertLayout: .*divide the 95 neurons"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(tmp_path / "a", tmp_path / "b", num_experts=4, top_k=2, layers=layers)


def test_components_that_a_file_lacks_are_refused(dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    edit_weights(
        source, lambda w: [w.pop(k) for k in list(w) if ".layers." in k and "moe_gen" in k]
    )
    refuse("layers must have a gen FFN, got", source, tmp_path, PruneWidthConfig())
    refuse("layers must have a gen attention", source, tmp_path, PruneHeadsConfig())
    refuse("layers must have a gen block left", source, tmp_path, DEPTH[1])


@pytest.mark.parametrize("number", [2, 8])
def test_heads_need_their_number_in_the_config(number: int, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    edit_config(source, num_key_value_heads=number)
    match = "num_key_value_heads must be what the attention of gen layer 0 has"
    refuse(match, source, tmp_path, PruneHeadsConfig())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format_version=2), "format must be sparse_unified.recipe 1, got"),
        (lambda c: c.update(steps={}), "steps must be a list, got dict"),
        (lambda c: c["steps"].append(3), "step 3: mode must be one of moe, width, heads, depth"),
        (lambda c: c["steps"][0]["config"].pop("budget"), "step 0: config must have block_size"),
        (lambda c: c["steps"][0].update(extra=1), "step 0: width step must .*got .'extra'"),
        (lambda c: c["steps"][0]["config"].update(keep_ratio=2), "step 0: PruneWidthConfig: keep"),
        (lambda c: c["steps"][0]["config"].update(layers="all"), "layers must be a list of ind"),
        (lambda c: c["steps"][0].pop("widths"), "width step must have widths for its layers"),
        (lambda c: c["steps"][0]["widths"].update({"0": 0}), "layer 0: width must be an integer"),
        (lambda c: c["steps"][0]["widths"].update({"0": 97}), "must be 1 to the 96 neurons left"),
        (lambda c: c["steps"][0]["widths"].update({"0": 32}), "got 48 neurons in layer 0, not 32"),
        (lambda c: c["steps"][2].update(widths={"1": 3}), "depth step must have no results"),
        (lambda c: c["steps"][2]["config"].update(layers=[9]), "layers must be 0 to 3, got 9"),
        (lambda c: c["steps"][1]["heads"].update({"0": {}}), "layer 0: heads must have keys"),
        (lambda c: c["steps"][1]["heads"]["0"].update(und=[1, 0]), "und must be ascending"),
        (lambda c: c["steps"][1]["heads"]["0"].update(keys=[0]), "must be among its keys"),
        (
            lambda c: c["steps"][1]["heads"]["0"].update(keys=[0, 1, 2, 3, 9], gen=[0, 9]),
            "gen heads of layer 0 must be some of",
        ),
        (lambda c: c["steps"].pop(2), "got 0 neurons in layer 1, not 48"),
        (lambda c: c["steps"].pop(0), "sparse_unified.json, got 48 neurons in layer 0, not 96"),
        (lambda c: c["steps"].pop(1), "tensors must be those of the model, got misshapen .*q_proj"),
        (lambda c: c["steps"][2]["config"].update(layers=[1, 2]), "48 neurons in layer 2, not 0"),
    ],
)
def test_a_recipe_that_does_not_fit_the_keys_is_refused(
    change: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    modes = [PruneWidthConfig(component="und"), FEWER_HEADS[0], SkipLayersConfig(layers=[1])]
    prune(dense, tmp_path / "out", modes)
    path = tmp_path / "out" / "sparse_unified.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match) as caught:
        load(tmp_path / "out")
    assert any(word in str(caught.value) for word in ("sparse_unified.json", "keys", "tensors"))
    assert info(tmp_path / "out").problems


def test_without_its_recipe_or_config_a_pruned_checkpoint_is_refused(
    dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "out", [*WIDTHS, DEPTH[1]])
    edit_config(tmp_path / "out", intermediate_size=None)
    refused("intermediate_size must be given", load, tmp_path / "out")
    edit_config(tmp_path / "out", intermediate_size=WIDTH)
    (tmp_path / "out" / "sparse_unified.json").unlink()
    refused(r"intermediate_size of llm_config.json, got .* not 96", load, tmp_path / "out")


AT = "language_model.model.layers."
EXPERTS = f"{AT}1.mlp_moe_gen."


def flip(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights[AT + key].view(torch.int32).view(-1)[5:6].bitwise_xor_(1)


def swap_experts(weights: dict[str, Tensor]) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        first, second = (f"{EXPERTS}experts.{e}.{name}.weight" for e in (0, 1))
        weights[first], weights[second] = weights[second], weights[first]


@pytest.mark.parametrize(
    ("steps", "edit", "match"),
    [
        ("width", flip("0.mlp.gate_proj.weight"), r"und layer 0 ffn, 48 neurons must .*neuron 0"),
        ("width", flip("0.self_attn.q_proj.weight"), "q_proj.weight: must be equal, got another"),
        ("width", flip("0.self_attn.o_proj.weight"), "o_proj.weight: must be equal, got another"),
        ("width", flip("0.self_attn.k_proj.bias"), "k_proj.bias: .* another value at element 5"),
        ("width", flip("0.input_layernorm.weight"), "input_layernorm.weight: must be equal"),
        (
            "skip",
            lambda weights: weights.update({f"{AT}1.self_attn.q_norm.weight": torch.ones(8)}),
            "layers.1.self_attn.q_norm.weight: must not be there",
        ),
        ("experts", flip("1.mlp_moe_gen.experts.1.up_proj.weight"), "1 others: experts.1.neuron 0"),
        ("experts", flip("1.mlp_moe_gen.gate.weight"), "gate.weight: must be equal, got another"),
        ("experts", swap_experts, "neurons must stay in their expert, got others"),
    ],
)
def test_verify_names_what_was_changed_since(
    steps: str, edit: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    source, modes = dense, [PruneWidthConfig(component="und"), FEWER_HEADS[0]]
    if steps == "skip":
        modes = [SkipLayersConfig(layers=[1], part="attention")]
    elif steps == "experts":
        source, modes = tmp_path / "sparse", [PruneWidthConfig()]
        convert(dense, source, **FOUR)
    prune(source, tmp_path / "out", modes)
    edit_weights(tmp_path / "out", edit)
    report = verify(tmp_path / "out", source)
    assert not report.ok
    assert re.search(match, report.to_text())
    failed = [(part.layer, part.part) for part in report.pruned if not part.ok]
    assert steps != "experts" or failed == [(1, "ffn")]


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


def rewrite(directory: Path, name: str, **fields: Any) -> None:
    """Sets fields of a JSON file, or tensors of a safetensors file; None removes one."""
    is_json = name.endswith("json")
    path = directory / name
    content: dict[str, Any] = json.loads(path.read_text()) if is_json else load_file(path)
    content = {k: v for k, v in (content | fields).items() if v is not None}
    path.write_text(json.dumps(content)) if is_json else save_file(content, path)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("llm_config.json", {"num_attention_heads": 7}, "a multiple of num_attention_heads = 7"),
        ("llm_config.json", {"num_key_value_heads": 8}, r"k_proj.weight \[32, 64\], not \[64"),
        ("llm_config.json", {"vocab_size": 95}, r"embed_tokens.weight \[96, 64\], not \[95, 64\]"),
        ("llm_config.json", {"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ("llm_config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ("llm_config.json", {"num_hidden_layers": "three"}, "num_hidden_layers must be"),
        ("vit_config.json", {"num_hidden_layers": 4}, "num_hidden_layers must be 2 or 3"),
        ("ema.safetensors", {"llm2vae.bias": None}, "got missing llm2vae.bias"),
        ("ema.safetensors", {"lora": ONE}, "got extra lora"),
        ("ae.safetensors", {"more": ONE}, r"ae.safetensors: .* extra more"),
        ("ae.safetensors", {"decoder.norm_out.bias": None}, r"ae.safetensors: .* missing decoder"),
    ],
)
def test_what_the_loader_refuses_is_listed(
    name: str, fields: Any, match: str, dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    prune(dense, source, [PruneWidthConfig(layers=[1], keep_ratio=0.5)])
    assert not info(source).problems
    rewrite(source, name, **fields)
    refused(r".", load, source)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError("\n".join(info(source).problems))
