# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the GPU check, the most wanted numbers first, saved after each."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import command
from ..block import Measured
from ..cases import CASES, PRUNED_CASES, Case, PrunedCase
from ..kernels import profile
from ..peers import PEERS, Setting
from ..providers import sparse_block
from ..report import Report
from ..suites import OpCalls
from ..target import find_target
from ..variants import measure_variants
from .environment import OPTIONAL, registered
from .job import FAILED, PASSED, ROOT, SKIPPED, Job, write_json

# In one process; the others run in one of their own each, since what they do to it is not known.
TRUSTED = (
    "dense",
    "dense_half",
    "dense_compile",
    "expert_loop",
    "grouped_mm",
    "transformers_grouped_mm",
    "sparse_unified",
)
_LARGE = ("bagel-16to8-T4096", "bagel-32to16-T4096")
_SMALLER = (
    "bagel-16to8-T1024",
    "bagel-16to8-T256",
    "bagel-32to16-T1024",
    "bagel-32to16-T256",
)
_PRUNED = ("bagel-half-bs64-T4096", "bagel-half-bs16-T4096")
_DRY = ("odd-7to3-T300",)
# Seconds that a step may take; none is begun that might not end.
_STEP_SECONDS = 12.0


def _steps(job: Job, report: Report, dtype: torch.dtype) -> list[Callable[[], None]]:
    """What to measure, the most wanted first."""
    repeats = 2 if job.is_dry else 30
    large, smaller = (_DRY, ()) if job.is_dry else (_LARGE, _SMALLER)
    lacking = [op for op in OPTIONAL if not registered(op, job.torch_device)]
    ops = [op for op in command.OPS if op not in (command.BLOCK, command.PRUNED, *lacking)]

    def step(case: str, direction: str, **options: Any) -> Callable[[], None]:
        return lambda: command.run(
            report, cases=(case,), dtype=dtype, directions=(direction,), repeats=repeats, **options
        )

    block = {"ops": (command.BLOCK,), "providers": TRUSTED}
    if job.is_dry:  # compiling takes longer than all else
        block["providers"] = tuple(name for name in TRUSTED if name != "dense_compile")
    steps = [step(case, "fwd", **block) for case in large]
    steps += [step(case, "fwd", ops=ops) for case in large]
    steps += [step(case, "fwd_bwd", **block) for case in large]
    steps += [step(large[0], "fwd_bwd_frozen", **block)]
    if command.PRUNED not in lacking and not job.is_dry:
        steps += [step(case, "fwd", ops=(command.PRUNED,)) for case in _PRUNED]
    steps += [step(case, "fwd", **block) for case in smaller]
    steps += [step(case, "fwd_bwd", ops=ops) for case in large]
    steps += [step(case, "fwd", ops=ops) for case in smaller]
    if not job.is_dry:
        quick = {"ops": (command.BLOCK,), "providers": ("dense", "sparse_unified"), "graph": True}
        steps += [step(case, "fwd", **quick) for case in _SMALLER]
    return steps


