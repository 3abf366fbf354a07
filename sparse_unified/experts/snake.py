# SPDX-License-Identifier: Apache-2.0
"""The official partition: important neurons are shared, the rest are dealt out in snake order."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unified.experts.layout import ExpertLayout
from sparse_unified.experts.scores import check_scores


def rank_neurons(scores: Tensor) -> Tensor:
    """Returns the neurons [I] int64 on the CPU by score [I], highest first, stable."""
    scores = scores.cpu()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()  # exact; the narrow dtypes do not all sort
    return torch.argsort(scores, descending=True, stable=True)


def snake_partition(scores: Tensor, layout: ExpertLayout) -> Tensor:
    """Orders the neurons of a dense FFN by expert.

    Neurons are sorted by score, in its own precision, highest first and stable. The first
    `layout.shared_width` form the shared expert. The rest are read as rows of E with every second
    row reversed; expert e takes column e, so that every expert gets neurons of every rank.

    Args:
        scores: importance of each neuron, [I], any float dtype, finite.
        layout: the widths to deal to.

    Returns:
        neuron_index [I] int64: `neuron_index[i]` is the dense neuron at position i of the expert
        order. It is a permutation.

    Raises:
        ValueError: scores have another shape or are not finite.

    Source: `dense_to_moe_with_explicit_shared` of the official SparseUnifiedModel code.
    """
    check_scores(scores, layout.intermediate_size, where="snake_partition")
    shared, routed = rank_neurons(scores).split(
        [layout.shared_width, layout.intermediate_size - layout.shared_width]
    )
    rows = routed.view(-1, layout.num_experts).clone()  # [h, E]
    rows[1::2] = rows[1::2].flip(1)
    return torch.cat([shared, rows.t().reshape(-1)])
