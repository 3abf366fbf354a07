# SPDX-License-Identifier: Apache-2.0
"""Probing: which layers, neurons and heads of a model matter, measured on a task.

Reading order: `parts` and `adapter` (where things are), `sums`, `collect`, `statistics`, `criteria`
(what neurons do), `similarity`, `samples`, `evaluate` (what an evaluator is), `metrics` (BAGEL's),
`geneval`, `cost`, `points`, `stand_in`, `surgery`, `head_surgery` and `transforms` (smaller
models), `store`, `probe`, `task_run`, `sweep`, `bagel_probes`, `results`, `plots`; `usage`,
`expert_usage`, `usage_plot`.
"""

from sparse_unified.analysis.activation import ActivationMap, activation_maps
from sparse_unified.analysis.bagel_probes import bagel_probe
from sparse_unified.analysis.calibrate import calibrate
from sparse_unified.analysis.collect import Collector, collect
from sparse_unified.analysis.cost import Cost, measure_cost
from sparse_unified.analysis.criteria import CRITERIA, Criterion, save_scores, score
from sparse_unified.analysis.evaluate import Better, Evaluator, evaluator, load_evaluator
from sparse_unified.analysis.expert_usage import ExpertWatch, expert_usage, watch_experts
from sparse_unified.analysis.geneval import GenEvalImages, read_metadata, write_geneval
from sparse_unified.analysis.metrics import DenseDistance, Settings, TextAgreement, VelocityError
from sparse_unified.analysis.plots import write_plots
from sparse_unified.analysis.points import Axis, Point, SweepConfig
from sparse_unified.analysis.probe import Probe
from sparse_unified.analysis.results import PointResult, SweepResult, TaskResult
from sparse_unified.analysis.samples import Sample, Task, built_in_samples, read_samples
from sparse_unified.analysis.similarity import (
    LayerSimilarity,
    Similarity,
    measure_similarity,
)
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.sums import FfnSums, StatisticsConfig, hash_ffns
from sparse_unified.analysis.sweep import run_sweep
from sparse_unified.analysis.usage import ExpertUsage, LayerUsage
from sparse_unified.analysis.usage_plot import write_usage_plot
from sparse_unified.surgery.decoder import (
    LAYOUTS,
    Adapter,
    Block,
    BlockNames,
    Ffn,
    FfnKey,
    Layout,
    find_adapter,
)
from sparse_unified.surgery.temporary import (
    Attention,
    fewer_heads,
    narrowed,
    read_attention,
    without_layers,
    without_part,
)

__all__ = [
    "CRITERIA",
    "LAYOUTS",
    "ActivationMap",
    "Adapter",
    "Attention",
    "Axis",
    "Better",
    "Block",
    "BlockNames",
    "Collector",
    "Cost",
    "Criterion",
    "DenseDistance",
    "Evaluator",
    "ExpertUsage",
    "ExpertWatch",
    "Ffn",
    "FfnKey",
    "FfnStatistics",
    "FfnSums",
    "GenEvalImages",
    "LayerSimilarity",
    "LayerUsage",
    "Layout",
    "Point",
    "PointResult",
    "Probe",
    "Sample",
    "Settings",
    "Similarity",
    "StatisticsConfig",
    "SweepConfig",
    "SweepResult",
    "Task",
    "TaskResult",
    "TextAgreement",
    "VelocityError",
    "activation_maps",
    "bagel_probe",
    "built_in_samples",
    "calibrate",
    "collect",
    "evaluator",
    "expert_usage",
    "fewer_heads",
    "find_adapter",
    "hash_ffns",
    "load_evaluator",
    "measure_cost",
    "measure_similarity",
    "narrowed",
    "read_attention",
    "read_metadata",
    "read_samples",
    "run_sweep",
    "save_scores",
    "score",
    "watch_experts",
    "without_layers",
    "without_part",
    "write_geneval",
    "write_plots",
    "write_usage_plot",
]
