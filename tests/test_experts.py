# SPDX-License-Identifier: Apache-2.0
"""Who goes where: layouts, scores, the snake, and the choice of layers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from sparse_unified.experts import (
    ExpertLayout,
    magnitude_scores,
    random_scores,
    select_layers,
    snake_partition,
)


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    num_experts, num_shared = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    width = draw(st.integers(1, 7))
    return ExpertLayout(
        intermediate_size=(num_experts + num_shared) * width,
        num_experts=num_experts,
        num_shared_experts=num_shared,
    )


# Layouts


@given(layouts())
def test_ranges_cover_the_width_once(layout: ExpertLayout) -> None:
    ranges = [(0, layout.shared_width), *map(layout.expert_range, range(layout.num_experts))]
    neurons = [neuron for start, stop in ranges for neuron in range(start, stop)]
    assert neurons == list(range(layout.intermediate_size))
    assert {stop - start for start, stop in ranges[1:]} == {layout.expert_width}


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 3))
def test_a_refused_count_names_only_counts_that_work(
    intermediate_size: int, num_experts: int, num_shared: int
) -> None:
    def build(count: int) -> ExpertLayout:
        return ExpertLayout(
            intermediate_size=intermediate_size, num_experts=count, num_shared_experts=num_shared
        )

    try:
        layout = build(num_experts)
    except ValueError as error:
        counts = str(error).rsplit(": ", 1)[1]
        named = [] if counts == "none" else [int(count) for count in counts.split(", ")]
        assert num_experts not in named
        for count in named:
            build(count)
    else:
        widths = layout.num_experts * layout.expert_width + layout.shared_width
        assert widths == intermediate_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"num_experts": bad}, "num_experts must be an integer") for bad in (0, 2.0, True, "4")),
        ({"intermediate_size": None}, "intermediate_size must be an integer of at least 1"),
        ({"num_shared_experts": -1}, "num_shared_experts must be an integer of at least 0"),
        ({"num_shared_experts": 93}, "num_experts must divide .* 96 .*num_shared_experts=93"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size must .*got -1"),
        ({"shared_intermediate_size": 96}, "shared_intermediate_size must .*got 96"),
        ({"shared_intermediate_size": 8.0}, r"shared_intermediate_size must .*got 8\.0"),
    ],
)
def test_bad_layouts_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLayout(**{"intermediate_size": 96, "num_experts": 4} | fields)


def test_a_shared_expert_is_of_experts_or_has_a_width_of_its_own() -> None:
    of_bagel = ExpertLayout(intermediate_size=18944, num_experts=31, num_shared_experts=1)
    assert (of_bagel.shared_width, of_bagel.expert_width) == (592, 592)
    layout = ExpertLayout(intermediate_size=64, num_experts=4, shared_intermediate_size=24)
    assert (layout.shared_width, layout.expert_width) == (24, 10)


# The snake


def test_recorded_partition_is_reproduced_bit_for_bit() -> None:
    fields = json.loads((GOLDEN / "partition.json").read_text())
    tensors = load_file(GOLDEN / "partition.safetensors")
    layout = ExpertLayout(**fields)
    index = snake_partition(tensors["importance_scores"], layout)
    for owner, (start, stop) in layout.ranges().items():
        own = index[start:stop]
        for projection in ("gate_proj", "up_proj"):
            dense = tensors[f"dense.{projection}.weight"]
            assert torch.equal(tensors[f"moe.{owner}.{projection}.weight"], dense[own])
        dense = tensors["dense.down_proj.weight"]
        assert torch.equal(tensors[f"moe.{owner}.down_proj.weight"], dense[:, own])


def test_scores_are_ranked_in_their_own_precision() -> None:
    layout = ExpertLayout(intermediate_size=4, num_experts=1)
    for dtype, step in ((torch.float64, 1e-12), (torch.bfloat16, 0.1), (torch.float16, 0.1)):
        scores = 1 + torch.tensor([0.0, 2, 1, 3], dtype=dtype) * step
        assert snake_partition(scores, layout).tolist() == [3, 1, 2, 0]


def test_snake_order_by_hand() -> None:
    layout = ExpertLayout(intermediate_size=9, num_experts=3)
    scores = torch.arange(9.0, 0.0, -1.0)  # neuron i has rank i
    assert snake_partition(scores, layout).tolist() == [0, 5, 6, 1, 4, 7, 2, 3, 8]
    shared = ExpertLayout(intermediate_size=9, num_experts=2, num_shared_experts=1)
    assert snake_partition(scores, shared).tolist() == [0, 1, 2, 3, 6, 7, 4, 5, 8]


@given(layouts(), st.integers(0, 3))
def test_partition_is_a_permutation_with_the_best_shared(layout: ExpertLayout, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct scores: ties keep the order of the neurons.
    scores = torch.randint(4, (layout.intermediate_size,), generator=generator).float()
    index = snake_partition(scores, layout).tolist()
    assert sorted(index) == list(range(layout.intermediate_size))
    ranking = sorted(range(len(index)), key=lambda neuron: (-scores[neuron].item(), neuron))
    assert index[: layout.shared_width] == ranking[: layout.shared_width]
    for expert in range(layout.num_experts):
        start, stop = layout.expert_range(expert)
        ranks = [ranking.index(neuron) - layout.shared_width for neuron in index[start:stop]]
        assert [rank // layout.num_experts for rank in ranks] == list(range(layout.expert_width))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(23), r"scores must have shape \[24\], got \[23\]"),
        (torch.ones(2, 24), r"scores must have shape \[24\], got \[2, 24\]"),
        (torch.arange(24), r"scores must be floating point, got torch\.int64"),
        (torch.ones(24).index_fill(0, torch.tensor([5, 9]), math.nan), "got nan for neuron 5"),
        (torch.ones(24).index_fill(0, torch.tensor([5, 9]), -math.inf), "got -inf for neuron 5"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"order_neurons: .*{message}"):
        snake_partition(scores, ExpertLayout(intermediate_size=24, num_experts=4))


# Scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_product_of_the_norms(dtype: torch.dtype) -> None:
    gate, up, down = (torch.randn(s).to(dtype) for s in ((40, 24), (40, 24), (24, 40)))
    scores = magnitude_scores(gate, up, down)
    expected = gate.double().norm(dim=1) * up.double().norm(dim=1) * down.double().norm(dim=0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


def test_random_scores_depend_on_seed_and_layer_alone() -> None:
    scores = random_scores(50, seed=3, layer=7)
    torch.manual_seed(99)
    assert torch.equal(random_scores(50, seed=3, layer=7), scores)
    assert not torch.equal(random_scores(50, seed=4, layer=7), scores)
    assert not torch.equal(random_scores(50, seed=3, layer=8), scores)
    assert scores.min() >= 0
    assert scores.max() < 1


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("middle", tuple(range(1, 27))),
        ("all", tuple(range(28))),
        ("5", (5,)),
        ("3-5, 9,4", (3, 4, 5, 9)),
        ([7, 2, 7], (2, 7)),
        (range(3), (0, 1, 2)),
    ],
)
def test_layers_are_selected(layers: object, expected: tuple[int, ...]) -> None:
    assert select_layers(layers, 28) == expected


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ("26-1", 28, "must ascend in a range, got '26-1'"),
        ("1-28", 28, "must lie in 0 to 27, got 28"),
        ("0-99999999999", 28, "must lie in 0 to 27, got 28"),
        ([-1], 28, "must lie in 0 to 27, got -1"),
        ([], 28, "must name at least one of 28 layers"),
        ("middle", 2, "must name at least one of 2 layers, got 'middle'"),
        *((text, 28, "must be 'middle', 'all'") for text in ("", "some", "1-", "-3")),
        ([True], 28, "must be integers"),
        (["1"], 28, "must be integers"),
    ],
)
def test_bad_selections_are_named(layers: object, num_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(layers, num_layers)
