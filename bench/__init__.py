# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of the sparse FFN: `sparse-unified bench`. They measure; tests/ asserts."""

from .command import main

__all__ = ["main"]
