# SPDX-License-Identifier: Apache-2.0
"""The main paths stay short enough to be followed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hops import paths, sizes

# Files and functions, at most; see `python tests/hops.py`. To be lowered when a path gets shorter.
CEILINGS = {
    "conversion": (17, 167),
    "sparse load": (24, 178),
    "calibration": (21, 188),
    "prune with scores": (17, 185),
    "denoising step": (12, 36),
}


def test_main_paths_pass_through_few_files_and_functions(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = {name: sizes(calls) for name, calls in paths(tmp_path).items()}
    longer = {
        name: (size, CEILINGS[name])
        for name, size in found.items()
        if size[0] > CEILINGS[name][0] or size[1] > CEILINGS[name][1]
    }
    assert longer == {}, "python tests/hops.py --list shows the functions"
