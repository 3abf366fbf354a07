# SPDX-License-Identifier: Apache-2.0
"""Model directories made from others, compared with others, and described."""

from sparse_unified.convert.convert import ConvertReport, convert
from sparse_unified.convert.info import ComponentInfo, Info, info
from sparse_unified.convert.invert import InvertReport, invert
from sparse_unified.convert.memory import MemoryReport, memory
from sparse_unified.convert.prune import PrunedCheckpoint, prune
from sparse_unified.convert.verify import LayerVerdict, VerifyReport, verify

__all__ = [
    "ComponentInfo",
    "ConvertReport",
    "Info",
    "InvertReport",
    "LayerVerdict",
    "MemoryReport",
    "PrunedCheckpoint",
    "VerifyReport",
    "convert",
    "info",
    "invert",
    "memory",
    "prune",
    "verify",
]
