# SPDX-License-Identifier: Apache-2.0
"""Model directories: reading them, and turning dense ones into sparse ones and back."""

from sparse_unified.checkpoint.convert import ConvertReport, convert
from sparse_unified.checkpoint.ffn import SparseLayer
from sparse_unified.checkpoint.info import ComponentInfo, Info, info
from sparse_unified.checkpoint.invert import InvertReport, invert
from sparse_unified.checkpoint.layout import MoELayout
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.safetensors_file import TensorSpec
from sparse_unified.checkpoint.verify import LayerVerdict, VerifyReport, verify

__all__ = [
    "Checkpoint",
    "ComponentInfo",
    "ConvertReport",
    "Info",
    "InvertReport",
    "LayerVerdict",
    "MoELayout",
    "SparseLayer",
    "TensorSpec",
    "VerifyReport",
    "convert",
    "info",
    "invert",
    "verify",
]
