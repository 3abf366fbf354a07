# SPDX-License-Identifier: Apache-2.0
"""The benchmark counts what it says, measures side by side, and its command writes its schema."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_unified.bench import main
from sparse_unified.bench.cases import (
    CASES,
    CUDA_DEFAULTS,
    DIRECTIONS,
    Case,
    work,
)
from sparse_unified.bench.measure import (
    Candidate,
    EventTimer,
    NotMeasured,
    Record,
    Roof,
    Session,
    Subject,
    WallTimer,
    capture,
    measure_interleaved,
    summarize,
)
from sparse_unified.bench.plots import plot
from sparse_unified.bench.report import best_dense
from sparse_unified.bench.suites import BLOCK_PROVIDERS, block_providers, op_suites, pruned_suite
from sparse_unified.bench.target import find_target, slug
from sparse_unified.bench.tune import CHOSEN, find_variants, measure_variants

ROOT = Path(__file__).parent.parent
SMALL = Case(name="small", tokens=37, hidden_size=32, intermediate_size=96, num_experts=8, top_k=3)
SMALL_PRUNED = Case(
    name="small-half-T37", tokens=37, hidden_size=32, intermediate_size=96, block_size=16
)
ROOF = Roof(tflops=1.0, gbps=10.0)
CPU = torch.device("cpu")
SUBJECT = Subject(op="sparse_ffn", case="small", direction="fwd", dtype="float32")
WORK = work("sparse_ffn", SMALL, torch.float32)


def session(repeats: int = 2) -> Session:
    return Session(device=CPU, timer=WallTimer(), roof=ROOF, repeats=repeats)


# Formulas


def test_half_of_the_experts_or_blocks_are_half_of_the_dense_flops() -> None:
    case = CASES["bagel-16to8-T4096"]
    dense = work("dense_ffn", case, torch.bfloat16)
    assert dense.flops == pytest.approx(1.669e12, rel=1e-3)  # spec: 1.669 TFLOP a layer
    for op in ("grouped_ffn", "half_ffn"):
        assert work(op, case, torch.bfloat16).flops * 2 == dense.flops
    pruned = CASES["bagel-half-bs64-T4096"]
    assert work("dense_ffn", pruned, torch.bfloat16) == dense
    assert 2 * work("half_ffn", pruned, torch.bfloat16).flops == dense.flops


def test_backward_counts_the_products_it_repeats_and_the_rows_it_moves() -> None:
    assert work("sparse_ffn", SMALL, torch.float32, "fwd_bwd").flops == 3 * WORK.flops
    assert work("sparse_ffn", SMALL, torch.float32, "fwd_bwd_frozen").flops == 2 * WORK.flops
    rows, tokens = (4 * SMALL.hidden_size * n for n in (SMALL.rows, SMALL.tokens))
    for op, moved in (("permute", 2 * (tokens + rows)), ("combine", 2 * tokens + 3 * rows)):
        indices = work(op, SMALL, torch.float32, "fwd_bwd").bytes - moved
        assert 0 < indices < 0.1 * moved


def test_cases_have_whole_experts_and_blocks_and_cuda_measures_bagel() -> None:
    for case in CASES.values():
        assert case.expert_width * case.num_experts == case.intermediate_size
        assert 1 <= case.top_k <= case.num_experts
        if case.block_size:
            assert case.num_blocks * case.block_size == case.intermediate_size
            assert abs(2 * case.active_width / case.intermediate_size - 1) <= 0.03
    bagel = [CASES[name] for name in CUDA_DEFAULTS]
    assert {case.expert_width for case in bagel if not case.block_size} == {1184, 592}
    assert {(case.hidden_size, case.intermediate_size) for case in bagel} == {(3584, 18944)}
    ceilings = {name: CASES[name].ceiling for name in ("odd-5to2-T1", "bagel-half-bs64-T4096")}
    assert ceilings == {"odd-5to2-T1": 2.5, "bagel-half-bs64-T4096": 2}


def test_the_best_dense_is_the_fastest_one() -> None:
    assert best_dense({"dense": 2.4, "dense_onednn": 1.8, "dense_half": 1.1}) == "dense_onednn"
    assert best_dense({"dense_half": 1.1}) is None


# Measuring


def test_rounds_are_interleaved_and_warmup_is_not_counted() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[int], object]] = {
        name: lambda _, name=name: order.append(name)  # type: ignore[misc]
        for name in ("a", "b")
    }
    seconds = measure_interleaved(calls, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_the_rounds_and_spread_their_quartiles() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "dense": [3.0, 4.0, 4.0]}
    line = summarize(SUBJECT, seconds, "ours", WORK, ROOF, baselines=("dense", "ours"))
    assert line.speedup == {"dense": 2.0}
    assert line.median_us == 2e6
    assert line.spread == 1.5
    assert line.tflops == WORK.flops / 2 / 1e12


def test_providers_that_fail_are_listed_and_the_others_measured() -> None:
    def absent() -> Callable[[int], object]:
        raise NotMeasured("not installed")

    def broken() -> Callable[[int], object]:
        return lambda _: 1 // 0

    builds = {"fine": lambda: lambda _: None, "absent": absent, "broken": broken}
    candidates = {name: Candidate(build=build, work=WORK) for name, build in builds.items()}
    measured = session().measure(SUBJECT, candidates)
    assert [r.provider for r in measured.records] == ["fine"]
    assert measured.records[0].speedup == {}
    assert {m.provider: m.reason for m in measured.missing} == {
        "absent": "not installed",
        "broken": "ZeroDivisionError: integer division or modulo by zero",
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_op_is_measured_alone(direction: str) -> None:
    suites = list(op_suites(SMALL, torch.bfloat16, direction, CPU))
    measured = [session(1).measure(s.subject, s.candidates, s.baselines) for s in suites]
    assert [missing for found in measured for missing in found.missing] == []
    trained = {"route_topk", "permute", "combine", "grouped_ffn"}
    expected = {
        "fwd": trained | {"sort_by_expert", "grouped_ffn_combine", "ffn_importance"},
        "fwd_bwd": trained,
        "fwd_bwd_frozen": {"grouped_ffn"},
    }
    records = [r for found in measured for r in found.records]
    assert {r.op for r in records if r.provider == "sparse_unified"} == expected[direction]
    assert all(r.direction == direction and r.median_us > 0 for r in records)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_of_the_blocks_are_measured_beside_dense(direction: str) -> None:
    suite = pruned_suite(SMALL_PRUNED, torch.float32, direction, CPU)
    measured = session().measure(suite.subject, suite.candidates)
    assert measured.missing == []
    providers = ["dense", "dense_ours", "dense_half", "sparse_unified"]
    assert [r.provider for r in measured.records] == providers
    assert measured.records[-1].speedup.keys() == set(providers[:-1])


def test_providers_of_the_demo_need_no_package() -> None:
    x = torch.randn(SMALL.tokens, SMALL.hidden_size)
    modules = block_providers(SMALL, torch.float32)
    assert tuple(modules) == BLOCK_PROVIDERS
    with torch.no_grad():
        ours, loop = modules["sparse_unified"](x), modules["expert_loop"](x)
    assert (ours - loop).norm() / loop.norm() < 1e-6


@pytest.mark.parametrize("case", [SMALL, SMALL_PRUNED], ids=["grouped_ffn", "pruned_ffn"])
def test_configurations_are_compared_with_the_chosen_one(case: Case) -> None:
    found = measure_variants(case, torch.float32, "fwd_bwd", session(1), ("all=none",))
    assert [r.provider for r in found.records] == [CHOSEN, "all=none"]  # the CPU knows none
    assert found.records[1].speedup.keys() == {CHOSEN}


def test_configurations_are_those_that_the_kernels_list() -> None:
    forward, backward = find_variants("fwd"), find_variants("fwd_bwd")
    assert set(forward) & set(backward) == {"family=sm80", "family=sm90a"}
    assert "family=sm80,down=64x128x32x4" in forward
    assert "family=sm80,grad_rows=64x128x32x4" in backward
    assert {"family=sm90a,overlap=off", "family=sm90a,multicast=on"} < set(forward)


class FakeCuda:
    """Stands for torch.cuda: a log, and a clock that ticks a millisecond an event."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = 0

    def Event(self, *, enable_timing: bool) -> Any:
        cuda = self

        class Event:
            time = 0

            def record(self) -> None:
                cuda.clock += 1
                self.time = cuda.clock
                cuda.log.append("event")

            def elapsed_time(self, other: Any) -> float:
                assert cuda.log[-1] == "synchronize"
                return float(other.time - self.time)

        return Event()

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Stream(self) -> Any:
        return self

    def current_stream(self) -> Any:
        return self

    def wait_stream(self, other: Any) -> None:
        self.log.append("wait")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Any:
        return self

    def pool(self) -> str:
        return "pool"

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.log.append(f"capture {pool}")
        yield

    def replay(self) -> None:
        self.log.append("replay")


