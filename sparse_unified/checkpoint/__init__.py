# SPDX-License-Identifier: Apache-2.0
"""Model directories: reading, describing and rewriting them.

What makes one directory from another is in `sparse_unified.convert`, and can be imported from here.
"""

from __future__ import annotations

import importlib
from typing import Any

from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import (
    AdaptConfig,
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    Step,
)

# Functions of `sparse_unified.convert`, which stands above the models and this package below them.
_OF_CONVERT = ("convert", "info", "invert", "prune", "verify")

__all__ = [
    "AdaptConfig",
    "Checkpoint",
    "MoEConfig",
    "PruneHeadsConfig",
    "PruneWidthConfig",
    "SkipLayersConfig",
    "Step",
    *_OF_CONVERT,
]


def __getattr__(name: str) -> Any:
    if name in _OF_CONVERT:
        return getattr(importlib.import_module("sparse_unified.convert"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
