# SPDX-License-Identifier: Apache-2.0
"""Probing: which layers, neurons and heads of a model matter, measured on a task.

Reading order: `adapter` (where things are), `similarity`, `evaluate`, `sweep`, `report`, `plots`.
"""

from sparse_unified.analysis.adapter import (
    LAYOUTS,
    Adapter,
    Block,
    BlockNames,
    DecoderAdapter,
    Ffn,
    FfnKey,
    Layout,
    find_adapter,
)
from sparse_unified.analysis.similarity import (
    LayerSimilarity,
    Similarity,
    measure_similarity,
)

__all__ = [
    "LAYOUTS",
    "Adapter",
    "Block",
    "BlockNames",
    "DecoderAdapter",
    "Ffn",
    "FfnKey",
    "LayerSimilarity",
    "Layout",
    "Similarity",
    "find_adapter",
    "measure_similarity",
]
