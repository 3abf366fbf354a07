# SPDX-License-Identifier: Apache-2.0
"""Sparse, narrower and skipped parts into a live model, in place, and out of it again.

Reading order: `weights` (what a dense FFN is), `find` (which modules), `probe` (what they return),
`blocks` (what goes in their place), `exchange` (in and out), `counts`, `report`, `transforms`
(sparse FFNs), `width`, `depth`, `heads`, `storage`, `restore`.
"""

from sparse_unified.checkpoint.counts import Counts
from sparse_unified.checkpoint.modes import (
    MoEConfig,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.experts import Budget
from sparse_unified.surgery.counts import count_parameters
from sparse_unified.surgery.depth import skip_layers_
from sparse_unified.surgery.heads import prune_heads_
from sparse_unified.surgery.report import PrunedPart, PruneReport, SwappedLayer, SwapReport
from sparse_unified.surgery.restore import restore_
from sparse_unified.surgery.storage import QuantizeConfig, QuantizeReport, quantize_weights_
from sparse_unified.surgery.transforms import apply_moe_, load_moe_
from sparse_unified.surgery.width import prune_width_

__all__ = [
    "Budget",
    "Counts",
    "MoEConfig",
    "Part",
    "PruneHeadsConfig",
    "PruneReport",
    "PruneWidthConfig",
    "PrunedPart",
    "QuantizeConfig",
    "QuantizeReport",
    "SkipLayersConfig",
    "SwapReport",
    "SwappedLayer",
    "apply_moe_",
    "count_parameters",
    "load_moe_",
    "prune_heads_",
    "prune_width_",
    "quantize_weights_",
    "restore_",
    "skip_layers_",
]
