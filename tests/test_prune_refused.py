# SPDX-License-Identifier: Apache-2.0
"""What cannot be pruned or read as pruned is refused by name, and damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_weights
from prune_models import DEPTH, FEWER_HEADS, LAYERS, WIDTH, WIDTHS, load, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified import MoEConfig, PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig
from sparse_unified.checkpoint import convert, info, prune, verify
from sparse_unified.cli import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "model")


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
    with pytest.raises(ValueError, match="intermediate_size must be given"):
        load(tmp_path / "out")
    edit_config(tmp_path / "out", intermediate_size=WIDTH)
    (tmp_path / "out" / "sparse_unified.json").unlink()
    with pytest.raises(ValueError, match=r"intermediate_size of llm_config.json, got .* not 96"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("mlp.gate_proj.weight", r"und layer 0 ffn, 48 neurons must .*neuron 5"),
        ("self_attn.q_proj.weight", r"q_proj.weight: must be equal, got another value at element"),
        ("self_attn.o_proj.weight", r"o_proj.weight: must be equal, got another value at element"),
        ("self_attn.k_proj.bias", r"k_proj.bias: must be equal, got another value at element 5"),
        ("input_layernorm.weight", r"input_layernorm.weight: must be equal"),
    ],
)
def test_verify_names_what_was_changed_since(
    key: str, match: str, dense: Path, tmp_path: Path
) -> None:
    prune(dense, tmp_path / "out", [PruneWidthConfig(component="und"), FEWER_HEADS[0]])

    def flip(weights: dict[str, Tensor]) -> None:
        weights[f"language_model.model.layers.0.{key}"].view(torch.int32)[5] ^= 1

    edit_weights(tmp_path / "out", flip)
    report = verify(tmp_path / "out", dense)
    assert not report.ok
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(report.to_text())


def test_verify_sees_keys_of_what_is_skipped(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", [SkipLayersConfig(layers=[1], part="attention")])
    key = "language_model.model.layers.1.self_attn.q_norm.weight"
    edit_weights(tmp_path / "out", lambda weights: weights.update({key: torch.ones(8)}))
    report = verify(tmp_path / "out", dense)
    assert not report.ok
    assert f"{key}: must not be there" in report.to_text()


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


HALF = ["--component", "gen", "--keep-ratio", "0.5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--component", "gen,gen"], "--component: must be different ones of und, gen"),
        (["--component", "gen"], "--keep-ratio must be given with --axis width"),
        (["--component", "gen", "--axis", "height"], "--axis: must be different ones of depth"),
        (["--component", "gen", "--keep-ratio", "0"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--keep-ratio", "nan"], "--keep-ratio: must be above 0"),
        (["--component", "gen", "--axis", "depth"], "--skip-layers must be given with --axis"),
        ([*HALF, "--skip-layers", "1"], "--skip-layers must be given with an --axis that it"),
        ([*HALF, "--seed", "1"], "--seed must be given with --criterion random"),
        ([*HALF, "--scores", "x", "--criterion", "random"], "not allowed with argument"),
    ],
)
def test_wrong_usage_of_the_command(
    options: list[str], message: str, dense: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["prune", str(dense), str(tmp_path / "out"), *options, "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(ValueError, match=r"."):
        load(source)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError("\n".join(info(source).problems))
