# SPDX-License-Identifier: Apache-2.0
"""How much a test run tries: what a change needs (`make test`), or everything (`make test-all`).

A test that takes minutes is marked `slow`; a test over random cases takes a tenth of them by
default.
"""

from __future__ import annotations

import os

IS_DEEP = os.environ.get("SPARSE_UNIFIED_TEST_DEEP") == "1"


def num_cases(deep: int) -> int:
    """Of so many cases in a deep run, those of this run: all of them or a tenth, at least one."""
    return deep if IS_DEEP else max(1, deep // 10)
