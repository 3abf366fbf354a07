# SPDX-License-Identifier: Apache-2.0
"""Kernels that are wrong are found in a child process, and left out from then on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import make_dense

from sparse_unified import checks, doctor
from sparse_unified.cli import main
from sparse_unified.ops import backend, choices

CPU = torch.device("cpu")
CHILD = (sys.executable, str(Path(__file__).parent / "doctor_child.py"))
# On one group of 70 rows, which the kernels for Hopper take.
HOPPER = "kernels.pruned_ffn_of_any_list[(9, 64)-70-float16-all]"
BLOCK = "kernels.block_is_that_of_the_cpu[bfloat16-0-False-61]"
FAULTS = ("", "AssertionError", "the process ended with status -6", "did not end within 20 s")
QUICK = "kernels.gradient_of_permute[float32-41]"


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps what is found out."""
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "cache"))
    return choices.path()


def in_a_new_process(code: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [*product(("sm90a", "grouped_mm:10"), range(4)), ("grouped_mm:9", 1)],
)
def test_a_family_that_fails_is_left_out_and_the_next_one_runs(
    kernel: str, fault: int, file: Path
) -> None:
    """The fault is in every kernel for Hopper, or in torch's products; the next family passes."""
    name, told = (HOPPER if kernel == "sm90a" else BLOCK), FAULTS[fault]
    families = (kernel.partition(":")[0], "sm80")
    command = (*CHILD, str(fault), kernel)
    report = doctor.examine("cpu", stall=20, families=families, command=command, names=[name])
    first, second = report.families
    assert first.failure.startswith(f"{name}: {told}" if fault else "")
    assert report.ok == (first.failure == "") == (fault == 0)
    assert (second.failure, second.num_passed) == ("", 1)
    assert 0 < second.largest_error < 0.01
    assert report.runs == families[fault > 0]
    assert told in report.sentence
    assert file.exists() == (fault > 0)
    if fault:
        [entry] = json.loads(file.read_text()).values()
        assert entry["refused"].keys() == {families[0]}
        assert f"{families[0]} fails" in str(report)


