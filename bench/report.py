# SPDX-License-Identifier: Apache-2.0
"""One table for people, one JSON for machines."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparse_unified
from sparse_unified.checkpoint.files import replace_file

from .measure import Measured, Record, Roof
from .suites import Overhead
from .target import Target

OURS, BASELINE = "sparse_unified", "dense"
# The dense FFN by anyone: our ratio over the fastest of them is the one to quote.
DENSE = ("dense", "dense_compile", "dense_onednn", "dense_ours")
# Names the commit where the source tree lies without its history.
COMMIT_VARIABLE = "SPARSE_UNIFIED_COMMIT"
_NAME = 24


def commit() -> str:
    """Commit of the source tree this file lies in, or what the environment says, or the version."""
    known = ""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        known = found.stdout.strip()
    known = known or os.environ.get(COMMIT_VARIABLE, "")
    return known or f"version {sparse_unified.__version__}"


@dataclass(slots=True, kw_only=True)
class Report:
    """All that one run found out.

    Args:
        target, roof: where, and what it reaches at most.
        measured: records, and the providers without one.
        overhead: `measure_overhead` by case.
        states: of the device by moment, as `Target.state` gives them.
    """

    target: Target
    roof: Roof
    measured: Measured = field(default_factory=Measured)
    overhead: dict[str, Overhead] = field(default_factory=dict)
    states: dict[str, dict[str, str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The schema of every file in bench/results."""
        return {
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "device": self.target.name,
            "versions": versions(),
            "roof": asdict(self.roof),
            "overhead": {case: asdict(shares) for case, shares in self.overhead.items()},
            "records": [asdict(r) for r in self.measured.records],
            "not_measured": [asdict(m) for m in self.measured.missing],
            "states": self.states,
        }

    def text(self) -> str:
        """`us | spread | TFLOP/s | GB/s | % of roof | x baseline`, one line per provider."""
        gemms = ", ".join(f"{name} {rate:.4g}" for name, rate in self.roof.gemms.items())
        lines = [
            f"{self.target.name}; torch {torch.__version__}",
            f"roof: {self.roof.tflops:.4g} TFLOP/s, {self.roof.gbps:.1f} GB/s"
            + (f" ({self.roof.source}: {gemms} TFLOP/s)" if gemms else ""),
            "ceiling: half of the arithmetic is at most 2x over a dense FFN at the same rate",
            *(f"{when}: {_joined(state)}" for when, state in self.states.items() if state),
        ]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for r in self.measured.records:
            groups.setdefault((r.op, r.case, r.direction, r.dtype), []).append(_line(r))
        for m in self.measured.missing:
            line = f"{m.provider:<{_NAME}}  not measured: {m.reason}"
            groups.setdefault((m.op, m.case, m.direction, m.dtype), []).append(line)
        head = (
            f"{'provider':<{_NAME}}{'us':>12}{'spread':>8}{'TFLOP/s':>10}{'GB/s':>9}{'% roof':>8}  "
            "x baseline"
        )
        for group, found in groups.items():
            lines += ["", "  ".join(group), head, *found]
        lines += [
            f"\n{case}: route + sort + permute + combine, each alone, = {shares.alone:.1%} of the "
            f"block; as parts of the fused block, {shares.fused:.1%}"
            for case, shares in self.overhead.items()
        ]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """What the numbers depend on besides the device."""
    found = {
        "sparse_unified": sparse_unified.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "transformers", "sonic-moe", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _joined(state: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in state.items())


def best_dense(speedup: Mapping[str, float]) -> str | None:
    """The dense FFN over which a ratio is the smallest."""
    return min((name for name in DENSE if name in speedup), key=speedup.__getitem__, default=None)


def _line(r: Record) -> str:
    """A line of the table: our ratios over everyone, of the others the one over the baseline."""
    shown = dict(r.speedup)
    if r.provider != OURS and BASELINE in shown:
        shown = {BASELINE: shown[BASELINE]}
    best = best_dense(shown) if r.provider == OURS else None
    ratios = "  ".join(
        f"{ratio:.2f}x {name}{' (best dense)' if name == best else ''}"
        for name, ratio in shown.items()
    )
    return (
        f"{r.provider + ('*' if r.graph else ''):<{_NAME}}{r.median_us:>12,.1f}{r.spread:>8.0%}"
        f"{r.tflops:>10.4g}{r.gbps:>9.1f}{100 * r.roof_fraction:>8.1f}  {ratios}"
    )


def save(path: Path, text: str) -> None:
    """Writes a result; an existing file is replaced whole or not at all."""
    replace_file(path, (text + "\n").encode())
