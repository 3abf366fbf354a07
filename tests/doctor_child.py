# SPDX-License-Identifier: Apache-2.0
"""The doctor's child process on emulated kernels for Hopper, with a fault in those of a name.

    python tests/doctor_child.py FAULT KERNEL DEVICE NAMES

FAULT is an index of the enum of csrc/emulation/record.h. With KERNEL "grouped_mm:10" blocks take
the CPU for a GPU of capability 10.0, and the fault is in torch's products.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparse_unified import doctor
from sparse_unified.ops import backend, choices

ROOT = Path(__file__).parent.parent

torch.ops.load_library(ROOT / "build" / "cmake" / "libsparse_unified_emulated_ops.so")
emulation = torch.ops.sparse_unified_emulation
emulation.set_device(90)
emulation.set_rules(choices.rules(choices.read()))
fault, kernel = int(sys.argv[1]), sys.argv[2]
if kernel.startswith(choices.GROUPED_MM):
    capability = (int(kernel.partition(":")[2]), 0)
    choose, refused, grouped_mm = backend.choose, choices.refused, F.grouped_mm
    faults = (
        grouped_mm,
        lambda *arguments, **options: 1.1 * grouped_mm(*arguments, **options),
        lambda *_, **__: os.abort(),
        lambda *_, **__: time.sleep(1000),
    )
    patches: dict[Any, dict[str, Any]] = {
        backend: {
            "device_refusal": lambda _: None,
            "_capability": lambda _: capability,
            "choose": lambda _, **facts: choose(torch.device("cuda"), **facts),
        },
        choices: {"refused": lambda _: refused(torch.device("cpu"))},
        F: {"grouped_mm": faults[fault]},
    }
    for module, functions in patches.items():
        for name, function in functions.items():
            setattr(module, name, function)
else:
    emulation.plant_fault(fault, kernel)
doctor.child()
