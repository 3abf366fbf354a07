# SPDX-License-Identifier: Apache-2.0
"""Who goes where: layouts, scores, partitions, first routers, and the choice of layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from routing_choice import FfnWeights, block_ffn, compare, main, sparse_error, unit_tokens
from torch import Tensor

from sparse_unified.experts import ExpertLayout, snake_partition
from sparse_unified.experts.keep import magnitude_scores, random_scores, select_layers
from sparse_unified.experts.layout import Partition, _assign_evenly, order_neurons
from sparse_unified.experts.router import RouterInit, fit_router, hidden_activations
from sparse_unified.ops import reference


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
        ({"num_shared_experts": 93}, "num_experts must divide .* 96 .*num_shared_experts=93"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size must .*got -1"),
        ({"shared_intermediate_size": 96}, "shared_intermediate_size must .*got 96"),
        ({"shared_intermediate_size": 8.0}, r"shared_intermediate_size must .*got 8\.0"),
    ],
)
def test_bad_layouts_are_named(fields: dict[str, Any], message: str) -> None:
    refused(message, ExpertLayout, **{"intermediate_size": 96, "num_experts": 4} | fields)


def test_a_shared_expert_is_of_experts_or_has_a_width_of_its_own() -> None:
    of_bagel = ExpertLayout(intermediate_size=18944, num_experts=31, num_shared_experts=1)
    assert (of_bagel.shared_width, of_bagel.expert_width) == (592, 592)
    layout = ExpertLayout(intermediate_size=64, num_experts=4, shared_intermediate_size=24)
    assert (layout.shared_width, layout.expert_width) == (24, 10)


# The snake


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


# Scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_product_of_the_norms(dtype: torch.dtype) -> None:
    gate, up, down = (torch.randn(s).to(dtype) for s in ((40, 24), (40, 24), (24, 40)))
    scores = magnitude_scores(gate, up, down)
    expected = gate.double().norm(dim=1) * up.double().norm(dim=1) * down.double().norm(dim=0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


def random_order(_: int, *, seed: int, layer: int) -> Tensor:
    scores = torch.rand(512)  # another every time, which must not matter
    return order_neurons(Partition.RANDOM, scores, LAYOUT, seed=seed, layer=layer)


@pytest.mark.parametrize("draw", [random_scores, random_order])
def test_what_is_random_depends_on_seed_and_layer_alone(draw: Any) -> None:
    drawn = draw(50, seed=3, layer=7)
    torch.manual_seed(99)
    assert torch.equal(draw(50, seed=3, layer=7), drawn)
    assert not torch.equal(draw(50, seed=4, layer=7), drawn)
    assert not torch.equal(draw(50, seed=3, layer=8), drawn)
    assert drawn.min() >= 0
    assert draw is random_order or drawn.max() < 1


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
        ("0-99999999999", 28, "must lie in 0 to 27, got 28"),
        ([-1], 28, "must lie in 0 to 27, got -1"),
        ("middle", 2, "must name at least one of 2 layers, got 'middle'"),
        *((text, 28, "must be 'middle', 'all'") for text in ("", "some", "1-", "-3")),
        ([True], 28, "must be integers"),
        (["1"], 28, "must be integers"),
    ],
)
def test_bad_selections_are_named(layers: object, num_layers: int, message: str) -> None:
    refused(message, select_layers, layers, num_layers)


LAYOUT = ExpertLayout(intermediate_size=512, num_experts=16)


@pytest.fixture(scope="module")
def ffn() -> FfnWeights:
    return block_ffn()[0]


def experts(index: Tensor, layout: ExpertLayout) -> list[Tensor]:
    return [index[slice(*layout.expert_range(e))] for e in range(layout.num_experts)]


# Partitions


@given(
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(1, 5),
    st.sampled_from(list(Partition)),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_way_is_a_permutation_with_the_same_shared_expert(
    num_experts: int, shared: int, width: int, partition: Partition, seed: int, silent: bool
) -> None:
    layout = ExpertLayout(
        intermediate_size=(num_experts + shared) * width,
        num_experts=num_experts,
        num_shared_experts=shared,
    )
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layout.intermediate_size, generator=generator)
    hidden = torch.randn(9, layout.intermediate_size, generator=generator)
    if silent:
        hidden.zero_()  # no neuron ever fires: all profiles are the same
    index = order_neurons(partition, scores, layout, seed=seed, hidden=hidden)
    assert index.sort().values.tolist() == list(range(layout.intermediate_size))
    stop = layout.shared_width
    assert torch.equal(index[:stop], snake_partition(scores, layout)[:stop])


@pytest.mark.parametrize("seed", range(2))
def test_coactivation_finds_blocks_that_fire_together(seed: int) -> None:
    ffn, block = block_ffn(seed=seed)
    hidden = hidden_activations(unit_tokens(256), ffn.gate_proj, ffn.up_proj).half()
    scores = magnitude_scores(*ffn)
    index = order_neurons(Partition.COACTIVATION, scores, LAYOUT, hidden=hidden, seed=seed)
    for own in experts(index, LAYOUT):
        assert len(set(block[own].tolist())) == 1
        assert all(a < b for a, b in pairwise(own.tolist()))
    again = order_neurons(Partition.COACTIVATION, scores, LAYOUT, hidden=hidden, seed=seed)
    assert torch.equal(index, again)


def test_neurons_that_lose_most_by_their_second_choice_choose_first() -> None:
    similarity = torch.tensor([[1.0, 0.9], [0.95, 0.0]])  # both prefer expert 0, of one place
    assert _assign_evenly(similarity).tolist() == [1, 0]


def test_hidden_activations_are_those_of_the_ffn(ffn: FfnWeights) -> None:
    x = unit_tokens(5)
    gate, up = ffn.gate_proj.repeat(3, 1), ffn.up_proj.repeat(3, 1)  # more than one tile
    expected = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    torch.testing.assert_close(hidden_activations(x, gate, up), expected)


# Routers


def test_fitted_routers_beat_ties_and_chance_and_coactivation_helps_most(ffn: FfnWeights) -> None:
    # 16 experts, 8 active, measured on tokens the fit has not seen.
    found = compare(ffn, unit_tokens(512, seed=1), unit_tokens(512, seed=2))
    for method in (RouterInit.ZERO, RouterInit.RANDOM):
        for partition in Partition:
            assert found[partition, method] > 0.65  # half of the output is gone: 0.71
    snake = [found[Partition.SNAKE, method] for method in (RouterInit.ACTIVATION, RouterInit.ZERO)]
    assert snake[0] < 0.92 * snake[1]
    assert found[Partition.COACTIVATION, RouterInit.ACTIVATION] < 0.2


@pytest.mark.parametrize("partition", [Partition.SNAKE, Partition.COACTIVATION])
def test_reported_errors_are_those_on_other_tokens(ffn: FfnWeights, partition: Partition) -> None:
    seen, unseen = unit_tokens(512, seed=1), unit_tokens(512, seed=2)
    hidden = hidden_activations(seen, ffn.gate_proj, ffn.up_proj)
    index = order_neurons(partition, magnitude_scores(*ffn), LAYOUT, hidden=hidden)
    fit = fit_router(seen, *ffn.ordered(index), LAYOUT, 8)
    # Every fifth token is held out from the router that the error is told of.
    held_out = torch.arange(512) % 5 == 0
    partial = fit_router(seen[~held_out], *ffn.ordered(index), LAYOUT, 8).weight
    for error, router in ((fit.error, partial), (fit.error_zero, torch.zeros_like(partial))):
        exact = sparse_error(ffn, index, router, seen[held_out])
        assert error == pytest.approx(exact, rel=1e-4)
        assert error == pytest.approx(sparse_error(ffn, index, router, unseen), rel=0.1)
    assert 0.0099 < fit.logit_rms < 0.1001


@pytest.mark.slow
def test_measurement_prints_a_table_per_ffn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--blocks-only"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| coactivation | ") == 3
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])


def test_shared_expert_counts_as_always_there(ffn: FfnWeights) -> None:
    layout = ExpertLayout(intermediate_size=512, num_experts=8, num_shared_experts=8)
    index = snake_partition(magnitude_scores(*ffn), layout)
    weights = ffn.ordered(index)
    x = unit_tokens(60)
    fit = fit_router(x, *weights, layout, 4)
    held_out = x[::5]
    kept = index[: 256 + 4 * 32]  # the shared expert and the first four others
    sparse = reference.swiglu(
        held_out, ffn.gate_proj[kept], ffn.up_proj[kept], ffn.down_proj[:, kept]
    )
    dense = reference.swiglu(held_out, *ffn)
    assert fit.error_zero == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-4)


def test_experts_that_give_nothing_get_a_router_of_zeros(ffn: FfnWeights) -> None:
    weights = (ffn.gate_proj, ffn.up_proj, torch.zeros_like(ffn.down_proj))
    fit = fit_router(unit_tokens(16), *weights, LAYOUT, 8)
    assert not fit.weight.any()
    assert fit.error == 0
