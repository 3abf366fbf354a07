# SPDX-License-Identifier: Apache-2.0
"""Whatever the ops are called with, they answer as plain torch does or refuse in words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import attack, check_refusal, freed, resized
from checkpoint_files import child_environment
from problems import ARGUMENTS, FLOATS, KERNELS, OPS, Values, call, grouped_values, pruned_values
from tiers import num_cases
from torch import Tensor

NUM_CASES, PARTS = num_cases(60_000), 4
HERE = Path(__file__).parent
UNSUPPORTED = (torch.float64, torch.int32, torch.bool, torch.complex64)
Change = Callable[[Any], Any]


def legal(op: str, num_tokens: int = 6) -> Values:
    """Arguments of an op that are answered."""
    values = (
        pruned_values(num_tokens, 8, 6, 32, (4, 1))
        if op.startswith("pruned")
        else grouped_values(num_tokens, 8, 3, 4, 2)
    )
    return {name: values[name] for name in ARGUMENTS[op]}


def at(index: int | tuple[int, int], value: int) -> Change:
    """Changes one element of a copy."""
    return lambda t: t.index_put(
        tuple(torch.tensor(i) for i in (index if isinstance(index, tuple) else (index,))),
        torch.tensor(value, dtype=t.dtype),
    )


def to(value: Any) -> Change:
    return lambda _: value


# Op, argument, and what is done to it. The message names the first of several arguments.
REFUSED: list[tuple[str, str, Change]] = [
    *(
        (op, ARGUMENTS[op][0], change)
        for op in ("route_topk", "permute", "combine", "grouped_ffn", "pruned_ffn")
        for change in (lambda t: t[0], *(lambda t, d=d: t.abs().ceil().to(d) for d in UNSUPPORTED))
    ),
    ("route_topk", "gate", lambda t: t[0]),
    ("route_topk", "gate", lambda t: t.bfloat16()),
    ("route_topk", "gate", lambda t: t[:, :7]),
    *(("route_topk", "top_k", to(bad)) for bad in (0, -1, 4)),
    *(("sort_by_expert", "topk_idx", change) for change in (lambda t: t.long(), lambda t: t[0])),
    *(("sort_by_expert", "topk_idx", at((2, 1), bad)) for bad in (-1, 3)),
    ("sort_by_expert", "num_experts", to(0)),
    ("sort_by_expert", "num_experts", to((1 << 63) - 1)),
    ("permute", "row_token", lambda t: t.long()),
    ("permute", "row_token", lambda t: t.clamp(min=1)),
    ("permute", "token_rows", lambda t: t[:2]),
    ("combine", "token_rows", at((2, 1), 12)),
    ("combine", "token_rows", lambda t: t - 1),
    ("combine", "weights", lambda t: t.half()),
    ("combine", "weights", lambda t: t[:, :1]),
    *(("grouped_ffn", "row_token", c) for c in (lambda t: t.long(), lambda t: t + 6)),
    *(("grouped_ffn", "expert_offsets", at(*place)) for place in ((-1, 11), (0, 1), (1, 13))),
    ("grouped_ffn", "expert_offsets", lambda t: t[:1]),
    *(("grouped_ffn", "gate_proj", c) for c in (lambda t: t.half(), lambda t: t[:, :7])),
    ("grouped_ffn", "gate_proj", lambda t: t[:11]),
    *(("grouped_ffn", "up_proj", c) for c in (lambda t: t.bfloat16(), lambda t: t[:9])),
    *(
        ("grouped_ffn", "down_proj", c)
        for c in (lambda t: t[0], lambda t: t[:7], lambda t: t[:, :9])
    ),
    ("grouped_ffn_combine", "row_token", lambda t: t.flip(0).contiguous()),
    ("grouped_ffn_combine", "weights", lambda t: t.half()),
    ("grouped_ffn_combine", "weights", lambda t: t[:, :1]),
    *(("grouped_ffn_combine", "token_rows", c) for c in (to(None), lambda t: t.long())),
    *(("grouped_ffn_combine", "token_rows", c) for c in (lambda t: t[:-1], lambda t: t + 1)),
    ("grouped_ffn_combine_backward", "grad_y", lambda t: t[:5]),
    ("grouped_ffn_combine_backward", "gate_rows", lambda t: t[:, :3]),
    ("grouped_ffn_combine_backward", "token_rows", at((2, 1), 0)),
    *(("pruned_ffn", "kept_blocks", c) for c in (lambda t: t.long(), lambda t: t[None])),
    *(("pruned_ffn", "kept_blocks", c) for c in (lambda t: t + 2, lambda t: t - 2, at(1, 4))),
    *(("pruned_ffn", "gate_proj", c) for c in (lambda t: t[:, :7], lambda t: t[:190])),
    ("pruned_ffn", "up_proj", lambda t: t[:176]),
    *(("pruned_ffn", "down_proj", c) for c in (lambda t: t[:, :176], lambda t: t[:7])),
    *(("pruned_ffn", "block_size", to(bad)) for bad in (0, -16, 8, 17, 80, 128, 192)),
    ("pruned_ffn_train", "x", lambda t: resized(t, [1 << 40, 8])),
    ("pruned_ffn_backward", "grad_y", lambda t: t.half()),
    ("pruned_ffn_backward", "gate_rows", lambda t: t[:, 1:]),
    ("pruned_ffn_backward", "up_rows", lambda t: t[:5]),
    ("ffn_importance", "x", lambda t: resized(t, [1 << 40, 8])),
    ("ffn_importance", "gate_proj", lambda t: t[:, :7]),
    ("ffn_importance", "up_proj", lambda t: t[:4]),
    *(("ffn_importance", "threshold", to(bad)) for bad in (-0.5, math.nan, math.inf)),
    *(("ffn_importance", "token_weights", c) for c in (lambda t: t[:5], lambda t: t.bool())),
    *(("ffn_importance", "token_weights", c) for c in (lambda t: -t, lambda t: t * math.nan)),
    ("route_topk_backward", "grad_logits", lambda t: t[:, :2]),
    # Memory that was given back, and memory that is too short.
    *(
        (op, name, freed)
        for op in OPS
        for name, value in legal(op).items()
        if isinstance(value, Tensor)
    ),
]


@pytest.mark.parametrize("position", range(len(REFUSED)), ids=lambda i: "-".join(REFUSED[i][:2]))
def test_a_bad_argument_is_named(position: int) -> None:
    op, name, change = REFUSED[position]
    values = legal(op)
    with pytest.raises(RuntimeError, match=rf"^{op}: {name} must .+, got ") as caught:
        call(op, values | {name: change(values[name])})
    check_refusal(op, caught.value)


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_answered_on_one_device_alone(op: str) -> None:
    values = legal(op)
    assert attack(op, values, is_legal=True) == "answered"
    meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in values.items()}
    assert attack(op, meta, is_legal=True) == "answered"
    first = ARGUMENTS[op][0]
    if op != "sort_by_expert":
        assert attack(op, values | {first: meta[first]}, is_legal=False) == "refused"


@pytest.mark.parametrize("num_tokens", [5, 300])
@pytest.mark.parametrize("op", ["permute", "grouped_ffn_combine"])
def test_row_maps_that_contradict_each_other_are_refused(op: str, num_tokens: int) -> None:
    values = legal(op, num_tokens)
    values["token_rows"] = values["token_rows"].flip(0).contiguous()
    with pytest.raises(RuntimeError, match=f"^{op}: row_token must name the token whose rows"):
        call(op, values)


@pytest.mark.parametrize("name", FLOATS)
def test_a_storage_that_was_cut_is_refused(name: str) -> None:
    values = legal("grouped_ffn")
    values[name] = values[name].clone()[1:]
    values[name].untyped_storage().resize_(values[name].nbytes)  # the first row lies before
    with pytest.raises(RuntimeError, match=f"{name} must have memory"):
        call("grouped_ffn", values | {"row_token": values["row_token"].clamp(max=4)})


def test_memory_freed_before_a_backward_pass_is_refused() -> None:
    values = legal("grouped_ffn_combine")
    leaf = values["x"].requires_grad_()
    y = call("grouped_ffn_combine", values)
    values["up_proj"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="up_proj must have memory"):
        torch.autograd.grad(y.sum(), leaf)


def run_script(*arguments: object) -> dict[str, int]:
    """The outcomes of attack.py, in a process of its own, which may die."""
    done = subprocess.run(
        [sys.executable, str(HERE / "attack.py"), *map(str, arguments)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"exit status {done.returncode}, {done.stdout[-100:]!r}, {done.stderr[-2000:]}"
    assert done.returncode == 0, told
    outcomes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.parametrize("part", range(PARTS))
def test_no_arguments_crash_an_op_or_make_it_answer_wrongly(part: int) -> None:
    count = NUM_CASES // PARTS
    outcomes = run_script(part * count, count)
    assert sum(outcomes.values()) == count
    assert min(outcomes["answered"], outcomes["refused"]) > count // 4


RACE = """
import threading, torch
from problems import call, grouped_values
torch.set_num_threads(1)
values = grouped_values(300, 8, 3, 4, 2)
rows = values["token_rows"].numpy().reshape(-1)
good = int(rows[5])
def disturb():
    while True:
        rows[5] = 2**30
        rows[5] = good
