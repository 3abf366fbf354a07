# SPDX-License-Identifier: Apache-2.0
"""Sparse FFNs into a live model, in place, and out of it again.

Reading order: `config`, `find` (which modules), `probe` (what they return), `blocks` (what goes in
their place), `exchange` (in and out), `report`, `transforms` (the three functions).
"""

from sparse_unified.swap.config import MoEConfig
from sparse_unified.swap.report import SwappedLayer, SwapReport
from sparse_unified.swap.transforms import apply_moe_, load_moe_, restore_

__all__ = ["MoEConfig", "SwapReport", "SwappedLayer", "apply_moe_", "load_moe_", "restore_"]
