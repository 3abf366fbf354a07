# SPDX-License-Identifier: Apache-2.0
"""The benchmark counts what it says, refuses wrong peers, and its command writes its schema."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_unified.bench import main
from sparse_unified.bench.cases import CASES, CUDA_DEFAULTS, DIRECTIONS, Case, work
from sparse_unified.bench.check import WrongResultError, check_result, expert_weights, reference
from sparse_unified.bench.measure import (
    LEAST_ROUNDS,
    Candidate,
    EventTimer,
    NotMeasured,
    Roof,
    Run,
    Suite,
    capture,
    measure_interleaved,
    summarize,
    wall_clock,
)
from sparse_unified.bench.peers import PEERS, Provider, Setting, draw_weights
from sparse_unified.bench.plots import plot
from sparse_unified.bench.report import as_text, best_dense, is_steady
from sparse_unified.bench.suites import (
    BLOCK_PROVIDERS,
    CHOSEN,
    block_providers,
    block_suite,
    find_variants,
    op_suites,
    pruned_suite,
    set_variant,
    variant_suite,
)
from sparse_unified.bench.target import find_target, measure_roof, slug
from sparse_unified.ops import reference as op_reference

ROOT = Path(__file__).parent.parent
SMALL = Case(name="small", tokens=67, hidden_size=48, intermediate_size=224, num_experts=7, top_k=3)
PRUNED = Case(name="half-T37", tokens=37, hidden_size=32, intermediate_size=96, block_size=16)
ROOF = Roof(tflops=1.0, gbps=10.0)
CPU = torch.device("cpu")
SUBJECT = {"op": "sparse_ffn", "case": "small", "direction": "fwd", "dtype": "float32"}
WORK = work("sparse_ffn", SMALL, torch.float32)


def measured(*suites: Suite, repeats: int = 1) -> Run:
    run = Run(device=CPU, timer=wall_clock, roof=ROOF, repeats=repeats)
    for suite in suites:
        run.measure(suite)
    return run


def reasons(run: Run) -> dict[str, str]:
    return {m["provider"]: m["reason"] for m in run.missing}


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
    moved = 2 * (tokens + rows)
    indices = work("permute", SMALL, torch.float32, "fwd_bwd").bytes - moved
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
    ceilings = {name: CASES[name].ceiling for name in ("odd-5to2-T1", "bagel-half-bs64-T4096")}
    assert ceilings == {"odd-5to2-T1": 2.5, "bagel-half-bs64-T4096": 2}


# Measuring


def test_rounds_are_interleaved_and_end_in_time_and_warmup_is_not_counted() -> None:
    order: list[str] = []
    calls = {name: lambda _, name=name: order.append(name) for name in ("a", "b")}
    seconds = measure_interleaved(calls, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}
    late = measure_interleaved(calls, repeats=100, seconds=0)
    assert len(late["a"]) == LEAST_ROUNDS


def test_a_ratio_is_the_median_of_the_rounds_and_wide_rounds_are_not_quoted() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "dense": [3.0, 4.0, 4.0]}
    line = summarize(seconds, "ours", WORK, ROOF)
    assert line["speedup"] == {"dense": 2.0}
    assert line["median_us"] == 2e6
    assert line["spread"] == 1.5
    assert line["tflops"] == line["roof_fraction"] == WORK.flops / 2 / 1e12
    assert not is_steady(line)
    assert is_steady(summarize({"a": [1.0, 1.0, 1.1]}, "a", WORK, ROOF))
    assert best_dense({"dense": 2.4, "dense_onednn": 1.8, "dense_half": 1.1}) == "dense_onednn"
    assert best_dense({"dense_half": 1.1}) is None


def test_providers_that_fail_are_listed_and_the_others_measured() -> None:
    def absent() -> Callable[[int], object]:
        raise NotMeasured("not installed")

    builds = {
        "fine": lambda: lambda _: None,
        "absent": absent,
        "broken": lambda: lambda _: 1 // 0,
    }
    candidates = {name: Candidate(build=build, work=WORK) for name, build in builds.items()}
    run = measured(Suite(subject=SUBJECT, candidates=candidates))
    assert [r["provider"] for r in run.records] == ["fine"]
    assert reasons(run) == {
        "absent": "not installed",
        "broken": "ZeroDivisionError: integer division or modulo by zero",
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_op_and_half_of_the_blocks_are_measured(direction: str) -> None:
    run = measured(
        *op_suites(SMALL, torch.bfloat16, direction, CPU),
        pruned_suite(PRUNED, torch.float32, direction, CPU),
    )
    trained = {"route_topk", "permute", "grouped_ffn_combine"}
    expected = {
        "fwd": trained | {"sort_by_expert", "grouped_ffn", "combine", "ffn_importance"},
        "fwd_bwd": trained,
        "fwd_bwd_frozen": {"grouped_ffn_combine"},
    }
    assert run.missing == []
    ours = {r["op"] for r in run.records if r["provider"] == "sparse_unified"}
    assert ours == expected[direction] | {"pruned_ffn"}
    providers = {"dense", "dense_ours", "dense_half", "sparse_unified"}
    assert {r["provider"] for r in run.records if r["op"] == "pruned_ffn"} == providers
    assert run.records[-1]["speedup"].keys() == providers - {"sparse_unified"}


@pytest.mark.parametrize("case", [SMALL, PRUNED], ids=["grouped_ffn", "pruned_ffn"])
def test_configurations_are_compared_with_the_chosen_one(case: Case) -> None:
    found = measured(variant_suite(case, torch.float32, "fwd_bwd", CPU, ("all=none",)))
    set_variant(CHOSEN)
    # The CPU knows none.
    assert {r["provider"]: set(r["speedup"]) for r in found.records} == {
        CHOSEN: set(),
        "all=none": {CHOSEN},
    }
    forward, backward = find_variants("fwd"), find_variants("fwd_bwd")
    assert set(forward) & set(backward) == {"family=sm80", "family=sm90a"}
    assert "family=sm80,down=64x128x32x4" in forward
    assert "family=sm80,grad_rows=64x128x32x4" in backward


class FakeCuda:
    """Stands for torch.cuda: a log, and a clock that ticks a millisecond an event."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = self.time = 0

    def __getattr__(self, name: str) -> Any:
        """_sleep, synchronize, wait_stream and replay, which are logged."""
        return lambda *_: self.log.append(name)

    def Event(self, *, enable_timing: bool) -> Any:
        event = FakeCuda()

        def record() -> None:
            self.clock += 1
            event.time = self.clock
            self.log.append("event")

        event.record = record  # type: ignore[attr-defined]
        event.elapsed_time = lambda other: float(other.time - event.time)  # type: ignore[attr-defined]
        return event

    def Stream(self) -> Any:
        return self

    current_stream = CUDAGraph = Stream

    def pool(self) -> str:
        return "pool"

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.log.append(f"capture {pool}")
        yield


