# SPDX-License-Identifier: Apache-2.0
"""The benchmark counts what it says, compares equals, and writes its schema."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_unified.bench import main
from sparse_unified.bench.cases import CASES, Case, work
from sparse_unified.bench.harness import Roof, measure_interleaved, record
from sparse_unified.bench.providers import ExpertLoop, sparse_block

SMALL = Case(name="small", tokens=37, hidden_size=32, intermediate_size=96, num_experts=8, top_k=3)
ROOF = Roof(tflops=1.0, gbps=10.0)


def test_expert_loop_computes_what_our_block_computes() -> None:
    block = sparse_block(SMALL, torch.float32)
    x = torch.randn(SMALL.tokens, SMALL.hidden_size)
    with torch.no_grad():
        ours, loop = block(x), ExpertLoop(block)(x)
    assert (ours - loop).norm() / loop.norm() < 1e-6


def test_half_of_the_experts_are_half_of_the_dense_flops() -> None:
    case = CASES["bagel-16to8-T4096"]
    dense = work("dense_ffn", case, torch.bfloat16)
    assert dense.flops == pytest.approx(1.669e12, rel=1e-3)  # spec: 1.669 TFLOP a layer
    sparse = work("grouped_ffn", case, torch.bfloat16)
    assert sparse.flops * 2 == dense.flops


def test_backward_counts_three_times_the_forward() -> None:
    forward = work("sparse_ffn", SMALL, torch.float32)
    both = work("sparse_ffn", SMALL, torch.float32, "fwd_bwd")
    assert both.flops == 3 * forward.flops


def test_rounds_are_interleaved_and_warmup_is_not_counted() -> None:
    order: list[str] = []
    seconds = measure_interleaved(
        {"a": lambda _: order.append("a"), "b": lambda _: order.append("b")}, repeats=3, warmup=1
    )
    assert order == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_the_rounds() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "dense": [3.0, 4.0, 4.0]}
    line = record(
        seconds,
        "ours",
        op="sparse_ffn",
        case="small",
        direction="fwd",
        dtype=torch.float32,
        work=work("sparse_ffn", SMALL, torch.float32),
        roof=ROOF,
        baselines=("dense", "ours"),
    )
    assert line.speedup == {"dense": 2.0}
    assert line.median_us == 2e6


def test_command_prints_a_table_and_saves_the_schema(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "bagel-16to8-T256", SMALL)
    monkeypatch.setattr("sparse_unified.bench.command.measure_roof", lambda _: ROOF)
    path = tmp_path / "cpu.json"
    arguments = ["--case", "bagel-16to8-T256", "--repeats", "2", "--direction", "all"]
    assert main([*arguments, "--json", str(path)]) == 0
    assert "x baseline" in capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert saved.keys() == {
        "commit",
        "date",
        "device",
        "versions",
        "roof",
        "overhead",
        "records",
    }
    block = [r for r in saved["records"] if r["op"] == "sparse_ffn"]
    assert {r["provider"] for r in block} == {
        "dense",
        "dense_half",
        "expert_loop",
        "sparse_unified",
    }
    assert {r["direction"] for r in block} == {"fwd", "fwd_bwd"}
    ours = next(r for r in block if r["provider"] == "sparse_unified")
    assert ours["speedup"].keys() == {"dense", "dense_half", "expert_loop"}
    assert saved["overhead"]["small"].keys() == {"alone", "fused"}
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == saved.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "bench: device must be 'cpu'"),
        (["--repeats", "0"], "bench: repeats must be at least 1, got 0"),
        (["--threads", "-1"], "bench: threads must be at least 1, got -1"),
        (["--json", "."], r"bench: --json must be a file in a directory that exists, got '\.'"),
        (["--json", "no/x.json"], "bench: --json must be a file .*, got 'no/x.json'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)


@pytest.mark.parametrize("arguments", [["--case", "nonsense"], ["--bogus"], ["--repeats", "x"]])
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("sparse-unified: error: bench: ")
    assert stderr.count("\n") == 1
