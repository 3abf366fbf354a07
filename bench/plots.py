# SPDX-License-Identifier: Apache-2.0
"""The picture of a result: ratios by provider, rates over tokens, and shares of the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_unified._common import optional

from .cases import CASES
from .report import BASELINE, is_steady
from .suites import OURS

Record = Mapping[str, Any]


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Draws the forward passes of whole FFNs in a result of the benchmark.

    Left, how many times faster than the dense FFN of torch each provider is at 1024 tokens and
    more, with the ceiling of the idea; then TFLOP/s over the number of tokens, of the shape that
    was run with most of them; then the same as shares of the peak.

    Args:
        content: a file of bench/results, or what is written to one.
        path: of the picture; its ending is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    optional("matplotlib", "plot", purpose="pictures of results").use("Agg")
    pyplot = optional("matplotlib.pyplot", "plot")
    records: list[Record] = [
        r
        for r in content["records"]
        if r["op"] in ("sparse_ffn", "pruned_ffn") and r["direction"] == "fwd"
    ]
    figure, (bars, rates, shares) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    _draw_bars(bars, records)
    _draw_lines(rates, records, "tflops", 1.0)
    rates.set_ylabel("TFLOP/s")
    _draw_lines(shares, records, "roof_fraction", 100.0)
    shares.set_ylabel(f"% of {content['roof']['tflops']:.3g} TFLOP/s, the peak")
    shares.set_ylim(0, 100)
    figure.suptitle(f"{content['device']}, {content['date']}, commit {content['commit'][:10]}")
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _colours(records: Sequence[Record]) -> dict[str, str]:
    """Of each provider; ours is red."""
    others = dict.fromkeys(r["provider"] for r in records if r["provider"] != OURS)
    free = [f"C{i}" for i in range(10) if i != 3]
    return {OURS: "C3"} | {name: free[i % len(free)] for i, name in enumerate(others)}


def _draw_bars(axes: Any, records: Sequence[Record]) -> None:
    """A group a case; pale where the rounds did not agree."""
    by_case: dict[str, dict[str, Record]] = {}
    for r in records:
        by_case.setdefault(r["case"], {})[r["provider"]] = r
    cases = [case for case in by_case if case.endswith(("-T1024", "-T4096"))] or list(by_case)
    providers = list(dict.fromkeys(name for case in cases for name in by_case[case]))
    width, colours = 0.8 / max(len(providers), 1), _colours(records)
    for position, provider in enumerate(providers):
        for index, case in enumerate(cases):
            if provider not in by_case[case]:
                continue
            r = by_case[case][provider]
            height = r["speedup"].get(BASELINE, 1.0)
            axes.bar(
                index + (position - len(providers) / 2 + 0.5) * width,
                height,
                width,
                yerr=height * r.get("spread", 0.0) / 2,
                color=colours[provider],
                alpha=1.0 if is_steady(r) else 0.3,
                label=provider if case == cases[0] else None,
            )
    for index, case in enumerate(cases):
        if case in CASES:
            limits = index - 0.45, index + 0.45
            axes.hlines(CASES[case].ceiling, *limits, colors="black", linestyles="dashed")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize="small")
    axes.set_ylabel("times the dense FFN of torch\n(dashed: ceiling at the same rate)")
    axes.legend(fontsize="x-small")


def _draw_lines(axes: Any, records: Sequence[Record], value: str, scale: float) -> None:
    """A line for each provider of the family of shapes that was run with most numbers of tokens."""
    families: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in records:
        name, _, tokens = r["case"].rpartition("-T")
        points = families.setdefault(name, {}).setdefault(r["provider"], [])
        points.append((int(tokens), scale * r[value]))
    family = max(families, key=lambda name: max(map(len, families[name].values())))
    for provider, points in families[family].items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=provider, color=_colours(records)[provider])
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"tokens ({family})")
    axes.legend(fontsize="xx-small")
