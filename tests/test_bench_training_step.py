# SPDX-License-Identifier: Apache-2.0
"""What of a training step is outside of torch: who owns a moment, and how much Python a step runs.

Shares of time depend on the machine and its load, so they are measured by
`python -m sparse_unified.bench.training_step` and kept in bench/results; that they stay what they
were is asserted here by what does not: the number of instructions that the interpreter executes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_unified
from sparse_unified.adapt.ahead import can_help
from sparse_unified.adapt.log import TrainingLog
from sparse_unified.bench.outside import KERNELS, OUTSIDE, TORCH, count_instructions, read_stacks
from sparse_unified.bench.training_step import MODELS, Case, new_trainer, step_instructions
from sparse_unified.mini import MiniTask
from sparse_unified.mini.words import vocabulary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RECORDS = json.loads((ROOT / "bench" / "results" / "training_step.json").read_text())["records"]
OURS, THEIRS = Path(sparse_unified.__file__).parent, Path(torch.__file__).parent
# Python's versions compile to instructions that differ by some percent.
SLACK = 1.2
# Neither the hidden size nor the threads change it.
MEASURED = {(r["task"], r["model"]): r["instructions"] for r in RECORDS}

STEP = f"main (a.py:1);train_until (/b/training_step.py:9);Trainer.step ({OURS}/adapt/trainer.py:5)"


@pytest.mark.parametrize(
    ("inner", "owner"),
    [
        ("", OUTSIDE),
        (";gc_collect_main (/usr/lib/libpython3.11.so.1.0)", OUTSIDE),
        (";dumps (/usr/lib/python3.11/json/__init__.py:2);f (/usr/lib/_json.so)", OUTSIDE),
        (f";at::add ({THEIRS}/lib/libtorch_cpu.so)", TORCH),
        (f";at::add ({THEIRS}/lib/libtorch_cpu.so);memcpy (/usr/lib/libc.so.6)", TORCH),
        (f";Module._call_impl ({THEIRS}/nn/modules/module.py:9)", TORCH),
        (f";no_grad ({THEIRS}/a.py:9);__exit__ (/usr/lib/python3.11/contextlib.py:2)", TORCH),
        (f";backward ({THEIRS}/_tensor.py:9);_backward ({OURS}/ops/combine.py:9)", OUTSIDE),
        (f";call ({THEIRS}/lib/libtorch_python.so);sparse_ffn (x) ({OURS}/_C.abi3.so)", KERNELS),
        (";GOMP_parallel (/usr/lib/libgomp.so.1)", TORCH),
    ],
)
def test_a_moment_belongs_to_the_innermost_owner(inner: str, owner: str) -> None:
    shares = read_stacks([f"{STEP}{inner} 7\n", "main (a.py:1);idle (b.py:2) 100"], "train_until")
    assert shares.owners == {owner: 7}
    assert shares.outside == (owner == OUTSIDE)


def test_pauses_between_steps_do_not_count() -> None:
    pause = "main (a.py:1);train_until (/b/training_step.py:9);pause (/b/training_step.py:5) 50"
    shares = read_stacks([f"{STEP} 2", pause], "train_until", apart="pause")
    assert shares.samples == 2


def test_outside_is_listed_by_function_and_phases_hold_what_they_call() -> None:
    lines = [
        f"{STEP};pack_training ({OURS}/bagel/segments.py:3);zip (/usr/lib/libpython3.so) 2",
        f"{STEP};pack_training ({OURS}/bagel/segments.py:3);cat ({THEIRS}/lib/libtorch_cpu.so) 6",
        f"{STEP} 2",
    ]
    shares = read_stacks(lines, "train_until", ("pack_training", "Trainer.step"))
    assert shares.functions == {"segments.py: pack_training": 2, "trainer.py: Trainer.step": 2}
    assert shares.inside == {"pack_training": 8, "Trainer.step": 10}
    assert shares.outside == 0.4


def test_instructions_outside_of_torch_are_counted_the_same_every_time() -> None:
    once = count_instructions(vocabulary)
    assert once > 100
    assert count_instructions(vocabulary) == once
    layer, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)
    assert count_instructions(partial(layer, x)) == 0
    assert count_instructions(layer(x).sum().backward) == 0


def test_dense_and_sparse_models_of_both_tasks_were_measured() -> None:
    assert {task for task, _ in MEASURED} == {task.value for task in MiniTask}
    assert {"dense", "router"} <= {model for _, model in MEASURED} <= set(MODELS)


@pytest.mark.parametrize(("task", "model"), MEASURED)
def test_a_step_runs_no_more_python_than_the_measured_one(
    task: str, model: str, tmp_path: Path
) -> None:
    case = Case(task=task, hidden_size=64, model=model, threads=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        if not can_help():
            pytest.skip("needs two cores: one for the process that prepares batches")
        with TrainingLog(tmp_path, 0) as log:
            counted = step_instructions(new_trainer(case), log)
    finally:
        torch.set_num_threads(threads)
    assert 0 < counted <= SLACK * MEASURED[task, model]
