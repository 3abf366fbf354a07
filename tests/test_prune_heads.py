# SPDX-License-Identifier: Apache-2.0
"""Fewer heads of a live model compute what zeroed ones do, and leave the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prune_models import (
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    LAYERS,
    SUFFIX,
    assert_close,
    contexts,
    differs,
    layer_of,
    outputs,
    small_bagel,
)
from torch import Tensor

from sparse_unified import (
    PruneHeadsConfig,
    SkipLayersConfig,
    prune_heads_,
    skip_layers_,
)
from sparse_unified.bagel import Bagel

PER_GROUP = HEADS // KEY_HEADS * HEAD_DIM


def zero_heads(model: Bagel, component: str, kept: dict[int, list[int]]) -> None:
    """Zeroes the output columns of all groups but the kept ones."""
    for i, groups in kept.items():
        weight = getattr(layer_of(model, i).self_attn, f"o_proj{SUFFIX[component]}").weight
        with torch.no_grad():
            for group in set(range(KEY_HEADS)) - set(groups):
                weight[:, group * PER_GROUP : (group + 1) * PER_GROUP] = 0


def scores_for(kept: dict[int, list[int]]) -> dict[int, Tensor]:
    """Scores that keep exactly these groups."""
    return {
        i: torch.tensor([float(group in groups) for group in range(KEY_HEADS)])
        for i, groups in kept.items()
    }


UND = {0: [0, 2], 1: [2, 3], 2: [0, 1], 3: [1, 3]}
GEN = {0: [0, 2], 1: [0, 1], 2: [1, 3], 3: [0, 1]}


@pytest.mark.parametrize(
    ("und", "gen"), [(UND, None), (None, GEN), (UND, GEN)], ids=["und", "gen", "both"]
)
def test_pruned_heads_are_as_if_their_output_were_zero(und: Any, gen: Any) -> None:
    model, zeroed = small_bagel(), small_bagel()
    for component, kept in (("und", und), ("gen", gen)):
        if kept is not None:
            zero_heads(zeroed, component, kept)
            config = PruneHeadsConfig(component=component, keep_ratio=0.5)
            prune_heads_(model, config, {component: scores_for(kept)})
    assert differs(outputs(model), outputs(small_bagel()))
    assert_close(outputs(model), outputs(zeroed))
    for i in range(LAYERS):
        attention = layer_of(model, i).self_attn
        seen = set(und[i] if und else range(KEY_HEADS)) | set(gen[i] if gen else range(KEY_HEADS))
        for suffix, kept in (("", und), ("_moe_gen", gen)):
            groups = KEY_HEADS if kept is None else len(kept[i])
            assert getattr(attention, f"q_proj{suffix}").out_features == groups * PER_GROUP
            assert getattr(attention, f"o_proj{suffix}").in_features == groups * PER_GROUP
            assert getattr(attention, f"k_proj{suffix}").out_features == len(seen) * HEAD_DIM
            assert getattr(attention, f"v_proj{suffix}").out_features == len(seen) * HEAD_DIM


def test_heads_that_nobody_reads_leave_the_cache() -> None:
    model = small_bagel()
    report = prune_heads_(model, PruneHeadsConfig(component="both", keep_ratio=0.5))
    keys = [key for context in contexts(model) for key in context.keys if key is not None]
    assert {key.shape[0] for key in keys} == {KEY_HEADS // 2}
    assert report.after.kv_bytes_per_token * 2 == report.before.kv_bytes_per_token
    assert report.after.flops_per_pair * 2 == report.before.flops_per_pair


def test_both_components_lose_the_same_heads() -> None:
    model, zeroed = small_bagel(), small_bagel()
    for component in ("und", "gen"):
        zero_heads(zeroed, component, UND)
    scores = {"und": scores_for(UND), "gen": scores_for(UND)}
    prune_heads_(model, PruneHeadsConfig(component="both", keep_ratio=0.5), scores)
    assert_close(outputs(model), outputs(zeroed))


def test_heads_are_pruned_again_of_what_is_left() -> None:
    model, zeroed = small_bagel(), small_bagel()
    zero_heads(zeroed, "und", {0: [2]})
    zero_heads(zeroed, "gen", {0: [1]})
    for component, first, second in (
        ("und", [0, 0, 1, 1], [1, 0]),
        ("gen", [0, 1, 1, 0], [1, 0]),
    ):
        config = PruneHeadsConfig(component=component, layers=[0], keep_ratio=0.5)
        for values in (first, second):
            prune_heads_(model, config, {0: torch.tensor(values, dtype=torch.float32)})
    assert layer_of(model, 0).self_attn.k_proj.out_features == 2 * HEAD_DIM
    assert_close(outputs(model), outputs(zeroed))


def test_heads_of_one_component_in_a_layer_that_the_other_skips() -> None:
    model, zeroed = small_bagel(), small_bagel()
    skip = SkipLayersConfig(component="und", layers=[1], part="attention")
    skip_layers_(model, skip)
    skip_layers_(zeroed, skip)
    zero_heads(zeroed, "gen", {1: [1, 3]})
    config = PruneHeadsConfig(component="gen", layers=[1], keep_ratio=0.5)
    prune_heads_(model, config, scores_for({1: [1, 3]}))
    assert layer_of(model, 1).self_attn.k_proj_moe_gen.out_features == 2 * HEAD_DIM
    assert_close(outputs(model), outputs(zeroed))


def test_heads_are_ranked_by_the_weights_of_values_and_output() -> None:
    model, zeroed = small_bagel(), small_bagel()
    with torch.no_grad():
        for each in (model, zeroed):
            for i in range(LAYERS):
                attention = layer_of(each, i).self_attn
                attention.v_proj_moe_gen.weight[2 * HEAD_DIM : 3 * HEAD_DIM] *= 9
                attention.o_proj_moe_gen.weight[:, :PER_GROUP] *= 9
                attention.k_proj_moe_gen.weight[HEAD_DIM : 2 * HEAD_DIM] *= 99
    zero_heads(zeroed, "gen", {i: [0, 2] for i in range(LAYERS)})
    prune_heads_(model, PruneHeadsConfig(component="gen", keep_ratio=0.5))
    assert_close(outputs(model), outputs(zeroed))
