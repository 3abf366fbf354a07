# SPDX-License-Identifier: Apache-2.0
"""Puts the CUDA bindings over emulated kernels behind the ops, in a process that asks for it.

They take the place of the CPU kernels, so `make emulated` runs them in a process of its own, which
SPARSE_UNIFIED_TEST_EMULATED asks for: 1 means kernels as they are, `race` those that report races
between threads, `sanitized` those that report accesses outside of tensors (libasan.so preloaded).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import sparse_unified  # noqa: E402, F401  (registers the ops that are replaced here)

# In a process with this variable the CUDA bindings over emulated kernels replace the CPU's.
VARIABLE = "SPARSE_UNIFIED_TEST_EMULATED"
BUILD = os.environ.get(VARIABLE, "").strip("1")
LIBRARY = (
    HERE.parent.parent / f"build/cmake/libsparse_unified_emulated_ops{BUILD and '_' + BUILD}.so"
)
ON_EMULATED = ("test_checks.py", "test_emulated.py")

if VARIABLE in os.environ:
    torch.ops.load_library(LIBRARY)
    collect_ignore = [path.name for path in HERE.glob("test_*") if path.name not in ON_EMULATED]
else:
    collect_ignore = ["test_emulated.py"]
