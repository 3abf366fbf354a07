# SPDX-License-Identifier: Apache-2.0
"""Who goes where: which neuron of a dense FFN is whose, what stays, and which layers are split."""

from sparse_unified.experts.keep import keep_units, magnitude_scores, random_scores, select_layers
from sparse_unified.experts.layout import (
    ExpertLayout,
    order_neurons,
    snake_partition,
)
from sparse_unified.experts.router import fit_router, random_router

__all__ = [
    "ExpertLayout",
    "fit_router",
    "keep_units",
    "magnitude_scores",
    "order_neurons",
    "random_router",
    "random_scores",
    "select_layers",
    "snake_partition",
]