def test_events_wait_once_a_round_and_the_cache_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    timer = EventTimer(CPU, flush_bytes=4096, cuda=cuda)
    assert timer._buffer.nbytes == 4096
    assert timer._buffer.min() == 1  # never zeros
    summed = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t: (cuda.log.append("flush"), summed(t))[1])
    calls = {"a": lambda _: cuda.log.append("a"), "b": lambda _: cuda.log.append("b")}
    assert timer.round(calls, 0) == {"a": 1e-3, "b": 1e-3}
    once = ["flush", "event", "{}", "event"]
    expected = [part.format(name) for name in "ab" for part in once]
    assert cuda.log == [*expected, "synchronize"]
    cuda.log.clear()
    timer.round(calls, 1)  # now it knows what launching takes, and hides that
    once.insert(1, "sleep")
    assert cuda.log == [part.format(name) for name in "ab" for part in once] + ["synchronize"]


def test_capture_warms_up_and_makes_a_graph_an_input() -> None:
    cuda = FakeCuda()
    seen: list[int] = []
    replay = capture(seen.append, 2, cuda=cuda)
    assert seen == [0, 1, 2, 0, 1]
    assert cuda.log == ["wait", "wait", "synchronize", "capture None", "capture pool"]
    replay(3)
    assert cuda.log[-1] == "replay"
    assert len(seen) == 5  # nothing runs twice on the host


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command on small cases, in a directory of its own, without the time of the roof."""
    monkeypatch.setitem(CASES, "bagel-16to8-T256", SMALL)
    monkeypatch.setitem(CASES, "bagel-half-bs16-T256", SMALL_PRUNED)
    monkeypatch.setattr("sparse_unified.bench.command.measure_roof", lambda *_: ROOF)
    monkeypatch.chdir(tmp_path)
    arguments = ["--case", "bagel-16to8-T256", "--repeats", "2"]
    for name in (*BLOCK_PROVIDERS, "vllm"):
        arguments += ["--provider", name]
    return lambda *more: main([*arguments, *more])


def test_command_prints_a_table_and_saves_the_schema(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--case", "bagel-half-bs16-T256", "--direction", "all")
    assert command(*both, "--json", "cpu.json") == 0
    assert "x baseline" in capsys.readouterr().out
    saved = json.loads(Path("cpu.json").read_text())
    assert set(saved) == {
        *("commit", "date", "device", "versions", "roof", "overhead", "records", "not_measured"),
        "states",
    }
    assert saved["records"][0].keys() == Record.__dataclass_fields__.keys()
    block = [r for r in saved["records"] if r["op"] == "sparse_ffn"]
    assert {r["provider"] for r in block} == set(BLOCK_PROVIDERS)
    assert {r["direction"] for r in block} == set(DIRECTIONS)
    assert {r["case"] for r in saved["records"] if r["op"] == "pruned_ffn"} == {"small-half-T37"}
    ours = next(r for r in block if r["provider"] == "sparse_unified")
    assert ours["speedup"].keys() == set(BLOCK_PROVIDERS) - {"sparse_unified"}
    assert saved["overhead"]["small"].keys() == {"alone", "fused"}
    assert {m["provider"] for m in saved["not_measured"]} == {"vllm"}
    assert not Path("bench-results").exists()


def test_command_saves_by_the_name_of_the_device_and_prints_json_alone(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--op", "sparse_ffn") == 0
    capsys.readouterr()
    assert {path.name for path in Path("bench-results").iterdir()} == {"cpu.json", "cpu.txt"}
    assert command("--op", "route_topk", "--json", "-") == 0
    assert {r["op"] for r in json.loads(capsys.readouterr().out)["records"]} == {"route_topk"}


def test_every_saved_result_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    plot(content, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


def test_roofs_are_measured_on_products_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_unified.bench import target

    monkeypatch.setattr(target, "_CPU_GEMM", (64, 64, 64))
    monkeypatch.setattr(target, "_CPU_FFN", (16, 32, 128))
    monkeypatch.setattr(target, "_CPU_COPY_BYTES", 4096)
    roof = target.measure_roof(torch.float32, find_target("cpu"), repeats=2)
    assert roof.gemms.keys() == {"torch", "onednn", "pruned_ffn"}
    assert roof.tflops >= max(roof.gemms.values())
    assert asdict(roof)["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        (["--device", "cuda:99"], "device must be one of the"),
        (["--graph"], "--graph must go with a CUDA device"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--threads", "-1"], "threads must be at least 1, got -1"),
        (["--json", "no/x.json"], "--json must be a file .*, got 'no/x.json'"),
        (["--out", __file__], "--out must be a directory, got the file"),
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


def test_results_are_named_after_the_device() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "Tesla T4")
    assert [slug(name) for name in names] == ["h200", "h100-80gb-hbm3", "rtx-4090", "t4"]


@pytest.mark.slow
def test_the_gpu_script_runs_as_far_as_a_cpu_goes(tmp_path: Path) -> None:
    script = str(ROOT / "bench" / "gpu_check.py")
    ran = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert checks["not_run"] == []
    assert {said["outcome"] for said in checks["checks"]} <= {"passed", "skipped"}
    assert json.loads((tmp_path / "cpu.json").read_text())["records"]
