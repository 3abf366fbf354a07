# SPDX-License-Identifier: Apache-2.0
"""Model directories: reading them, and turning dense ones into sparse ones and back."""

from sparse_unified.checkpoint.convert import ConvertReport, convert
from sparse_unified.checkpoint.ffn import SparseLayer
from sparse_unified.checkpoint.invert import InvertReport, invert
from sparse_unified.checkpoint.layout import MoELayout
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.safetensors_file import TensorSpec

__all__ = [
    "Checkpoint",
    "ConvertReport",
    "InvertReport",
    "MoELayout",
    "SparseLayer",
    "TensorSpec",
    "convert",
    "invert",
]