def test_events_wait_once_a_round_and_the_cache_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    timer = EventTimer(CPU, flush_bytes=4096, cuda=cuda)
    assert timer._buffer.nbytes == 4096
    assert timer._buffer.min() == 1  # never zeros
    summed = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t: (cuda.log.append("flush"), summed(t))[1])
    calls = {"a": lambda _: cuda.log.append("a"), "b": lambda _: cuda.log.append("b")}
    assert timer(calls, 0) == {"a": 1e-3, "b": 1e-3}
    once = ["flush", "event", "{}", "event"]
    assert cuda.log == [part.format(name) for name in "ab" for part in once] + ["synchronize"]
    cuda.log.clear()
    timer(calls, 1)  # now it knows what launching takes, and hides that
    once.insert(1, "_sleep")
    assert cuda.log == [part.format(name) for name in "ab" for part in once] + ["synchronize"]


def test_capture_warms_up_and_makes_a_graph_an_input() -> None:
    cuda = FakeCuda()
    seen: list[int] = []
    replay = capture(seen.append, 2, cuda=cuda)
    assert seen == [0, 1, 2, 0, 1]
    wait = ["wait_stream", "wait_stream", "synchronize"]
    assert cuda.log == [*wait, "capture None", "capture pool"]
    replay(3)
    assert cuda.log[-1] == "replay"
    assert len(seen) == 5  # nothing runs twice on the host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_exceeds_the_peak(dtype: torch.dtype) -> None:
    roof = measure_roof(dtype, find_target("cpu"))
    assert roof.peaks["baseline"].keys() == {"1"}
    strongest = list(roof.peaks.values())[-1]["1"]
    assert strongest >= 0.9 * roof.peaks["baseline"]["1"]
    x = torch.randn(512, 512)
    seconds = measure_interleaved({"x": lambda _: x @ x}, repeats=10)["x"]
    assert 2 * 512**3 / min(seconds) / 1e12 < 1.1 * roof.tflops  # busy machines change their clock
    assert 0 < roof.gbps < 10_000
    assert "1 threads" in roof.source


# Peers


