# SPDX-License-Identifier: Apache-2.0
"""Neurons by rank, by chance or by what they do together; routers from nothing or from that."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_choice import (
    FfnWeights,
    block_ffn,
    compare,
    main,
    sparse_error,
    unit_tokens,
)
from torch import Tensor

from sparse_unified.experts import (
    ExpertLayout,
    fit_router,
    magnitude_scores,
    snake_partition,
)
from sparse_unified.experts.layout import Partition, _assign_evenly, order_neurons
from sparse_unified.experts.router import RouterInit, hidden_activations
from sparse_unified.ops import reference

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


def test_random_depends_on_seed_and_layer_alone() -> None:
    scores = torch.rand(512, generator=torch.Generator().manual_seed(0))

    def drawn(scores: Tensor, seed: int, layer: int) -> Tensor:
        return order_neurons(Partition.RANDOM, scores, LAYOUT, seed=seed, layer=layer)

    assert torch.equal(drawn(scores, 3, 1), drawn(1 - scores, 3, 1))
    assert not torch.equal(drawn(scores, 3, 1), drawn(scores, 3, 2))
    assert not torch.equal(drawn(scores, 3, 1), drawn(scores, 4, 1))


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
    similarity = torch.tensor(
        [[1.0, 0.9], [0.95, 0.0]]
    )  # both prefer expert 0, which has one place
    assert _assign_evenly(similarity).tolist() == [1, 0]


def test_hidden_activations_are_those_of_the_ffn(ffn: FfnWeights) -> None:
    x = unit_tokens(5)
    gate, up = ffn.gate_proj.repeat(3, 1), ffn.up_proj.repeat(3, 1)  # more than one tile
    for tokens in (x, x.bfloat16().float()):
        expected = torch.nn.functional.silu(tokens @ gate.t()) * (tokens @ up.t())
        torch.testing.assert_close(hidden_activations(tokens, gate, up), expected)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (None, r"shape \[N, 512\], got None"),
        (torch.zeros(9, 511), r"shape \[N, 512\], got \[9, 511\]"),
        (torch.zeros(7, 512), "at least 8 tokens, got 7 tokens"),
        (torch.full((9, 512), torch.nan), "be finite"),
    ],
)
def test_unfit_activations_are_refused(hidden: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"order_neurons: hidden must .*{message}"):
        order_neurons(Partition.COACTIVATION, torch.rand(512), LAYOUT, hidden=hidden)


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


@pytest.mark.parametrize("partition", list(Partition))
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


def test_measurement_prints_a_table_per_ffn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--blocks-only"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| coactivation | ") == 3
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])


def test_logits_keep_the_output_unbiased(ffn: FfnWeights) -> None:
    # Along the dense output, the sparse one neither shrinks nor grows by more than the logits do.
    seen, unseen = unit_tokens(512, seed=1), unit_tokens(512, seed=2)
    hidden = hidden_activations(seen, ffn.gate_proj, ffn.up_proj)
    index = order_neurons(Partition.COACTIVATION, magnitude_scores(*ffn), LAYOUT, hidden=hidden)
    weights = ffn.ordered(index)
    router = fit_router(seen, *weights, LAYOUT, 16).weight
    logits = unseen @ router.t()
    assert float(logits.mean()) == pytest.approx(0, abs=1e-3)
    assert sparse_error(ffn, index, router, unseen, top_k=16) < 0.1


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


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(9, 63), r"shape \[N, 64\] of at least 8 tokens, got \[9, 63\]"),
        (torch.zeros(7, 64), r"at least 8 tokens, got \[7, 64\]"),
        (torch.zeros(9, 64, dtype=torch.int64), "floating point, got torch.int64"),
        (
            torch.zeros(9, 64).index_fill(0, torch.tensor(3), torch.inf),
            "finite",
        ),
    ],
)
def test_unfit_inputs_are_refused(ffn: FfnWeights, inputs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"fit_router: inputs must .*{message}"):
        fit_router(inputs, *ffn, LAYOUT, 8)