threading.Thread(target=disturb, daemon=True).start()
for op in ("permute", "combine", "grouped_ffn_combine", "grouped_ffn_combine_backward") * 500:
    try:
        call(op, values)
    except RuntimeError:
        pass
"""


def test_indices_are_those_that_were_looked_at_whatever_another_thread_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE],
        cwd=Path(__file__).parent,
        env=child_environment(),
        check=False,
    )
    assert done.returncode == 0


def test_the_attack_finds_wrong_answers_and_wrong_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    values = legal("combine")
    monkeypatch.setattr(KERNELS, "combine", lambda *arguments: arguments[0][:6] * 2)
    with pytest.raises(AssertionError, match="off by"):
        attack("combine", values, is_legal=True)
    for text in ("some text", "permute: y must be right, got wrong"):
        with pytest.raises(AssertionError):
            check_refusal("combine", RuntimeError(text))
    check_refusal("combine", RuntimeError("combine: y must be right, got wrong"))


@pytest.mark.parametrize(
    "op", [f"grouped_ffn_combine_{part}" for part in ("train", "backward")] + ["pruned_ffn_train"]
)
def test_an_op_that_runs_out_of_memory_says_so(op: str) -> None:
    outcomes = run_script("memory", op)
    assert sum(outcomes.values()) == 40
    assert outcomes["refused"] > 3
