# SPDX-License-Identifier: Apache-2.0
"""Model directories: reading them, and turning dense ones into sparse ones and back."""

from sparse_unified.checkpoint.convert import ConvertReport, convert
from sparse_unified.checkpoint.counts import Counts
from sparse_unified.checkpoint.ffn import SparseLayer
from sparse_unified.checkpoint.info import ComponentInfo, Info, info
from sparse_unified.checkpoint.invert import InvertReport, invert
from sparse_unified.checkpoint.layout import MoELayout
from sparse_unified.checkpoint.modes import (
    AdaptConfig,
    MoEConfig,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.prune import PrunedCheckpoint, prune
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.recipe import Recipe, Step
from sparse_unified.checkpoint.safetensors_file import TensorSpec
from sparse_unified.checkpoint.verify import LayerVerdict, VerifyReport, verify

__all__ = [
    "AdaptConfig",
    "Checkpoint",
    "ComponentInfo",
    "ConvertReport",
    "Counts",
    "Info",
    "InvertReport",
    "LayerVerdict",
    "MoEConfig",
    "MoELayout",
    "Part",
    "PruneHeadsConfig",
    "PruneWidthConfig",
    "PrunedCheckpoint",
    "Recipe",
    "SkipLayersConfig",
    "SparseLayer",
    "Step",
    "TensorSpec",
    "VerifyReport",
    "convert",
    "info",
    "invert",
    "prune",
    "verify",
]
