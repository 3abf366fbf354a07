# SPDX-License-Identifier: Apache-2.0
"""The study as a picture: what pruning costs, and what tuning gets back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from sparse_unified._common import optional
from sparse_unified.mini.model import MiniTask
from sparse_unified.mini.report import Record, Values, gather
from sparse_unified.mini.study import STAGES, WIDTHS

_COLOURS = {
    "und": "#1f6f8b",
    "gen": "#c9733a",
    "sparse-16-8": "#1f6f8b",
    "sparse-32-16": "#5fa8a0",
    "coactivation-16-8": "#8a6fb0",
    "random-16-8": "#9aa4af",
    "static": "#c9733a",
}
_NAMES = {
    "sparse-16-8": "sparse 16/8",
    "sparse-32-16": "sparse 32/16",
    "coactivation-16-8": "16/8, by coactivation",
    "random-16-8": "16/8, random partition",
    "static": "static half",
}


def write_plot(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draws a PNG: a row for each task; width without training left, tuning right.

    Points are means over seeds, bars their standard deviations; what was not run is left out.
    """
    figure_class = optional("matplotlib.figure", extra="plot").Figure
    values = gather(records)
    figure = figure_class(figsize=(11, 7.5), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(len(MiniTask), 2)
    for row, task in enumerate(MiniTask):
        _draw_width(axes[row][0], values, task)
        _draw_tuning(axes[row][1], values, task)
    figure.savefig(os.fspath(path))


def _series(own: Mapping[str, Mapping[int, float]] | None) -> tuple[float, float] | None:
    """Returns mean and standard deviation of the velocity error, or None if it was not run."""
    if own is None:
        return None
    found = list(own["velocity"].values())
    return mean(found), stdev(found) if len(found) > 1 else 0.0


def _draw_width(axes: Any, values: Values, task: MiniTask) -> None:
    dense = _series(values.get((task.value, "dense", "dense")))
    for component, ratios in WIDTHS.items():
        points = {1.0: dense} | {
            keep: _series(
                values.get((task.value, "probe", f"{component}-width-{keep:g}-generation"))
            )
            for keep in ratios
        }
        shown = {keep: point for keep, point in points.items() if point is not None}
        if not shown:
            continue
        axes.errorbar(
            list(shown),
            [point[0] for point in shown.values()],
            [point[1] for point in shown.values()],
            marker="o",
            capsize=3,
            color=_COLOURS[component],
            label=component,
        )
    axes.set_title(f"{task.value}: neurons that are kept, untrained", loc="left", weight="bold")
    axes.set_xlabel("share of the neurons of the component")
    _finish(axes)


def _draw_tuning(axes: Any, values: Values, task: MiniTask) -> None:
    stages = ("untrained", *STAGES)
    for part, name in _NAMES.items():
        points = [_series(values.get((task.value, part, stage))) for stage in stages]
        at = [i for i, point in enumerate(points) if point is not None]
        found = [point for point in points if point is not None]
        if not found:
            continue
        axes.errorbar(
            at,
            [point[0] for point in found],
            [point[1] for point in found],
            marker="o",
            capsize=3,
            color=_COLOURS[part],
            label=name,
        )
    for key, style in (("dense", "-"), ("extra", ":")):
        if point := _series(values.get((task.value, "dense", key))):
            label = "dense" if key == "dense" else "dense, extra steps"
            axes.axhline(point[0], color="#1b1f24", linestyle=style, linewidth=1, label=label)
    axes.set_xticks(range(len(stages)), ["untrained", "routers", "+ experts frozen", "+ full"])
    axes.set_title(f"{task.value}: half of the gen FFN, tuned", loc="left", weight="bold")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.set_ylabel("velocity error")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
