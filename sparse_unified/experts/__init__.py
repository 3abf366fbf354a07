# SPDX-License-Identifier: Apache-2.0
"""Who goes where: which neuron of a dense FFN is whose, and which layers are split."""

from sparse_unified.experts.choice import Partition, order_neurons, random_partition
from sparse_unified.experts.coactivation import (
    check_inputs,
    coactivation_partition,
    hidden_activations,
)
from sparse_unified.experts.experts import check_experts, keep_in_experts
from sparse_unified.experts.heads import HeadPlan, plan_heads
from sparse_unified.experts.keep import Budget, keep_units
from sparse_unified.experts.layout import ExpertLayout
from sparse_unified.experts.router import RouterFit, RouterInit, fit_router, random_router
from sparse_unified.experts.scores import (
    as_scores,
    check_scores,
    head_magnitude_scores,
    joint_scores,
    magnitude_scores,
    random_scores,
)
from sparse_unified.experts.select import select_layers
from sparse_unified.experts.snake import snake_partition

__all__ = [
    "Budget",
    "ExpertLayout",
    "HeadPlan",
    "Partition",
    "RouterFit",
    "RouterInit",
    "as_scores",
    "check_experts",
    "check_inputs",
    "check_scores",
    "coactivation_partition",
    "fit_router",
    "head_magnitude_scores",
    "hidden_activations",
    "joint_scores",
    "keep_in_experts",
    "keep_units",
    "magnitude_scores",
    "order_neurons",
    "plan_heads",
    "random_partition",
    "random_router",
    "random_scores",
    "select_layers",
    "snake_partition",
]
