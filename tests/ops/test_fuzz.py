# SPDX-License-Identifier: Apache-2.0
"""Whatever the ops are called with, they answer as plain torch does or refuse in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import child_environment
from fuzz import OPS, check_refusal, draw_case, legal_case, run_case
from hostile_cases import CORPUS
from tiers import num_cases

NUM_CASES = num_cases(20_000)
HERE = Path(__file__).parent


def run(first: int, count: int) -> subprocess.CompletedProcess[str]:
    """Runs seeds in a process of their own, which may die."""
    return subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), str(first), str(count)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", sorted((CORPUS / "ops").glob("*.json")), ids=lambda p: p.stem)
def test_cases_of_the_corpus_are_refused_in_words_or_answered(path: Path) -> None:
    assert run_case(json.loads(path.read_text())) == path.stem.partition("-")[0]


def test_no_arguments_crash_an_op_or_make_it_answer_wrongly() -> None:
    done = run(0, NUM_CASES)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"exit status {done.returncode}, last lines {lines[-2:]}, {done.stderr[-1000:]}"
    )
    outcomes = json.loads(lines[-1])
    assert sum(outcomes.values()) == NUM_CASES
    assert min(outcomes["answered"], outcomes["refused"]) > NUM_CASES // 4


def test_a_seed_whose_process_ends_is_told() -> None:
    code = (
        "import os, fuzz; fuzz.run_case = lambda case: os.abort() if case['op'] == 'permute' "
        "else 'refused'; fuzz.main(0, 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode < 0
    assert done.stdout.splitlines()[-1] == str(OPS.index("permute"))


def test_a_wrong_answer_and_a_wrong_refusal_are_found() -> None:
    import random

    case = {**legal_case("combine", random.Random(1)), "legal": True}
    assert run_case(case) == "answered"
    with pytest.raises(AssertionError):
        check_refusal("combine", RuntimeError("some text"))
    with pytest.raises(AssertionError):
        check_refusal("combine", IndexError("combine: y must be right, got wrong"))
    check_refusal("combine", RuntimeError("combine: y must be right, got wrong"))


def test_cases_are_the_same_for_a_seed() -> None:
    assert all(draw_case(seed) == draw_case(seed) for seed in range(50))
