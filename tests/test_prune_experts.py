# SPDX-License-Identifier: Apache-2.0
"""Sparse FFNs made narrower: as many neurons in every expert, in memory and in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_models import (
    DEPTH,
    LAYERS,
    WIDTH,
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
    apply_moe_,
    count_parameters,
    load_moe_,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.checkpoint import Checkpoint, convert, info, prune, verify

SHARED = pytest.mark.parametrize(("experts", "shared"), [(4, 0), (3, 1), (4, 2)])


@SHARED
def test_experts_then_width_in_a_file_is_the_live_model_bit_for_bit(
    experts: int, shared: int, tmp_path: Path
) -> None:
    dense = write_model(tmp_path / "dense")
    how: Any = {"num_experts": experts, "top_k": 2, "num_shared_experts": shared}
    convert(dense, tmp_path / "sparse", **how)
    width = PruneWidthConfig(component="gen", keep_ratio=0.5)
    report = prune(tmp_path / "sparse", tmp_path / "out", width)
    live = small_bagel()
    apply_moe_(live, MoEConfig(**how))
    prune_width_(live, width)
    loaded = load(tmp_path / "out")
    assert_equal(outputs(live), outputs(loaded))
    weights = live.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in loaded.state_dict().items())
    assert report.after == count_parameters(live)
    assert not info(tmp_path / "out").problems
    assert [step["mode"] for step in info(tmp_path / "out").recipe] == ["moe", "width"]
    for against in (dense, tmp_path / "sparse"):
        verdict = verify(tmp_path / "out", against)
        assert verdict.ok, verdict.to_text()
        assert len(verdict.pruned) == LAYERS


def test_width_experts_width_heads_and_depth_compose(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / "dense")] + [tmp_path / str(i) for i in range(4)]
    narrow = PruneWidthConfig(component="gen", keep_ratio=2 / 3, budget="global", block_size=16)
    prune(paths[0], paths[1], narrow)
    convert(paths[1], paths[2], num_experts=4, top_k=2)
    more = [PruneWidthConfig(component="gen", keep_ratio=0.5), PruneHeadsConfig(component="both")]
    prune(paths[2], paths[3], more)
    prune(paths[3], paths[4], DEPTH[:1])
    live = small_bagel()
    prune_width_(live, narrow)
    apply_moe_(live, MoEConfig(num_experts=4, top_k=2))
    prune_width_(live, more[0])
    prune_heads_(live, more[1])
    skip_layers_(live, DEPTH[0])
    assert_equal(outputs(live), outputs(load(paths[4])))
    for i, path in enumerate(paths[1:], 1):
        assert not info(path).problems
        for against in paths[:i]:
            assert verify(path, against).ok, verify(path, against).to_text()
    modes = [step["mode"] for step in info(paths[4]).recipe]
    assert modes == ["width", "moe", "width", "heads", "depth"]
    restore_(live)
    assert_equal(outputs(live), outputs(small_bagel()))


def test_given_scores_are_in_expert_order_and_random_ones_repeat(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    scores = torch.zeros(LAYERS, WIDTH)
    scores[:, 1::2] = 1  # every second neuron of each expert
    prune(tmp_path / "sparse", tmp_path / "out", PruneWidthConfig(layers=[1]), scores=scores)
    key = "language_model.model.layers.1.mlp_moe_gen.experts.2.{}_proj.weight"
    old, new = Checkpoint(tmp_path / "sparse"), Checkpoint(tmp_path / "out")
    assert torch.equal(new.read(key.format("gate")), old.read(key.format("gate"))[1::2])
    assert torch.equal(new.read(key.format("down")), old.read(key.format("down"))[:, 1::2])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prune(tmp_path / "sparse", tmp_path / name, PruneWidthConfig(), seed=seed)
    a, b, c = ((tmp_path / name / "ema.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("what", ["experts.1.up_proj", "gate", "swapped"])
def test_verify_sees_experts_that_are_not_the_ones_pruned(what: str, tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    prune(tmp_path / "sparse", tmp_path / "out", PruneWidthConfig())
    file = tmp_path / "out" / "ema.safetensors"
    weights = load_file(file)
    prefix = "language_model.model.layers.1.mlp_moe_gen."
    if what == "swapped":
        for name in ("gate_proj", "up_proj", "down_proj"):
            first, second = (f"{prefix}experts.{e}.{name}.weight" for e in (0, 1))
            weights[first], weights[second] = weights[second], weights[first]
    else:
        weights[f"{prefix}{what}.weight"][0, 0] += 1
    save_file(weights, file)
    verdict = verify(tmp_path / "out", tmp_path / "sparse")
    assert not verdict.ok
    (failed,) = [part for part in verdict.pruned if not part.ok]
    expected = {
        "experts.1.up_proj": "experts.1, neuron 0: must be a dense neuron of its own",
        "gate": "gate.weight: must be equal, got another value",
        "swapped": "neurons must stay in their expert, got others",
    }
    assert (failed.layer, failed.part) == (1, "ffn")
    assert any(expected[what] in problem for problem in failed.problems)


def test_narrow_experts_load_into_models_that_are_as_wide(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense")
    convert(dense, tmp_path / "sparse", num_experts=4, top_k=2)
    prune(tmp_path / "sparse", tmp_path / "out", PruneWidthConfig())
    model = small_bagel()
    with pytest.raises(ValueError, match=r"load_moe_.*\[48, 64\] in the file, \[96, 64\]"):
        load_moe_(model, tmp_path / "out")
    prune_width_(model, PruneWidthConfig())
    load_moe_(model, tmp_path / "out")
    expected = load(tmp_path / "out").state_dict()
    for key, value in model.state_dict().items():
        if ".mlp_moe_gen.experts." in key:
            assert torch.equal(value, expected[key])
