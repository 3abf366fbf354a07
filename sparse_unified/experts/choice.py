# SPDX-License-Identifier: Apache-2.0
"""Which neuron goes to which expert, by the way that was chosen."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from sparse_unified.experts.coactivation import coactivation_partition
from sparse_unified.experts.layout import ExpertLayout
from sparse_unified.experts.scores import check_scores
from sparse_unified.experts.snake import rank_neurons, snake_partition

_WHERE = "random_partition"


class Partition(str, Enum):
    """How the neurons that the shared expert leaves are dealt to the routed experts."""

    SNAKE = "snake"  # by rank, in turn: every expert gets neurons of every rank; the official way
    RANDOM = "random"  # drawn by seed
    COACTIVATION = "coactivation"  # neurons that fire together go together


def random_partition(scores: Tensor, layout: ExpertLayout, *, seed: int, layer: int = 0) -> Tensor:
    """Orders the neurons of a dense FFN by expert, drawn at random.

    The first `layout.shared_width` neurons by score form the shared expert, as in the snake; the
    rest are shuffled.

    Args:
        scores: importance of each neuron, [I], any float dtype, finite.
        layout: the widths to deal to.
        seed, layer: what is drawn from; the same on every machine.

    Returns:
        neuron_index [I] int64, position in expert order -> dense neuron; a permutation.

    Raises:
        ValueError: scores have another shape or are not finite.
    """
    check_scores(scores, layout.intermediate_size, where=_WHERE)
    ranked = rank_neurons(scores)
    shared, routed = ranked[: layout.shared_width], ranked[layout.shared_width :]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    # From neuron order, so that what is drawn depends on the scores by the shared expert alone.
    drawn = routed.sort().values[torch.randperm(len(routed), generator=generator)]
    return torch.cat([shared, drawn])


def order_neurons(
    partition: Partition,
    scores: Tensor,
    layout: ExpertLayout,
    *,
    seed: int = 0,
    layer: int = 0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Orders the neurons of a dense FFN by expert, the shared expert first.

    Args:
        partition: how. scores: [I]. layout: the widths to deal to.
        seed, layer: of `random_partition` and `coactivation_partition`.
        hidden: [N, I], of `coactivation_partition` alone.

    Returns:
        neuron_index [I] int64, position in expert order -> dense neuron; a permutation.

    Raises:
        ValueError: scores or hidden do not fit, or hidden is not given where it is needed.
    """
    if partition is Partition.SNAKE:
        return snake_partition(scores, layout)
    if partition is Partition.RANDOM:
        return random_partition(scores, layout, seed=seed, layer=layer)
    if hidden is None:
        raise ValueError(
            "order_neurons: hidden must be given for a partition by coactivation, got None"
        )
    return coactivation_partition(scores, layout, hidden, seed=seed, layer=layer)
