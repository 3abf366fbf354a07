# SPDX-License-Identifier: Apache-2.0
"""Sparse FFNs made narrower: as many neurons in every expert, in memory and in a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_models import (
    DEPTH,
    LAYERS,
    WIDTH,
    assert_close,
    assert_equal,
    layer_of,
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
from sparse_unified.experts import ExpertLayout, keep_in_experts

SHARED = pytest.mark.parametrize(("experts", "shared"), [(4, 0), (3, 1), (4, 2)])


def routed_model(experts: int = 4, shared: int = 0, component: str = "gen") -> Any:
    """A model with sparse middle layers whose routers decide."""
    model = small_bagel()
    how = MoEConfig(num_experts=experts, top_k=2, num_shared_experts=shared, component=component)
    apply_moe_(model, how)
    generator = torch.Generator().manual_seed(0)
    for i in (1, 2):
        block = layer_of(model, i).mlp_moe_gen if component == "gen" else layer_of(model, i).mlp
        for router in (block.gate, block.gate_shared, block.gate_img):
            if router is not None:
                router.weight.data.normal_(generator=generator)
    return model


@SHARED
@pytest.mark.parametrize("component", ["gen", "und"])
def test_pruned_neurons_of_experts_are_as_if_their_output_were_zero(
    experts: int, shared: int, component: str
) -> None:
    model = routed_model(experts, shared, component)
    zeroed = copy.deepcopy(model)
    scores = torch.rand(LAYERS, WIDTH)
    kept: dict[int, torch.Tensor] = {}
    name = "mlp_moe_gen" if component == "gen" else "mlp"
    for i in (1, 2):
        block = getattr(layer_of(zeroed, i), name)
        kept[i] = keep_in_experts(scores[i], block.layout, keep_ratio=0.5)
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept[i]] = False
        block.down_proj.data[:, gone] = 0
    before = count_parameters(model)[component]
    dense = outputs(model)
    report = prune_width_(
        model, PruneWidthConfig(component=component, layers="middle"), {component: scores}
    )
    assert_close(outputs(model), outputs(zeroed))
    assert report.before == before
    assert report.after == count_parameters(model)[component]
    assert report.after.flops_per_token < before.flops_per_token
    block = getattr(layer_of(model, 1), name)
    assert block.layout.expert_width == WIDTH // (experts + shared) // 2
    assert block.layout.shared_width == shared * block.layout.expert_width
    assert block.intermediate_size == len(kept[1]) == len(block.gate_proj)
    restored = restore_(model, latest=True)
    assert [part.after for part in restored.parts] == [
        f"{experts} experts of {WIDTH // (experts + shared)} neurons"
    ] * 2
    assert_equal(outputs(model), dense)
    restore_(model)
    assert_equal(outputs(model), outputs(small_bagel()))


@pytest.mark.parametrize(
    ("ratio", "block_size", "width"),
    [(1.0, 1, 24), (0.5, 1, 12), (0.001, 1, 1), (0.3, 8, 8), (0.7, 8, 16)],
)
def test_every_expert_keeps_as_many_of_its_best(ratio: float, block_size: int, width: int) -> None:
    layout = ExpertLayout(intermediate_size=96, num_experts=4)
    scores = torch.rand(96)
    kept = keep_in_experts(scores, layout, keep_ratio=ratio, block_size=block_size)
    assert len(kept) == 4 * width
    assert torch.equal(kept, kept.sort().values)
    for e in range(4):
        start, stop = layout.expert_range(e)
        own = kept[(kept >= start) & (kept < stop)] - start
        blocks = scores[start:stop].view(-1, block_size).sum(1)
        best = blocks.argsort(descending=True)[: width // block_size].sort().values
        assert torch.equal(own.view(-1, block_size)[:, 0] // block_size, best)


def test_a_shared_expert_keeps_a_width_that_its_count_tells() -> None:
    for width, experts, shared in ((96, 3, 1), (96, 4, 2), (101, 3, 4), (100, 4, 2), (74, 2, 5)):
        layout = ExpertLayout(
            intermediate_size=width, num_experts=experts, num_shared_experts=shared
        )
        for ratio in (0.1, 0.5, 0.9, 0.97, 1.0):
            kept = keep_in_experts(torch.rand(width), layout, keep_ratio=ratio)
            by_count = ExpertLayout(
                intermediate_size=len(kept), num_experts=experts, num_shared_experts=shared
            )
            assert by_count.shared_width == (kept < layout.shared_width).sum()
    odd = ExpertLayout(
        intermediate_size=50, num_experts=4, num_shared_experts=1, shared_intermediate_size=30
    )
    kept = keep_in_experts(torch.rand(50), odd, keep_ratio=0.6)
    assert ((kept < 30).sum(), len(kept)) == (18, 18 + 4 * 3)


def test_the_block_keeps_what_it_was_told() -> None:
    model = routed_model(component="und")
    block: Any = layer_of(model, 1).mlp
    block.up_proj.requires_grad_(False)
    block.strict = True
    narrow_model = copy.deepcopy(model)
    prune_width_(narrow_model, PruneWidthConfig(component="und", layers=[1]))
    narrow: Any = layer_of(narrow_model, 1).mlp
    assert (narrow.strict, narrow.training, narrow.top_k) == (True, block.training, 2)
    assert narrow.return_router_logits == block.return_router_logits
    assert not narrow.up_proj.requires_grad
    for name in ("gate", "gate_shared", "gate_img"):
        ours, theirs = (getattr(b, name).weight for b in (narrow, block))
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


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
        "experts.1.up_proj": "expert 1, neuron 0: must be a dense neuron of its own",
        "gate": "gate.weight must be equal, got another",
        "swapped": "neurons must stay in their expert, got one of 1 in 0",
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
