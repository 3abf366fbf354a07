# SPDX-License-Identifier: Apache-2.0
"""The API reference is the same whoever generates it, and holds every public name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = f"""
import sys
sys.path.insert(0, {str(ROOT / "docs")!r})
import api
sys.stdout.write(api.reference())
"""


def generate(seed: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_the_reference_is_deterministic_and_names_no_address() -> None:
    first, second = generate("1"), generate("2")
    assert first == second
    assert " at 0x" not in first
    for name in ("route_topk", "SparseMoE", "convert", "apply_moe_", "BagelPipeline", "calibrate"):
        assert f"\n### {name}\n" in first
