# SPDX-License-Identifier: Apache-2.0
"""Which layers, neurons and heads of a model matter, measured on a task.

Reading order: `activation`, `statistics` and `calibration` (what neurons do), `criteria`,
`similarity` (what is ranked), `samples`, `evaluators`, `bagel_task`, `geneval` (what a model is run
on and measured by), `cost`, `points`, `records`, `sweep` (smaller models, point by point),
`expert_usage`, `plots`.
"""

from sparse_unified.analysis.bagel_task import Settings, bagel_probe
from sparse_unified.analysis.calibration import calibrate, collect
from sparse_unified.analysis.cost import Cost, measure_cost
from sparse_unified.analysis.criteria import CRITERIA, save_scores, score
from sparse_unified.analysis.evaluators import Probe, evaluator
from sparse_unified.analysis.expert_usage import ExpertUsage, expert_usage, watch_experts
from sparse_unified.analysis.geneval import write_geneval
from sparse_unified.analysis.plots import write_plots, write_usage_plot
from sparse_unified.analysis.points import SweepConfig
from sparse_unified.analysis.samples import Sample, Task, built_in_samples, read_samples
from sparse_unified.analysis.similarity import Similarity, measure_similarity
from sparse_unified.analysis.statistics import FfnStatistics, StatisticsConfig
from sparse_unified.analysis.sweep import SweepResult, run_sweep
from sparse_unified.surgery.decoder import BlockNames, Layout, find_adapter
from sparse_unified.surgery.temporary import (
    fewer_heads,
    narrowed,
    read_attention,
    without_layers,
    without_part,
)

__all__ = [
    "CRITERIA",
    "BlockNames",
    "Cost",
    "ExpertUsage",
    "FfnStatistics",
    "Layout",
    "Probe",
    "Sample",
    "Settings",
    "Similarity",
    "StatisticsConfig",
    "SweepConfig",
    "SweepResult",
    "Task",
    "bagel_probe",
    "built_in_samples",
    "calibrate",
    "collect",
    "evaluator",
    "expert_usage",
    "fewer_heads",
    "find_adapter",
    "measure_cost",
    "measure_similarity",
    "narrowed",
    "read_attention",
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
