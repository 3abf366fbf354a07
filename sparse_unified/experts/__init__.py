# SPDX-License-Identifier: Apache-2.0
"""Who goes where: which neuron of a dense FFN is whose, what stays, and which layers are split."""

from sparse_unified.experts.keep import Budget, keep_in_experts, keep_units, select_layers
from sparse_unified.experts.layout import (
    ExpertLayout,
    Partition,
    coactivation_partition,
    order_neurons,
    random_partition,
    snake_partition,
)
from sparse_unified.experts.router import (
    RouterFit,
    RouterInit,
    check_inputs,
    fit_router,
    hidden_activations,
    random_router,
)
from sparse_unified.experts.scores import (
    as_scores,
    check_scores,
    head_magnitude_scores,
    joint_scores,
    layer_generator,
    magnitude_scores,
    random_scores,
)

__all__ = [
    "Budget",
    "ExpertLayout",
    "Partition",
    "RouterFit",
    "RouterInit",
    "as_scores",
    "check_inputs",
    "check_scores",
    "coactivation_partition",
    "fit_router",
    "head_magnitude_scores",
    "hidden_activations",
    "joint_scores",
    "keep_in_experts",
    "keep_units",
    "layer_generator",
    "magnitude_scores",
    "order_neurons",
    "random_partition",
    "random_router",
    "random_scores",
    "select_layers",
    "snake_partition",
]