def setting(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Setting:
    return Setting(case=SMALL, dtype=dtype, device=torch.device(device))


def build(name: str, dtype: torch.dtype = torch.float32) -> Provider:
    try:
        return PEERS[name].build(setting(dtype), draw_weights(SMALL, dtype))
    except NotMeasured as reason:
        pytest.skip(str(reason))


def check(provider: Provider, dtype: torch.dtype = torch.float32, trains: bool = False) -> None:
    x, grad = (torch.randn(SMALL.tokens, SMALL.hidden_size).to(dtype) for _ in range(2))
    check_result(provider, x, SMALL, draw_weights(SMALL, dtype), grad if trains else None)


def test_reference_is_the_block_of_the_ops() -> None:
    weights = draw_weights(SMALL, torch.float32)
    x = torch.randn(SMALL.tokens, SMALL.hidden_size)
    logits, topk_logits, topk_idx = op_reference.route_topk(x, weights.gate, SMALL.top_k)
    by_expert = expert_weights(1 + topk_logits, topk_idx, SMALL.num_experts)
    expected, _ = op_reference.sparse_ffn(
        x, weights.gate, SMALL.top_k, weights.gate_proj, weights.up_proj, weights.down_proj
    )
    torch.testing.assert_close(reference(x, by_expert, weights), expected, rtol=1e-4, atol=1e-5)
    assert 0.5 < logits.std() < 2
    assert 0.2 < expected.std() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PEERS)
