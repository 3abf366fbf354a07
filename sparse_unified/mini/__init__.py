# SPDX-License-Identifier: Apache-2.0
"""A BAGEL in miniature: small enough to train on a CPU, on drawn scenes.

What it was trained on, and the study that is made with it, are in examples/miniature.
"""

from sparse_unified.mini.model import load_pipeline, write_model

__all__ = ["load_pipeline", "write_model"]
