# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result: bars by provider with the ceiling of the idea, and rates over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import CASES
from .report import BASELINE, OURS

Record = Mapping[str, Any]


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Draws the forward passes of whole FFNs in a result of the benchmark.

    Left, how many times faster than the dense FFN of torch each provider is, a group a case; right,
    TFLOP/s over the number of tokens, where several were measured.

    Args:
        content: as `Report.as_json` returns it, or a file of bench/results.
        path: of the picture; its ending is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records: list[Record] = [
        r
        for r in content["records"]
        if r["op"] in ("sparse_ffn", "pruned_ffn") and r["direction"] == "fwd"
    ]
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _draw_bars(bars, records)
    _draw_lines(lines, records)
    figure.suptitle(f"{content['device']}, {content['date']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(axes: Any, records: Sequence[Record]) -> None:
    cases = list(dict.fromkeys(r["case"] for r in records))
    providers = list(dict.fromkeys(r["provider"] for r in records))
    width = 0.8 / max(len(providers), 1)
    for position, provider in enumerate(providers):
        found = {r["case"]: r for r in records if r["provider"] == provider}
        heights = [
            found[case]["speedup"].get(BASELINE, 1.0) if case in found else 0.0 for case in cases
        ]
        errors = [
            height * found[case].get("spread", 0.0) / 2 if case in found else 0.0
            for case, height in zip(cases, heights, strict=True)
        ]
        at = [index + (position - len(providers) / 2 + 0.5) * width for index in range(len(cases))]
        colour = "C3" if provider == OURS else None
        axes.bar(at, heights, width, yerr=errors, label=provider, color=colour)
    for index, case in enumerate(cases):
        if case in CASES:
            limits = index - 0.45, index + 0.45
            axes.hlines(CASES[case].ceiling, *limits, colors="black", linestyles="dashed")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize="small")
    axes.set_ylabel("times the dense FFN of torch\n(dashed: ceiling at the same rate)")
    axes.legend(fontsize="x-small")


def _draw_lines(axes: Any, records: Sequence[Record]) -> None:
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in records:
        name, _, tokens = r["case"].rpartition("-T")
        series.setdefault((name, r["provider"]), []).append((int(tokens), r["tflops"]))
    for (name, provider), points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=f"{name} {provider}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize="xx-small", ncols=2)
