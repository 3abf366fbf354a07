# SPDX-License-Identifier: Apache-2.0
"""Which layers, neurons and heads of a model matter, measured on a task.

    statistics = calibrate(pipeline, "generation", read_samples("prompts.txt"))
    scores = score("wanda", pipeline, statistics)

Reading order: `statistics` and `calibration` (what neurons do), `criteria` (what is ranked),
`samples`, `evaluators`, `bagel_task` (what a model is run on and measured by), `sweep` (smaller
models, point by point), `evaluate` (several models side by side), `expert_usage`, `plots`.
"""

from sparse_unified.analysis.bagel_task import Settings, bagel_probe
from sparse_unified.analysis.calibration import calibrate, collect
from sparse_unified.analysis.criteria import CRITERIA, measure_similarity, save_scores, score
from sparse_unified.analysis.evaluate import evaluate
from sparse_unified.analysis.evaluators import Probe, evaluator, measure_cost
from sparse_unified.analysis.expert_usage import expert_usage
from sparse_unified.analysis.plots import write_plots
from sparse_unified.analysis.samples import Sample, Task, built_in_samples, read_samples
from sparse_unified.analysis.statistics import FfnStatistics, StatisticsConfig
from sparse_unified.analysis.sweep import SweepConfig, run_sweep

__all__ = [
    "CRITERIA",
    "FfnStatistics",
    "Probe",
    "Sample",
    "Settings",
    "StatisticsConfig",
    "SweepConfig",
    "Task",
    "bagel_probe",
    "built_in_samples",
    "calibrate",
    "collect",
    "evaluate",
    "evaluator",
    "expert_usage",
    "measure_cost",
    "measure_similarity",
    "read_samples",
    "run_sweep",
    "save_scores",
    "score",
    "write_plots",
]
