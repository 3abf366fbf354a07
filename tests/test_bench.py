# SPDX-License-Identifier: Apache-2.0
"""The benchmark counts what it says, and its command writes its schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_unified.bench import main
from sparse_unified.bench.cases import (
    CASES,
    CUDA_DEFAULTS,
    DIRECTIONS,
    PRUNED_CASES,
    Case,
    PrunedCase,
    pruned_work,
    work,
)
from sparse_unified.bench.harness import Roof, measure_interleaved, record
from sparse_unified.bench.op_suite import measure_ops
from sparse_unified.bench.providers import BLOCK_PROVIDERS, block_providers
from sparse_unified.bench.pruned_suite import measure_pruned, pruned_providers
from sparse_unified.bench.target import find_target, slug

SMALL = Case(name="small", tokens=37, hidden_size=32, intermediate_size=96, num_experts=8, top_k=3)
SMALL_PRUNED = PrunedCase(
    name="small-half", tokens=37, hidden_size=32, intermediate_size=96, block_size=16
)
ROOF = Roof(tflops=1.0, gbps=10.0)


def test_half_of_the_experts_are_half_of_the_dense_flops() -> None:
    case = CASES["bagel-16to8-T4096"]
    dense = work("dense_ffn", case, torch.bfloat16)
    assert dense.flops == pytest.approx(1.669e12, rel=1e-3)  # spec: 1.669 TFLOP a layer
    for op in ("grouped_ffn", "half_ffn"):
        assert work(op, case, torch.bfloat16).flops * 2 == dense.flops


def test_half_of_the_blocks_are_half_of_the_dense_flops() -> None:
    case = PRUNED_CASES["bagel-half-bs64-T4096"]
    dense = pruned_work(case, torch.bfloat16, share=1)
    assert dense == work("dense_ffn", CASES["bagel-16to8-T4096"], torch.bfloat16)
    half = pruned_work(case, torch.bfloat16, share=case.kept_share)
    assert case.kept_share == 0.5
    assert 2 * half.flops == dense.flops


def test_every_pruned_case_keeps_half_of_whole_blocks() -> None:
    for case in PRUNED_CASES.values():
        assert case.intermediate_size % case.block_size == 0
        assert abs(case.kept_share - 0.5) <= 1 / (case.intermediate_size / case.block_size)


def test_pruned_provider_computes_the_blocks_it_keeps() -> None:
    providers = pruned_providers(SMALL_PRUNED, torch.float32)
    dense, pruned = providers["dense"], providers["sparse_unified"]
    x = torch.randn(SMALL_PRUNED.tokens, SMALL_PRUNED.hidden_size)
    assert len(pruned.kept_blocks) == 3
    with torch.no_grad():
        y = pruned(x)
        lost = torch.ones(6, dtype=torch.bool)
        lost[pruned.kept_blocks.long()] = False
        dense.down_proj.weight[:, lost.repeat_interleave(16)] = 0
        torch.testing.assert_close(y, dense(x))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_of_the_blocks_are_measured_beside_dense(direction: str) -> None:
    target = find_target("cpu")
    measured = measure_pruned(SMALL_PRUNED, torch.float32, direction, target, ROOF, repeats=2)
    assert measured.missing == []
    assert [r.provider for r in measured.records] == ["dense", "dense_half", "sparse_unified"]
    ours = measured.records[-1]
    assert (ours.op, ours.case, ours.direction) == ("pruned_ffn", "small-half", direction)
    assert ours.speedup.keys() == {"dense", "dense_half"}


def test_command_measures_half_of_the_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRUNED_CASES, "bagel-half-bs16-T256", SMALL_PRUNED)
    monkeypatch.setattr("sparse_unified.bench.command.measure_roof", lambda *_: ROOF)
    arguments = ["--case", "bagel-half-bs16-T256", "--repeats", "2", "--json", "-"]
    assert main(arguments) == 0
    saved = json.loads(capsys.readouterr().out)
    assert {(r["op"], r["case"]) for r in saved["records"]} == {("pruned_ffn", "small-half")}


def test_backward_counts_the_gemms_it_repeats() -> None:
    forward = work("sparse_ffn", SMALL, torch.float32)
    assert work("sparse_ffn", SMALL, torch.float32, "fwd_bwd").flops == 3 * forward.flops
    assert work("sparse_ffn", SMALL, torch.float32, "fwd_bwd_frozen").flops == 2 * forward.flops


def test_backward_of_ops_without_gemms_counts_the_rows_it_moves() -> None:
    rows = 4 * SMALL.hidden_size * SMALL.rows
    tokens = 4 * SMALL.hidden_size * SMALL.tokens
    for op, moved in (("permute", 2 * (tokens + rows)), ("combine", 2 * tokens + 3 * rows)):
        indices = work(op, SMALL, torch.float32, "fwd_bwd").bytes - moved
        assert 0 < indices < 0.1 * moved


def test_cases_of_cuda_are_those_of_bagel_at_two_splits() -> None:
    names = [name for name in CUDA_DEFAULTS if name in CASES]
    assert len(names) == 6
    for name in names:
        case = CASES[name]
        assert (case.hidden_size, case.intermediate_size) == (3584, 18944)
        assert case.expert_width in (1184, 592)


def test_every_case_has_whole_experts() -> None:
    for case in CASES.values():
        assert case.expert_width * case.num_experts == case.intermediate_size
        assert 1 <= case.top_k <= case.num_experts


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


def test_providers_of_the_demo_need_no_package() -> None:
    x = torch.randn(SMALL.tokens, SMALL.hidden_size)
    modules = block_providers(SMALL, torch.float32)
    assert tuple(modules) == BLOCK_PROVIDERS
    with torch.no_grad():
        ours, loop = modules["sparse_unified"](x), modules["expert_loop"](x)
    assert (ours - loop).norm() / loop.norm() < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_op_is_measured_alone(direction: str) -> None:
    target = find_target("cpu")
    measured = measure_ops(SMALL, torch.bfloat16, direction, target, ROOF, repeats=1)
    assert measured.missing == []
    ours = {r.op for r in measured.records if r.provider == "sparse_unified"}
    expected = {
        "fwd": {
            "route_topk",
            "sort_by_expert",
            "permute",
            "combine",
            "grouped_ffn",
            "grouped_ffn_combine",
            "ffn_importance",
        },
        "fwd_bwd": {"route_topk", "permute", "combine", "grouped_ffn"},
        "fwd_bwd_frozen": {"grouped_ffn"},
    }
    assert ours >= expected[direction]
    assert all(r.direction == direction and r.median_us > 0 for r in measured.records)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command on a small case, in a directory of its own, without the time of the roof."""
    monkeypatch.setitem(CASES, "bagel-16to8-T256", SMALL)
    monkeypatch.setattr("sparse_unified.bench.command.measure_roof", lambda *_: ROOF)
    monkeypatch.chdir(tmp_path)
    arguments = ["--case", "bagel-16to8-T256", "--repeats", "2"]
    for name in ("dense", "dense_half", "expert_loop", "liger", "sparse_unified"):
        arguments += ["--provider", name]
    return lambda *more: main([*arguments, *more])


