# SPDX-License-Identifier: Apache-2.0
"""Probing: which layers, neurons and heads of a model matter, measured on a task.

Reading order: `adapter` (where things are), `collect`, `statistics`, `criteria` (what neurons do),
`similarity`, `evaluate`, `sweep`, `report`, `plots`.
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
from sparse_unified.analysis.collect import Collector, collect
from sparse_unified.analysis.criteria import CRITERIA, Criterion, save_scores, score
from sparse_unified.analysis.similarity import (
    LayerSimilarity,
    Similarity,
    measure_similarity,
)
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.sums import FfnSums, StatisticsConfig, hash_ffns

__all__ = [
    "CRITERIA",
    "LAYOUTS",
    "Adapter",
    "Block",
    "BlockNames",
    "Collector",
    "Criterion",
    "DecoderAdapter",
    "Ffn",
    "FfnKey",
    "FfnStatistics",
    "FfnSums",
    "LayerSimilarity",
    "Layout",
    "Similarity",
    "StatisticsConfig",
    "collect",
    "find_adapter",
    "hash_ffns",
    "measure_similarity",
    "save_scores",
    "score",
]
