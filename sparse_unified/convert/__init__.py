# SPDX-License-Identifier: Apache-2.0
"""Model directories made from others, compared with others, and described."""

from sparse_unified.convert.convert import convert, invert
from sparse_unified.convert.info import info, memory
from sparse_unified.convert.prune import prune
from sparse_unified.convert.verify import verify

__all__ = ["convert", "info", "invert", "memory", "prune", "verify"]