def test_command_prints_a_table_and_saves_the_schema(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--direction", "all", "--json", "cpu.json") == 0
    assert "x baseline" in capsys.readouterr().out
    saved = json.loads(Path("cpu.json").read_text())
    assert saved.keys() == {
        "commit",
        "date",
        "device",
        "versions",
        "roof",
        "overhead",
        "records",
        "not_measured",
        "states",
    }
    assert saved["records"][0].keys() >= {
        "op",
        "case",
        "direction",
        "dtype",
        "provider",
        "median_us",
        "tflops",
        "gbps",
        "roof_fraction",
        "speedup",
    }
    block = [r for r in saved["records"] if r["op"] == "sparse_ffn"]
    assert {r["provider"] for r in block} == set(BLOCK_PROVIDERS)
    assert {r["direction"] for r in block} == set(DIRECTIONS)
    ours = next(r for r in block if r["provider"] == "sparse_unified")
    assert ours["speedup"].keys() == {"dense", "dense_half", "expert_loop"}
    assert saved["overhead"]["small"].keys() == {"alone", "fused"}
    assert not Path("bench-results").exists()


def test_command_saves_table_and_records_by_the_name_of_the_device(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--op", "sparse_ffn") == 0
    out = capsys.readouterr().out
    assert Path("bench-results/cpu.txt").read_text().strip() in out
    assert json.loads(Path("bench-results/cpu.json").read_text())["records"]
    assert command("--op", "permute", "--out", "elsewhere") == 0
    saved = json.loads(Path("elsewhere/cpu.json").read_text())
    assert {r["op"] for r in saved["records"]} == {"permute"}


def test_command_prints_records_alone(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--op", "combine", "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"][0]["op"] == "combine"
    assert list(Path().iterdir()) == []


def test_providers_that_cannot_run_are_listed_with_a_reason(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--op", "sparse_ffn", "--json", "x.json") == 0
    assert "not measured: needs CUDA, got cpu" in capsys.readouterr().out
    (missing,) = json.loads(Path("x.json").read_text())["not_measured"]
    assert missing["provider"] == "liger"
    assert missing["reason"] == "needs CUDA, got cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "bench: device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        (["--device", "cuda:99"], "bench: device must be one of the .* got 'cuda:99'"),
        (["--graph"], "bench: --graph must go with a CUDA device, got 'cpu'"),
        (["--repeats", "0"], "bench: repeats must be at least 1, got 0"),
        (["--threads", "-1"], "bench: threads must be at least 1, got -1"),
        (["--json", "."], r"bench: --json must be a file in a directory that exists, got '\.'"),
        (["--json", "no/x.json"], "bench: --json must be a file .*, got 'no/x.json'"),
        (["--out", __file__], "bench: --out must be a directory, got the file"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--case", "nonsense"], ["--op", "x"], ["--provider", "x"], ["--bogus"], ["--repeats", "x"]],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("sparse-unified: error: bench: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_are_named_after_the_device(model: str, expected: str) -> None:
    assert slug(model) == expected