def test_peer_computes_the_reference(name: str, dtype: torch.dtype) -> None:
    if name == "dense_compile" and dtype != torch.float32:
        pytest.skip("compiles for a minute")
    provider = build(name, dtype)
    check(provider, dtype)
    if PEERS[name].trains and name != "dense_compile":
        check(provider, dtype, trains=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: torch.cat((y[:5], y[6:7], y[6:])), "output is off"),  # one token is another
        (lambda y: y * 1.1, "output is off"),
        (lambda y: y.index_fill(0, torch.tensor([66]), torch.nan), "output is off by nan"),
        (lambda y: y[:-1], "output is .66, 48."),
        (lambda y: y.double(), "torch.float64"),
    ],
)
def test_a_wrong_output_is_found(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    provider = build("grouped_mm")
    run = provider.forward
    provider.forward = lambda x: spoil(run(x))  # type: ignore[method-assign]
    with pytest.raises(WrongResultError, match=message):
        check(provider)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_expert_row_and_a_lost_gradient_are_found(dtype: torch.dtype) -> None:
    def losing(x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        lost = (torch.tensor([33]), torch.tensor([2]))
        return run(x, weights.index_put(lost, torch.zeros(1)), topk_idx)

    provider: Any = build("grouped_mm", dtype)
    run = provider.run
    provider.run = losing
    with pytest.raises(WrongResultError, match="output is off"):
        check(provider, dtype)
    provider.run = lambda x, weights, topk_idx: run(x, weights.detach(), topk_idx)
    with pytest.raises(WrongResultError, match="gradient of the tokens"):
        check(provider, dtype, trains=True)


def absent(*_: Any) -> Provider:
    raise NotMeasured("not installed")


def test_wrong_and_absent_peers_are_listed_and_the_others_measured() -> None:
    class Wrong(type(build("dense"))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    dense = PEERS["dense"]
    peers = {
        "dense": dense,
        "wrong": replace(dense, build=Wrong),
        "absent": replace(dense, build=absent),
        "forward_only": replace(dense, trains=False),
        "sparse_unified": PEERS["sparse_unified"],
    }
    run = measured(block_suite(SMALL, torch.float32, "fwd_bwd", CPU, peers=peers))
    assert [r["provider"] for r in run.records] == ["dense", "sparse_unified"]
    assert reasons(run)["wrong"].startswith("WrongResultError: output is off")
    assert reasons(run)["absent"] == "not installed"
    assert reasons(run)["forward_only"] == "has no backward"
    with pytest.raises(NotMeasured, match="needs the CPU"):
        PEERS["dense_onednn"].build(setting(device="cuda"), draw_weights(SMALL, torch.float32))


@pytest.mark.parametrize("direction", ["fwd_bwd", "fwd_bwd_frozen"])
def test_frozen_experts_get_no_gradient(direction: str) -> None:
    built: list[Provider] = []
    ours = PEERS["sparse_unified"]
    peer = replace(ours, build=lambda s, w: built.append(ours.build(s, w)) or built[-1])
    suite = block_suite(SMALL, torch.float32, direction, CPU, peers={"ours": peer})
    suite.candidates["ours"].build()
    learns = {name for name, p in built[0].named_parameters() if p.requires_grad}
    assert ("block.up_proj" in learns) is (direction == "fwd_bwd")
    assert "gate.weight" in learns


def test_providers_of_the_demo_need_no_package() -> None:
    x = torch.randn(SMALL.tokens, SMALL.hidden_size)
    modules = block_providers(SMALL, torch.float32)
    assert tuple(modules) == BLOCK_PROVIDERS
    with torch.no_grad():
        ours, loop = modules["sparse_unified"](x), modules["expert_loop"](x)
    assert (ours - loop).norm() / loop.norm() < 1e-6


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command on small cases, in a directory of its own, without the time of the roof."""
    monkeypatch.setitem(CASES, "bagel-16to8-T1024", replace(SMALL, name="small-T1024"))
    monkeypatch.setitem(CASES, "bagel-half-bs16-T1024", replace(PRUNED, name="half-T1024"))
    monkeypatch.setattr("sparse_unified.bench.command.measure_roof", lambda *_: ROOF)
    monkeypatch.chdir(tmp_path)
    arguments = ["--case", "bagel-16to8-T1024", "--repeats", "2"]
    for name in BLOCK_PROVIDERS:
        arguments += ["--provider", name]
    return lambda *more: main([*arguments, *more])


def test_command_prints_a_table_saves_the_schema_and_draws(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    both = ("--case", "bagel-half-bs16-T1024", "--direction", "all", "--op", "sparse_ffn")
    assert command(*both, "--op", "pruned_ffn", "--json", "cpu.json") == 0
    assert "ratio" in capsys.readouterr().out
    saved = json.loads(Path("cpu.json").read_text())
    fields = "commit date device versions roof records not_measured states"
    assert set(saved) == set(fields.split())
    fields = "op case direction dtype provider median_us min_us spread tflops gbps roof_fraction"
    assert saved["records"][0].keys() == {*fields.split(), "speedup", "graph"}
    block = [r for r in saved["records"] if r["op"] == "sparse_ffn"]
    assert {r["provider"] for r in block} == set(BLOCK_PROVIDERS)
    assert {r["direction"] for r in saved["records"]} == set(DIRECTIONS)
    assert {r["case"] for r in saved["records"]} == {"small-T1024", "half-T1024"}
    text = Path("cpu.txt").read_text()
    assert "not to be quoted" in text
    assert Path("cpu.svg").read_text().startswith("<?xml")
    assert not Path("bench-results").exists()


def test_command_saves_by_the_name_of_the_device_and_prints_json_alone(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--op", "route_topk") == 0
    capsys.readouterr()
    assert {path.name for path in Path("bench-results").iterdir()} == {"cpu.json", "cpu.txt"}
    assert command("--op", "route_topk", "--json", "-") == 0
    assert {r["op"] for r in json.loads(capsys.readouterr().out)["records"]} == {"route_topk"}


def test_the_ceiling_stands_beside_ratios_over_dense_and_wide_rounds_are_marked() -> None:
    seconds = {"dense": [2.0, 2.0, 2.0], "sparse_unified": [1.0, 1.0, 2.0]}
    subject = SUBJECT | {"case": "quarter-16to8-T1024"}
    records = [
        {**subject, "provider": name, **summarize(seconds, name, WORK, ROOF), "graph": False}
        for name in seconds
    ]
    content = {"device": "x", "versions": {"torch": "2"}, "states": {}, "not_measured": []}
    text = as_text({**content, "roof": {"tflops": 1.0, "gbps": 1.0}, "records": records})
    dense, ours = text.splitlines()[-2:]
    assert "2.00x of 2 dense (best dense)" in ours
    assert "100%!" in ours
    assert "!" not in dense


def test_every_saved_result_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    plot(content, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


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


def test_wrong_usage_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--case", "nonsense"])
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("sparse-unified: error: bench: ")
    assert stderr.count("\n") == 1


def test_results_are_named_after_the_device() -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "Tesla T4")
    assert [slug(name) for name in names] == ["h200", "h100-80gb-hbm3", "rtx-4090", "t4"]


@pytest.mark.slow
def test_the_gpu_script_runs_as_far_as_a_cpu_goes(tmp_path: Path) -> None:
    script, out = str(ROOT / "bench" / "gpu_check.py"), tmp_path / "out"
    command = [sys.executable, script, "--device", "cpu", "--out", str(out), "--seconds", "3000"]
    environment = os.environ | {"OUT": str(tmp_path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with tarfile.open(tmp_path / "gpu_check.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()} - {"out"}
    assert packed == {path.name for path in out.iterdir()}
    families = json.loads((out / "families.json").read_text())
    assert families["runs"] == "cpu"
    checks = json.loads((out / "checks.json").read_text())
    assert checks["not_run"] == []
    assert {said["outcome"] for said in checks["checks"]} <= {"passed", "skipped"}
    assert json.loads((out / "cpu.json").read_text())["records"]
