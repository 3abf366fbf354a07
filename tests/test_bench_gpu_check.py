# SPDX-License-Identifier: Apache-2.0
"""The GPU check keeps its time, keeps what it found, and reads its tools right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_unified import ops
from sparse_unified.bench.cases import Case, PrunedCase
from sparse_unified.bench.gpu import instructions, model, sanitizer
from sparse_unified.bench.harness import Roof
from sparse_unified.bench.kernels import summarize
from sparse_unified.bench.target import find_target
from sparse_unified.bench.variants import (
    CHOSEN,
    VARIABLE,
    find_variants,
    measure_variants,
    variants_of_error,
)

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.py"
CASE = Case(name="small", tokens=37, hidden_size=32, intermediate_size=96, num_experts=8, top_k=3)


def run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OUT": str(out), **environment},
        check=False,
    )


def summary(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


@pytest.mark.slow
def test_dry_run_fills_the_folder_of_the_environment(tmp_path: Path) -> None:
    parts = ("environment", "instructions", "checks", "variants", "sanitizer")
    ran = run(tmp_path, "--dry-run", "--parts", ",".join(parts))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = summary(tmp_path)
    assert found["ok"]
    assert [row["part"] for row in found["rows"]] == list(parts)
    statuses = [row["status"] for row in found["rows"]]
    assert statuses == ["passed", "skipped", "passed", "passed", "skipped"]
    facts = found["parts"]["environment"]
    assert all(facts["ops"].values())
    assert facts["peers"]["dense"] == facts["peers"]["transformers_grouped_mm"] == "here"
    assert found["parts"]["variants"]["result"]["records"]
    checks = found["parts"]["checks"]
    passed = [check for check in checks["checks"] if check["outcome"] == "passed"]
    assert len(passed) == checks["counts"]["passed"] > 20
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "log.txt"}
    assert "grouped_ffn" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_whole_model_is_measured_in_every_way(tmp_path: Path) -> None:
    ran = run(tmp_path, "--dry-run", "--parts", "model")
    assert ran.returncode == 0, (tmp_path / "log.txt").read_text()
    found = summary(tmp_path)["parts"]["model"]
    ways = ["eager", "eager, step cache", "compiled"]  # graphs need a GPU
    assert [(r["model"], r["way"]) for r in found["records"]] == [
        (name, way) for way in ways for name in ("dense", "sparse")
    ]
    for record in found["records"]:
        cached = "cache" in record["way"]
        assert (record["steps"], record["computed_steps"]) == (8, 5 if cached else 8)
        assert record["guided_step_seconds"] > 0
        assert record["seconds_per_step"] == record["seconds_per_image"] / 8
        assert record["peak_bytes"] is None
        assert (record["relative_to_eager"] > 0) == cached
    assert set(found["ratios"]) == set(ways)
    eager = {r["model"]: r["seconds_per_image"] for r in found["records"] if r["way"] == "eager"}
    assert found["ratios"]["eager"] == pytest.approx(eager["dense"] / eager["sparse"])
    assert "ceiling 1.56x" in found["summary"]
    for name in ("dense", "sparse"):
        assert found["memory"][name]["predicted"]["weights"] > 10**5


def test_the_whole_model_has_the_size_of_bagel() -> None:
    setup = model.full()
    predicted = {
        name: model.predicted_bytes(config, setup.vae, setup.grid)
        for name, config in (("dense", setup.config), ("sparse", setup.sparse()))
    }
    # docs/serving.md: 27.2 GB of weights and 3.2 GB beside them with task="image".
    assert f"{predicted['sparse']['weights'] / 1e9:.1f}" == "27.2"
    assert f"{predicted['sparse']['working'] / 1e9:.1f}" == "3.2"
    routers = 26 * (16 + 1) * 3584 * 2
    assert predicted["sparse"]["weights"] - predicted["dense"]["weights"] == routers


def test_a_part_without_a_gpu_fails_and_the_next_runs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    ran = run(tmp_path, "--parts", "environment,sanitizer", "--budget", "120")
    assert ran.returncode == 1
    rows = {row["part"]: row for row in summary(tmp_path)["rows"]}
    assert rows["environment"]["status"] == "failed"
    assert "Error" in rows["environment"]["summary"]
    assert "compute-sanitizer" in rows["sanitizer"]["summary"]


def test_parts_without_time_have_failed(tmp_path: Path) -> None:
    ran = run(tmp_path, "--dry-run", "--parts", "speed,sanitizer", "--budget", "8")
    assert ran.returncode == 1
    speed, last = summary(tmp_path)["rows"]
    assert speed["status"] == last["status"] == "failed"
    assert "out of time" in speed["summary"] or "no time left" in speed["summary"]


def test_what_was_found_is_kept_when_it_is_stopped(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--dry-run", "--parts", "checks,speed"],
        env={**os.environ, "OUT": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / "checks.json"
    deadline = time.monotonic() + 120
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    found = summary(tmp_path)
    assert not found["ok"]
    assert found["rows"][0]["summary"].startswith("stopped from outside")
    assert found["parts"]["checks"]["checks"]


def test_unknown_parts_are_named(tmp_path: Path) -> None:
    ran = run(tmp_path, "--parts", "nonsense")
    assert ran.returncode == 2
    assert ran.stdout.strip().endswith("got 'nonsense'")
    assert ran.stdout.count("\n") == 1


# Reading tools


def test_sanitizer_reports_are_read() -> None:
    passed = '"outcome": "passed"\n' * len(sanitizer.CHECKS)
    clean = f"{passed}========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.judge(clean, 0) == (True, f"0 findings in {len(sanitizer.CHECKS)} checks")
    races = f"{passed}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert sanitizer.judge(races, 99)[0] is False
    assert "2 findings" in sanitizer.judge(races, 99)[1]
    assert sanitizer.judge("========= Error: no such option", 1)[0] is False
    assert sanitizer.judge(f"========= ERROR SUMMARY: 0 errors\n{passed[:40]}", 0)[0] is False
    wrong = f'{passed}"outcome": "failed"\n========= ERROR SUMMARY: 0 errors\n'
    assert sanitizer.judge(wrong, 0)[0] is False


def test_sanitizer_checks_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    from registry import all_checks

    checks = all_checks()
    assert [name for name in sanitizer.CHECKS if not checks[name].is_small] == []
    command = sanitizer.command("racecheck", "cuda")
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert set(sanitizer.CHECKS) < set(command)


def test_instruction_programs_fit_the_device() -> None:
    assert instructions.programs((8, 0)) == instructions.programs((10, 0)) == ("sm80",)
    assert instructions.programs((9, 0)) == ("sm80", "sm90a")
    text = "PASS ldmatrix \n  mma at 3: got 1, expected 2\nFAIL mma bf16 \nFAIL launch: an error\n"
    found = {"ldmatrix": True, "mma bf16": False, "launch: an error": False}
    assert instructions.results(text) == found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc is here")
def test_instruction_programs_compile(tmp_path: Path) -> None:
    (program,) = instructions.build("80", ("sm80",), tmp_path).values()
    assert program.stat().st_mode & 0o100


def test_kernels_are_named_by_their_product() -> None:
    launches = [("up<...>", 600.0), ("fill", 2.0), ("down<...>", 320.0)] * 3
    case = Case(
        name="x", tokens=4096, hidden_size=3584, intermediate_size=18944, num_experts=16, top_k=8
    )
    up, fill, down = summarize(launches, case, torch.bfloat16)
    assert (up.phase, fill.phase, down.phase) == ("up", None, "down")
    # A third of 6 R D h is the down projection's, two thirds are gate's and up's.
    assert up.tflops == pytest.approx(4 * 32768 * 3584 * 1184 / 600e-6 / 1e12)
    assert down.tflops == pytest.approx(2 * 32768 * 3584 * 1184 / 320e-6 / 1e12)
    assert fill.tflops is None


# Variants

REFUSAL = (
    "grouped_ffn: SPARSE_UNIFIED_GROUPED_FFN must be PHASE=TILE with commas between, PHASE one of "
    "all, up, down, TILE one of 128x256x32x4, 64x128x32x4; of sm90a up one of 128x240x64x4, "
    '128x256x64x4, down one of 128x128x64x6; got "all=?"'
)


def test_variants_are_asked_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "all=128x256x32x4")
    assert variants_of_error("another error", "fwd") == ()

    def refuse() -> None:
        assert os.environ[VARIABLE] == "all=?"
        raise RuntimeError(REFUSAL)

    assert find_variants(refuse, "fwd") == (
        "family=sm80",
        "family=sm80,up=128x256x32x4",
        "family=sm80,up=64x128x32x4",
        "family=sm80,down=128x256x32x4",
        "family=sm80,down=64x128x32x4",
        "family=sm90a",
        "family=sm90a,up=128x240x64x4",
        "family=sm90a,up=128x256x64x4",
        "family=sm90a,down=128x128x64x6",
        "family=sm90a,overlap=off",
        "family=sm90a,fence=producer",
        "family=sm90a,multicast=on",
    )
    backward = find_variants(refuse, "fwd_bwd")
    assert backward[-1] == "family=sm90a"
    assert "family=sm80,grad_rows=64x128x32x4" in backward
    assert VARIABLE not in os.environ
    assert find_variants(lambda: None, "fwd") == ()


PRUNED = PrunedCase(name="half", tokens=33, hidden_size=64, intermediate_size=256, block_size=32)


@pytest.mark.parametrize("case", [CASE, PRUNED], ids=["grouped_ffn", "pruned_ffn"])
@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
def test_variants_are_measured_side_by_side(direction: str, case: Case | PrunedCase) -> None:
    measured = measure_variants(
        case,
        torch.bfloat16,
        direction,
        find_target("cpu"),
        Roof(tflops=1.0, gbps=10.0),
        repeats=2,
        variants=("all=a", "all=b"),
    )
    assert [r.provider for r in measured.records] == [CHOSEN, "all=a", "all=b"]
    assert measured.records[1].speedup.keys() == {CHOSEN}
    assert VARIABLE not in os.environ


def test_a_variant_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned_ffn = ops.pruned_ffn

    def spoiled(*arguments: Any) -> torch.Tensor:
        y = pruned_ffn(*arguments)
        if os.environ.get(VARIABLE) == "wrong":
            y[-1] *= 1.1
        return y

    monkeypatch.setattr(ops, "pruned_ffn", spoiled)
    measured = measure_variants(
        PRUNED,
        torch.bfloat16,
        "fwd",
        find_target("cpu"),
        Roof(tflops=1.0, gbps=10.0),
        repeats=2,
        variants=("right", "wrong"),
    )
    assert [r.provider for r in measured.records] == [CHOSEN, "right"]
    assert [(m.provider, m.op) for m in measured.missing] == [("wrong", "pruned_ffn")]
    assert "is off by" in measured.missing[0].reason
