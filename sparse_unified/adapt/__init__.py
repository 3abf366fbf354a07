# SPDX-License-Identifier: Apache-2.0
"""Adaptation: tuning of a converted or pruned model, from frozen experts to all of its weights."""

from sparse_unified.adapt.config import (
    RunConfig,
    Schedule,
    SequenceConfig,
    Stage,
    TrainingConfig,
)
from sparse_unified.adapt.freeze import FreezeReport, freeze
from sparse_unified.adapt.memory import MemoryEstimate, estimate_memory
from sparse_unified.adapt.report import AdaptReport, Plan, StepRecord, TrainingReport
from sparse_unified.adapt.router_init import RouterReport, StartedRouter, init_router_
from sparse_unified.adapt.run import adapt, plan
from sparse_unified.adapt.sequences import (
    draw_time,
    editing_sequence,
    generation_sequence,
    understanding_sequence,
)
from sparse_unified.adapt.trainer import SequenceDataset, Trainer

__all__ = [
    "AdaptReport",
    "FreezeReport",
    "MemoryEstimate",
    "Plan",
    "RouterReport",
    "RunConfig",
    "Schedule",
    "SequenceConfig",
    "SequenceDataset",
    "Stage",
    "StartedRouter",
    "StepRecord",
    "Trainer",
    "TrainingConfig",
    "TrainingReport",
    "adapt",
    "draw_time",
    "editing_sequence",
    "estimate_memory",
    "freeze",
    "generation_sequence",
    "init_router_",
    "plan",
    "understanding_sequence",
]
