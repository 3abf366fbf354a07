# SPDX-License-Identifier: Apache-2.0
"""A BAGEL in miniature: small enough to train on a CPU, on real images and on drawn scenes."""

from sparse_unified.mini.data import DigitDataset, MiniDataset, SceneDataset, training_data
from sparse_unified.mini.evaluate import EvaluationConfig, evaluate
from sparse_unified.mini.model import (
    MiniTask,
    load_pipeline,
    mini_autoencoder,
    mini_config,
    new_model,
    trained_weights,
    write_model,
)
from sparse_unified.mini.report import Verdict, read_records, verdicts
from sparse_unified.mini.study import StudyConfig, run_study
from sparse_unified.mini.train import DenseTraining, train_dense

__all__ = [
    "DenseTraining",
    "DigitDataset",
    "EvaluationConfig",
    "MiniDataset",
    "MiniTask",
    "SceneDataset",
    "StudyConfig",
    "Verdict",
    "evaluate",
    "load_pipeline",
    "mini_autoencoder",
    "mini_config",
    "new_model",
    "read_records",
    "run_study",
    "train_dense",
    "trained_weights",
    "training_data",
    "verdicts",
    "write_model",
]
