# SPDX-License-Identifier: Apache-2.0
"""Tells whether statistics are of a checkpoint, without loading it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.sums import hash_samples, sample_step
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.checkpoint.safetensors_file import TensorSpec

_WORDS = {2: np.int16, 4: np.int32, 8: np.int64}


def check_against_checkpoint(
    statistics: FfnStatistics, checkpoint: Checkpoint, component: str
) -> None:
    """Raises ValueError unless statistics were gathered on the FFNs that a checkpoint holds.

    Args:
        checkpoint: a model directory whose FFNs of the component are dense.
    """
    if component not in statistics.model_hashes:
        raise ValueError(
            f"statistics: component must be one of {', '.join(statistics.model_hashes)}, "
            f"got {component!r}"
        )
    own = hash_samples(
        (
            layer,
            [
                _samples(checkpoint.spec(keys.dense_key(component, layer, name)))
                for name in keys.PROJECTIONS
            ],
        )
        for layer in checkpoint.ffns.get(component, {})
    )
    if own != statistics.model_hashes[component]:
        raise ValueError(
            f"statistics: model must have the {component} FFNs they were gathered on, with hash "
            f"{statistics.model_hashes[component]}, got {own} of {checkpoint.directory}"
        )


def _samples(spec: TensorSpec) -> tuple[list[int], Tensor]:
    """Reads the pages of a file that hold the values a hash looks at."""
    count = math.prod(spec.shape)
    words = np.memmap(spec.file, _WORDS[spec.dtype.itemsize], "r", spec.start, (count,))
    values = torch.from_numpy(words[:: sample_step(count)].copy()).view(spec.dtype)
    return list(spec.shape), values
