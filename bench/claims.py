# SPDX-License-Identifier: Apache-2.0
"""The speeds the project promises on a GPU, and how each is read off a file of bench/results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Content = Mapping[str, Any]

CASE_16, CASE_32 = "bagel-16to8-T4096", "bagel-32to16-T4096"
PRUNED = "bagel-half-bs64-T4096"
H200, PORTABLE = "h200.json", "h200-portable.json"


def find(
    content: Content, op: str, case: str, direction: str = "fwd", dtype: str = "bfloat16"
) -> Mapping[str, Any] | None:
    """Our record, launched eagerly; None where there is none."""
    wanted = (op, case, direction, dtype, "sparse_unified")
    for record in content["records"]:
        keys = ("op", "case", "direction", "dtype", "provider")
        if tuple(record[key] for key in keys) == wanted and not record.get("graph"):
            found: Mapping[str, Any] = record
            return found
    return None


def ratio(
    case: str, baseline: str, op: str = "sparse_ffn", direction: str = "fwd"
) -> Callable[[Content], float | None]:
    """How many times faster than a baseline."""

    def measure(content: Content) -> float | None:
        record = find(content, op, case, direction)
        value: float | None = record["speedup"].get(baseline) if record else None
        return value

    return measure


def phase(name: str) -> Callable[[Content], float | None]:
    """Rate of one product of grouped_ffn, of that of the library on the dense FFN's product."""

    def measure(content: Content) -> float | None:
        roof = content["roof"].get("gemms", {}).get(name)
        for kernel in content.get("kernels", ()):
            if (kernel["case"], kernel["phase"]) == (CASE_16, name) and roof:
                rate: float = kernel["tflops"]
                return rate / roof
        return None

    return measure


def microseconds(*ops: str) -> Callable[[Content], float | None]:
    """Time of some ops together."""

    def measure(content: Content) -> float | None:
        records = [find(content, op, CASE_16) for op in ops]
        return sum(r["median_us"] for r in records if r) if all(records) else None

    return measure


def bandwidth(op: str) -> Callable[[Content], float | None]:
    """Bandwidth of an op, of that of a copy."""

    def measure(content: Content) -> float | None:
        record = find(content, op, CASE_16)
        return record["gbps"] / content["roof"]["gbps"] if record else None

    return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClaim:
    """A promise, its measure, and the bound it must keep.

    Args:
        text: the promise.
        measure: of the content of a file; None where it holds no such number.
        bound: the least value; the most, for microseconds.
        unit: "x", "%" (of a share) or "us".
        file: of bench/results.
    """

    text: str
    measure: Callable[[Content], float | None]
    bound: float
    unit: str = "x"
    file: str = H200

    def row(self, results: Mapping[str, Content]) -> str:
        """Returns the line of the table of claims."""
        content = results.get(self.file)
        value = self.measure(content) if content is not None else None
        if value is None:
            return f"| {self.text} | not measured | |"
        held = value <= self.bound if self.unit == "us" else value >= self.bound
        shown = {"x": f"{value:.2f}x", "%": f"{value:.0%}", "us": f"{value:.1f} us"}[self.unit]
        where = f"[{self.file}](../bench/results/{self.file})"
        return f"| {self.text} | {shown}, {'held' if held else 'NOT HELD'} | {where} |"


_BACKWARD = "forward and backward, all trainable"
GPU_CLAIMS = (
    GpuClaim(
        text="H200, bf16, T = 4096, 16/8: at least 1.90x the dense FFN",
        measure=ratio(CASE_16, "dense"),
        bound=1.9,
    ),
    GpuClaim(
        text="32/16: at least 1.80x the dense FFN", measure=ratio(CASE_32, "dense"), bound=1.8
    ),
    GpuClaim(
        text="16/8: at least 1.3x a pipeline on `grouped_mm`",
        measure=ratio(CASE_16, "grouped_mm"),
        bound=1.3,
    ),
    GpuClaim(
        text="16/8: at least 2x the loop over experts",
        measure=ratio(CASE_16, "expert_loop"),
        bound=2.0,
    ),
    *(
        GpuClaim(
            text=f"16/8, {name}-projection: at least 92 % of the rate of cuBLAS on the dense one",
            measure=phase(name),
            bound=0.92,
            unit="%",
        )
        for name in ("up", "down")
    ),
    GpuClaim(
        text="16/8, routing and sorting: at most 20 us",
        measure=microseconds("route_topk", "sort_by_expert"),
        bound=20.0,
        unit="us",
    ),
    GpuClaim(
        text="16/8, combine: at least 85 % of copy bandwidth",
        measure=bandwidth("combine"),
        bound=0.85,
        unit="%",
    ),
    GpuClaim(
        text="half of the width in blocks of 64: at least 1.90x the dense FFN",
        measure=ratio(PRUNED, "dense", op="pruned_ffn"),
        bound=1.9,
    ),
    GpuClaim(
        text=f"16/8, {_BACKWARD}: at least 1.70x the dense FFN",
        measure=ratio(CASE_16, "dense", direction="fwd_bwd"),
        bound=1.7,
    ),
    GpuClaim(
        text="16/8, portable kernels: at least 1.2x the dense FFN",
        measure=ratio(CASE_16, "dense"),
        bound=1.2,
        file=PORTABLE,
    ),
)
