# SPDX-License-Identifier: Apache-2.0
"""One table for people, one JSON for machines."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sparse_unified

from .cases import CASES
from .measure import MOST_SPREAD, Roof, Run
from .suites import OURS
from .target import Target

BASELINE = "dense"
# The dense FFN by anyone: our ratio over the fastest of them is the one to quote.
DENSE = ("dense", "dense_compile", "dense_onednn", "dense_ours")
# Names the commit where the source tree lies without its history.
COMMIT_VARIABLE = "SPARSE_UNIFIED_COMMIT"
_SUBJECT = ("op", "case", "direction", "dtype")


def commit() -> str:
    """Commit of the source tree this file lies in, or what the environment says, or the version."""
    known = ""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        known = found.stdout.strip()
    known = known or os.environ.get(COMMIT_VARIABLE, "")
    return known or f"version {sparse_unified.__version__}"


def versions() -> dict[str, str]:
    """What the numbers depend on besides the device."""
    found = {
        "sparse_unified": sparse_unified.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def origin(device: str) -> dict[str, Any]:
    """What every file of results begins with: commit, date, device and versions."""
    today = datetime.date.today().isoformat()
    return {"commit": commit(), "date": today, "device": device, "versions": versions()}


def as_json(run: Run, target: Target, states: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The schema of every file in bench/results."""
    return {
        **origin(target.name),
        "roof": asdict(run.roof),
        "records": run.records,
        "not_measured": run.missing,
        "states": states or {},
    }


def best_dense(speedup: Mapping[str, float]) -> str | None:
    """The dense FFN over which a ratio is the smallest."""
    return min((name for name in DENSE if name in speedup), key=speedup.__getitem__, default=None)


def ceiling(record: Mapping[str, Any]) -> float:
    """The most that a record's ratio over a dense FFN is at the same rate; 1 for a dense one."""
    is_dense = record["provider"] in DENSE or record["case"] not in CASES
    return 1.0 if is_dense else CASES[record["case"]].ceiling


def is_steady(record: Mapping[str, Any]) -> bool:
    """Whether the rounds are known to agree well enough for a number to be quoted."""
    return bool(record.get("spread", math.inf) <= MOST_SPREAD)


def roof_lines(roof: Roof) -> list[str]:
    """The roof, and what it was chosen from."""
    lines = [f"roof: {roof.tflops:.4g} TFLOP/s ({roof.source}), triad {roof.gbps:.1f} GB/s"]
    for name, found in roof.peaks.items():
        rates = ", ".join(f"{rate:.4g} on {count} threads" for count, rate in found.items())
        lines.append(f"  {name}: {rates}")
    if roof.gemms:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in roof.gemms.items())
        lines.append(f"  products: {rates}")
    return lines


def as_text(content: Mapping[str, Any]) -> str:
    """A line for each provider: us, spread, TFLOP/s, GB/s, % of peak, ratios of their ceiling."""
    lines = [
        f"{content['device']}; torch {content['versions']['torch']}",
        *roof_lines(Roof(**content["roof"])),
        *(
            f"{when}: {', '.join(f'{name} {value}' for name, value in state.items())}"
            for when, state in content["states"].items()
            if state
        ),
        f"! after a spread: above {MOST_SPREAD:.0%}, not to be quoted; * after a name: a graph",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for r in content["records"]:
        groups.setdefault(tuple(r[name] for name in _SUBJECT), []).append(_line(r))
    for m in content["not_measured"]:
        line = f"{m['provider']:<28}  not measured: {m['reason']}"
        groups.setdefault(tuple(m[name] for name in _SUBJECT), []).append(line)
    head = f"{'provider':<28}{'us':>12}{'spread':>9}{'TFLOP/s':>10}{'GB/s':>9}{'% peak':>8}  ratio"
    for group, found in groups.items():
        lines += ["", "  ".join(group), head, *found]
    return "\n".join(lines)


def _line(r: Mapping[str, Any]) -> str:
    """Our ratios over everyone, of the others the one over the baseline."""
    is_ours = r["provider"] == OURS
    shown = {n: ratio for n, ratio in r["speedup"].items() if is_ours or n == BASELINE}
    best = best_dense(shown) if is_ours else None
    ratios = []
    for name, ratio in shown.items():
        most = f" of {ceiling(r):g}" if name in DENSE else ""
        ratios.append(f"{ratio:.2f}x{most} {name}{' (best dense)' if name == best else ''}")
    mark = " " if is_steady(r) else "!"
    return (
        f"{r['provider'] + ('*' if r['graph'] else ''):<28}{r['median_us']:>12,.1f}"
        f"{r['spread']:>8.0%}{mark}{r['tflops']:>10.4g}{r['gbps']:>9.1f}"
        f"{100 * r['roof_fraction']:>8.1f}  {'  '.join(ratios)}".rstrip()
    )
