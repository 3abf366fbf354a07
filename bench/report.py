# SPDX-License-Identifier: Apache-2.0
"""One table for people, one JSON for machines."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sparse_unified

from .harness import Record, Roof
from .suites import Overhead


def device_name() -> str:
    """Model of the processor and the threads in use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Commit of the source tree this file lies in, or the installed version."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or f"version {sparse_unified.__version__}"


def as_json(
    records: Sequence[Record], overhead: Mapping[str, Overhead], roof: Roof
) -> dict[str, Any]:
    """The schema of every file in bench/results; `overhead` is `measure_overhead` by case."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": {
            "sparse_unified": sparse_unified.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "roof": {"tflops": roof.tflops, "gbps": roof.gbps},
        "overhead": {case: asdict(shares) for case, shares in overhead.items()},
        "records": [r.as_dict() for r in records],
    }


def save(path: Path, text: str) -> None:
    """Writes a result; an existing file is replaced whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def table(records: Sequence[Record], overhead: Mapping[str, Overhead], roof: Roof) -> str:
    """`us | TFLOP/s | GB/s | % of roof | x baseline`, one line per provider."""
    lines = [
        f"{device_name()}; torch {torch.__version__}",
        f"roof: {roof.tflops:.3f} TFLOP/s, {roof.gbps:.1f} GB/s",
    ]
    head = f"{'provider':<16}{'us':>12}{'TFLOP/s':>10}{'GB/s':>8}{'% roof':>8}  x baseline"
    group = None
    for r in records:
        if (r.op, r.case, r.direction, r.dtype) != group:
            group = (r.op, r.case, r.direction, r.dtype)
            lines += ["", f"{r.op}  {r.case}  {r.direction}  {r.dtype}", head]
        ratios = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in r.speedup.items())
        lines.append(
            f"{r.provider:<16}{r.median_us:>12,.0f}{r.tflops:>10.3f}{r.gbps:>8.1f}"
            f"{100 * r.roof_fraction:>8.1f}  {ratios}"
        )
    lines += [
        f"\n{case}: route + sort + permute + combine, each alone, = {shares.alone:.1%} of the "
        f"block; as parts of the fused block, {shares.fused:.1%}"
        for case, shares in overhead.items()
    ]
    return "\n".join(lines)
