# SPDX-License-Identifier: Apache-2.0
"""Who goes where: which neuron of a dense FFN is whose, and which layers are split."""

from sparse_unified.partition.heads import HeadPlan, plan_heads
from sparse_unified.partition.keep import Budget, keep_units
from sparse_unified.partition.layout import ExpertLayout
from sparse_unified.partition.scores import (
    as_scores,
    check_scores,
    head_magnitude_scores,
    joint_scores,
    magnitude_scores,
    random_scores,
)
from sparse_unified.partition.select import select_layers
from sparse_unified.partition.snake import snake_partition

__all__ = [
    "Budget",
    "ExpertLayout",
    "HeadPlan",
    "as_scores",
    "check_scores",
    "head_magnitude_scores",
    "joint_scores",
    "keep_units",
    "magnitude_scores",
    "plan_heads",
    "random_scores",
    "select_layers",
    "snake_partition",
]
