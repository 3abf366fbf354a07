# SPDX-License-Identifier: Apache-2.0
"""The doctor's child process on emulated kernels for Hopper, with a fault in those of a name.

    python tests/doctor_child.py FAULT KERNEL DEVICE NAMES

FAULT is an index of the enum of csrc/emulation/record.h.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparse_unified import doctor
from sparse_unified.ops import choices

ROOT = Path(__file__).parent.parent

torch.ops.load_library(ROOT / "build" / "cmake" / "libsparse_unified_emulated_ops.so")
emulation = torch.ops.sparse_unified_emulation
emulation.set_device(90)
emulation.set_rules(choices.rules(choices.read()))
emulation.plant_fault(int(sys.argv[1]), sys.argv[2])
doctor.child()
