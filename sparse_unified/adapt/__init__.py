# SPDX-License-Identifier: Apache-2.0
"""Adaptation: tuning of a converted or pruned model, from frozen experts to all of its weights."""

from sparse_unified.adapt.config import RunConfig, SequenceConfig, Stage, TrainingConfig, freeze
from sparse_unified.adapt.memory import estimate_memory
from sparse_unified.adapt.router_init import init_router_
from sparse_unified.adapt.run import adapt
from sparse_unified.adapt.saving import merge_lora
from sparse_unified.adapt.trainer import Trainer

__all__ = [
    "RunConfig",
    "SequenceConfig",
    "Stage",
    "Trainer",
    "TrainingConfig",
    "adapt",
    "estimate_memory",
    "freeze",
    "init_router_",
    "merge_lora",
]
