# SPDX-License-Identifier: Apache-2.0
"""Every planted mistake still has its place in the tree, and tests that could notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}-{m.new[:30]!r}")
def test_a_mutation_applies_and_names_its_tests(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    files = [test for test in mutation.tests if test.startswith("tests")]
    assert files
    assert all(list(ROOT.glob(file)) for file in files)