@pytest.mark.parametrize(
    ("capability", "families"),
    [
        ((8, 6), ("sm80", "torch")),
        ((9, 0), ("sm90a", "sm80", "grouped_mm", "torch")),
        ((10, 0), ("grouped_mm", "sm80", "torch")),
        ((12, 0), ("sm80", "torch")),
    ],
)
def test_each_device_has_its_families_and_each_family_its_checks(
    capability: tuple[int, int], families: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(backend, "device_refusal", lambda _: None)
    monkeypatch.setattr(backend, "_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(backend, "architectures", lambda: ("sm_80", "sm_90a", "sm_100", "sm_120"))
    assert doctor.families_of(device) == families
    names = doctor.vital_checks(device)
    asked = {f: [name for name in names if doctor._concerns(name, f)] for f in families}
    assert len(asked["sm80"]) == len(names) - 2
    if "grouped_mm" in families:
        assert len(asked["grouped_mm"]) == 7  # products, block, compiled, captured twice
        assert not any("float16" in n and "bfloat16" not in n for n in asked["grouped_mm"])


def test_what_failed_runs_no_more_and_says_so_until_it_is_forgotten(file: Path) -> None:
    doctor._change(CPU, refused={"cpu": "fail NAME: wrong"}, variants={"90 132 1 1": "family=sm80"})
    code = (
        "import torch; from sparse_unified.build import build_info\n"
        "from sparse_unified.nn import SparseMoE, dense\n"
        "block = SparseMoE(16, 64, 4, 2, return_router_logits=False); x = torch.randn(5, 16)\n"
        "torch.compile(block.route, fullgraph=True, backend='eager')(x); block(x)\n"
        "assert block.active_backend == 'torch: cpu kernels fail NAME: wrong'\n"
        "assert dense._KERNEL_DTYPES == []\n"
        "assert build_info().problems == ('cpu: without cpu: fail NAME: wrong',)\n"
    )
    assert in_a_new_process(code).count("kernels cpu are left out on") == 1
    assert doctor.reset("cpu") == ["cpu: fail NAME: wrong", "90 132 1 1: family=sm80"]
    assert not file.exists()
    assert doctor.reset("cpu") == []
    in_a_new_process("from sparse_unified.ops import choices; assert choices.read() == {}")


def test_another_driver_or_library_is_a_clean_slate_and_a_broken_file_is_none(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    doctor._change(CPU, refused={"sm90a": "fail"}, variants={"90 132 8 1 8 0 64 1": "family=sm80"})
    lines = ["90 0 0 0 0 0 0 0 family=sm80", "90 132 8 1 8 0 64 1 family=sm80"]
    assert choices.rules(choices.read()).splitlines() == lines
    monkeypatch.setattr(choices, "driver", lambda: "1.0")
    assert choices.rules(choices.read()) == ""
    for text in ("{", "[]", '{"a": {}}', '{"a": {"refused": 1, "variants": {}}}'):
        file.write_text(text)
        assert choices.read() == {}
        assert "is ignored" in caplog.text
        caplog.clear()


def test_the_doctor_looks_at_everything_that_a_model_needs() -> None:
    for place, dtype in (("cpu", "float32"), ("cuda", "bfloat16"), ("emulated", "float16")):
        known = checks.all_checks(place)
        names = [name.format(dtype) for name in doctor.VITAL if name.format(dtype) in known]
        assert len(names) >= 12
    every = set(checks.all_checks())
    dtypes = ("float32", "bfloat16", "float16")
    assert all(any(name.format(dtype) in every for dtype in dtypes) for name in doctor.VITAL)


def test_the_command_prints_a_table_and_the_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = "kernels.block_is_that_of_the_cpu[float32-0-False-61]"
    monkeypatch.setattr(doctor, "VITAL", (QUICK, block))
    monkeypatch.setattr(doctor, "_TIMED", {"forward": "fwd"})
    assert main(["doctor", "--device", "cpu", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in told["families"]] == ["cpu", "torch"]
    assert [f["num_passed"] for f in told["families"]] == [2, 1]
    assert all(f["over_dense"]["forward"] > 0 for f in told["families"])
    assert told["runs"] == "cpu"
    assert told["sentence"].startswith("sparse_unified ")
    assert main(["doctor", "--device", "cpu", "--reset"]) == 0
    assert capsys.readouterr().out == "nothing was kept\n"


def test_a_child_that_cannot_begin_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="process must begin, got one that ended with status 3"):
        doctor.examine("cpu", names=[QUICK], command=(sys.executable, "-c", "exit(3)"))


# tune


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    dense = make_dense(tmp_path / "dense")
    counts = ["--num-experts", "4", "--top-k", "2"]
    assert main(["convert", str(dense), str(tmp_path / "sparse"), *counts]) == 0
    return tmp_path / "sparse"


def test_the_choice_is_timed_for_the_sizes_of_a_model(
    sparse: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, where there is nothing else to choose."""
    capsys.readouterr()
    assert main(["tune", str(sparse), "--device", "cpu", "--tokens", "7", "--json", "-"]) == 0
    winners = json.loads(capsys.readouterr().out)["winners"]
    assert [winner["direction"] for winner in winners] == ["fwd", "fwd_bwd"]
    assert all(w["variant"] == "chosen" and w["microseconds"] > 0 for w in winners)
    assert not file.exists()
    with pytest.raises(ValueError, match="must hold sparse FFNs, got a dense model"):
        doctor.tune(sparse.parent / "dense", "cpu")


def test_winners_are_kept_where_they_are_faster(
    sparse: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedups = [1.3, 1.01, 1.2]

    def results(command: Any, names: list[str], **_: Any) -> Iterator[dict[str, Any]]:
        for name, speedup in zip(names, speedups, strict=False):
            found = {"variant": "family=sm80", "microseconds": 5.0, "speedup": speedup}
            yield {"name": name, "outcome": "passed", "sizes": f"size {speedup}", **found}
        yield {"name": names[3], "outcome": "failed", "text": "did not end within 9 s"}

    monkeypatch.setattr(checks, "results", results)
    report = doctor.tune(sparse, "cpu", tokens=(8, 16))
    assert not report.ok
    assert "did not end within 9 s" in str(report)
    [entry] = json.loads(file.read_text()).values()
    assert entry["variants"] == {"size 1.3": "family=sm80", "size 1.2": "family=sm80"}
    doctor._change(CPU, refused={"sm80": "fail"})  # whose variants are no winners any more
    assert choices.read()[choices.key_of(CPU)]["variants"] == {}
