# SPDX-License-Identifier: Apache-2.0
"""A BAGEL in miniature: small enough to train on a CPU, on real images and on drawn scenes.

What it was trained on, and the study that is made with it, are in examples/miniature.
"""

from sparse_unified.mini.model import MiniTask, load_pipeline, write_model

__all__ = ["MiniTask", "load_pipeline", "write_model"]