def profile_kernels(job: Job, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The kernels of grouped_ffn on the large cases."""
    found = []
    for name in _LARGE:
        case = CASES[name]
        x = torch.randn(case.tokens, case.hidden_size, device=job.torch_device).to(dtype)
        with torch.inference_mode():
            calls = OpCalls(sparse_block(case, dtype, device=job.torch_device), x)
            found += profile(partial(calls.ours["grouped_ffn"], x), case, dtype)
    return [dataclasses.asdict(kernel) for kernel in found]


def save(job: Job, report: Report, status: str) -> None:
    """Writes the file of the part, and the result as bench/results holds them."""
    report.states["after"] = report.target.state()
    result = report.as_json() | {"kernels": job.content.get("kernels", [])}
    write_json(job.out / f"{report.target.slug}.json", result)
    ratios = [
        f"{r.case} {r.direction}: {r.speedup['dense']:.2f}x dense"
        for r in report.measured.records
        if r.provider == "sparse_unified" and r.op == command.BLOCK and "dense" in r.speedup
    ]
    job.content["result"] = f"{report.target.slug}.json"
    job.save(status, "; ".join(ratios) or "nothing was measured")


def run(job: Job) -> bool:
    """Measures as much as there is time for; fails when ours was not measured or was wrong."""
    dtype = torch.bfloat16
    report = command.start(find_target(job.device), dtype)
    wrong: list[str] = []
    skipped = 0
    for step in _steps(job, report, dtype):
        if job.left() < _STEP_SECONDS and not job.is_dry:
            skipped += 1
            continue
        step()
        save(job, report, PASSED)
    job.content["steps_without_time"] = skipped
    if not job.is_dry:
        try:
            job.content["kernels"] = profile_kernels(job, dtype)
        except Exception as error:  # the profiler is not what is checked
            job.content["profiler"] = str(error)
    wrong = [
        f"{m.provider} {m.op} {m.case} {m.direction}: {m.reason}"
        for m in report.measured.missing
        if m.provider == "sparse_unified"
    ]
    ok = not wrong and any(r.provider == "sparse_unified" for r in report.measured.records)
    save(job, report, PASSED if ok else FAILED)
    if wrong:
        job.save(FAILED, "; ".join(wrong[:4]))
    print(report.text())
    return ok


def run_variants(job: Job) -> bool:
    """Every configuration of the expert GEMMs that the kernels know, beside the chosen one."""
    dtype = torch.bfloat16
    report = command.start(find_target(job.device), dtype)
    cases: list[Case | PrunedCase] = [CASES[name] for name in (_DRY if job.is_dry else _LARGE)]
    if not job.is_dry and registered(command.PRUNED, job.torch_device):
        cases += [PRUNED_CASES[name] for name in _PRUNED]
    for direction in ("fwd", "fwd_bwd"):
        for case in cases:
            if job.left() < _STEP_SECONDS and not job.is_dry:
                continue
            found: Measured = measure_variants(
                case,
                dtype,
                direction,
                report.target,
                report.roof,
                repeats=2 if job.is_dry else 20,
                variants=("all=none",) if job.is_dry else None,
            )
            report.measured.records += found.records
            report.measured.missing += found.missing
            job.content["result"] = report.as_json()
            job.save(PASSED, f"{len(report.measured.records)} measured")
    print(report.text())
    return bool(report.measured.records)


def run_peer(job: Job, name: str) -> bool:
    """One peer beside dense and ours, forward and backward."""
    report = command.start(find_target(job.device), torch.bfloat16)
    for case in _DRY if job.is_dry else _LARGE:
        for direction in ("fwd", "fwd_bwd"):
            command.run(
                report,
                cases=(case,),
                dtype=torch.bfloat16,
                directions=(direction,),
                repeats=2 if job.is_dry else 30,
                ops=(command.BLOCK,),
                providers=("dense", "sparse_unified", name),
            )
            job.content["result"] = report.as_json()
            job.save(PASSED, name)
    print(report.text())
    return any(r.provider == name for r in report.measured.records)


def other_peers(device: torch.device) -> dict[str, str | None]:
    """Peers that run in processes of their own, and why not."""
    setting = Setting(case=CASES[_LARGE[0]], dtype=torch.bfloat16, device=device)
    return {name: peer.unavailable(setting) for name, peer in PEERS.items() if name not in TRUSTED}


def run_peers(job: Job) -> bool:
    """Starts a process for every other peer that is installed; what one does hurts no other."""
    peers = other_peers(job.torch_device)
    here = [name for name, reason in peers.items() if reason is None]
    job.content |= {"absent": {n: r for n, r in peers.items() if r is not None}, "results": {}}
    outcomes = {}
    for position, name in enumerate(here):
        share = max((job.left() - 2) / (len(here) - position), 5)
        part = f"peer-{name}"
        command_line = [sys.executable, str(ROOT / "bench" / "gpu_check.py")]
        command_line += ["--part", part, "--out", str(job.out), "--device", job.device]
        command_line += ["--seconds", f"{share:.0f}"]
        try:
            status = subprocess.run(command_line, timeout=share, check=False, cwd=ROOT).returncode
            outcomes[name] = "measured" if status == 0 else "not measured"
        except subprocess.TimeoutExpired:
            outcomes[name] = "out of time"
        path = job.out / f"{part}.json"
        if path.exists():
            job.content["results"][name] = json.loads(path.read_text()).get("result")
            path.unlink()
        job.save(PASSED, ", ".join(f"{n}: {o}" for n, o in outcomes.items()))
    if not here:
        job.save(SKIPPED, "no other peer is installed")
    return True
