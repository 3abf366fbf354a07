# SPDX-License-Identifier: Apache-2.0
"""What the records of the study say: tables, plots, and what holds and what does not.

A statement is a difference of two numbers that is computed for every seed. It holds if the
difference has the stated sign for every seed, does not hold if it has the other sign (or is 0) for
every seed, and is undecided in between; the number of seeds stands beside it. Nothing is said about
parts that were not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from miniature import scenes
from miniature.study import DEPTHS, SPARSE, STAGES, WIDTHS
from sparse_unified._common import optional
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.mini.model import MiniTask

BEGIN, END = "<!-- study -->", "<!-- /study -->"
Record = Mapping[str, Any]
# (task, part, key) -> metric -> seed -> value
Values = dict[tuple[str, str, str], dict[str, dict[int, float]]]


def read_records(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a study, from its folder or from the file that `to_json` made.

    Raises:
        ValueError: there are none.
    """
    path = Path(source)
    if path.is_dir():
        found = [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))
        ]
    else:
        found = json.loads(path.read_text(encoding="utf-8"))["records"]
    if not found:
        raise ValueError(f"{path}: records must be at least one, got none")
    return sorted(found, key=lambda r: (r["task"], r["part"], r["seed"]))


def to_json(records: Sequence[Record]) -> str:
    """Returns all records as one JSON text."""
    return json.dumps({"records": list(records)}, indent=1)


def gather(records: Sequence[Record]) -> Values:
    """Returns the values by what they are of."""
    values: Values = {}
    for record in records:
        for key, metrics in record["results"].items():
            own = values.setdefault((record["task"], record["part"], key), {})
            for name, value in metrics.items():
                own.setdefault(name, {})[record["seed"]] = value
    return values


def rows_of(task: str) -> list[tuple[str, str, str]]:
    """Returns part, key and title of every model of a task, in the order of the tables."""
    rows = [("dense", "dense", "dense"), ("dense", "extra", "dense, the same extra steps")]
    for component in ("und", "gen"):
        for source in ("understanding", "generation") if component == "und" else ("generation",):
            probes = {f"width-{keep:g}": f"{keep:g} of the neurons" for keep in WIDTHS[component]}
            probes |= {f"depth-{count}": f"{count} of 6 layers skipped" for count in DEPTHS}
            for key, title in probes.items():
                title = f"{component}, {title}, scored on {source}"
                rows.append(("probe", f"{component}-{key}-{source}", title))
    for experts, active in SPARSE:
        name = f"{experts}/{active}"
        rows += _stages(f"sparse-{experts}-{active}", f"sparse {name}", routed=True)
    rows += _stages("coactivation-16-8", "sparse 16/8 by coactivation", routed=True)
    rows += _stages("random-16-8", "control: random partition, 16/8", routed=True)
    rows += _stages("static", "control: static half", routed=False)
    return rows


def _stages(part: str, title: str, *, routed: bool) -> list[tuple[str, str, str]]:
    rows = [(part, "zero", f"{title}, untrained, routers of zero")] if routed else []
    rows.append((part, "untrained", f"{title}, untrained" + (", fitted routers" * routed)))
    words = {
        "router": "routers tuned" if routed else "tuned as long, FFN frozen",
        "expert_frozen": "then experts frozen" if routed else "twice as long",
        "full": "then fully",
    }
    return rows + [(part, stage, f"{title}, {words[stage]}") for stage in STAGES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One statement about one task, and what the numbers say."""

    task: str
    text: str
    differences: tuple[float, ...]

    @property
    def result(self) -> str:
        """Returns "holds", "does not hold", "undecided" or "not run"."""
        if not self.differences:
            return "not run"
        right = [value > 0 for value in self.differences]
        return "holds" if all(right) else "undecided" if any(right) else "does not hold"


def _minus(first: float, second: float) -> float:
    return first - second


def _source(name: str) -> tuple[str, str, str]:
    """Returns part, key and metric of `part key [metric]`; without one, the velocity error."""
    part, key, metric = f"{name} velocity".split()[:3]
    return part, key, metric


# What is stated, the difference of two numbers that says it, and what they are computed from.
STATEMENTS: list[tuple[str, Callable[..., float], tuple[str, ...]]] = [
    (
        "In generation und is more compressible than gen: at half of the neurons the velocity "
        "error rises less (difference of the two rises)",
        _minus,
        ("probe gen-width-0.5-generation", "probe und-width-0.5-generation"),
    ),
    (
        "The same for depth: skipping 2 of 6 layers",
        _minus,
        ("probe gen-depth-2-generation", "probe und-depth-2-generation"),
    ),
    (
        "und is more compressible when the task is generation: at a tenth of its neurons the "
        "velocity error rises by a smaller share than understanding falls",
        lambda whole, error, right, left: (right - left) / right - (error / whole - 1),
        (
            "dense dense",
            "probe und-width-0.1-generation",
            "dense dense understanding",
            "probe und-width-0.1-understanding understanding",
        ),
    ),
    (
        "Scores depend on the task: und at a quarter understands better when scored on "
        "understanding than on generation",
        _minus,
        (
            "probe und-width-0.25-understanding understanding",
            "probe und-width-0.25-generation understanding",
        ),
    ),
    (
        "Routers fitted to calibration data beat routers of zero, untrained, 16/8",
        _minus,
        ("sparse-16-8 zero", "sparse-16-8 untrained"),
    ),
    *(
        (
            f"Tuning gets most of the loss back: {experts}/{active}, share of the rise of the "
            "velocity error over the dense model that is gone after all stages, minus 1/2",
            lambda whole, before, after: (before - after) / (before - whole) - 0.5,
            (
                "dense dense",
                f"sparse-{experts}-{active} untrained",
                f"sparse-{experts}-{active} full",
            ),
        )
        for experts, active in SPARSE
    ),
    (
        "Sparse 16/8 beats a static half with the same tuning: velocity error",
        _minus,
        ("static full", "sparse-16-8 full"),
    ),
    (
        "Sparse 16/8 beats a static half with the same tuning: right pictures",
        _minus,
        ("sparse-16-8 full generation", "static full generation"),
    ),
    (
        "The partition by importance beats a random one, 16/8, tuned: velocity error",
        _minus,
        ("random-16-8 full", "sparse-16-8 full"),
    ),
    (
        "The partition by coactivation beats the one by importance, 16/8, untrained with fitted "
        "routers: velocity error",
        _minus,
        ("sparse-16-8 untrained", "coactivation-16-8 untrained"),
    ),
    (
        "The partition by coactivation beats the one by importance, 16/8, tuned: velocity error",
        _minus,
        ("sparse-16-8 full", "coactivation-16-8 full"),
    ),
    (
        "Sparse 16/8, tuned, is as good as the dense model with the same extra steps: velocity "
        "error",
        _minus,
        ("dense extra", "sparse-16-8 full"),
    ),
]


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Returns what the records say about each statement, task by task."""
    values, found = gather(records), []
    for task, (text, compute, sources) in product(MiniTask, STATEMENTS):
        numbers = []
        for part, key, metric in map(_source, sources):
            numbers.append(values.get((task.value, part, key), {}).get(metric, {}))
        # A value that was not measured leaves its seed out.
        seeds = sorted(set.intersection(*map(set, numbers)))
        differences = tuple(compute(*(own[seed] for own in numbers)) for seed in seeds)
        found.append(Verdict(task=task.value, text=text, differences=differences))
    return found


def to_text(records: Sequence[Record]) -> str:
    """Returns tables in Markdown, and what holds."""
    values = gather(records)
    lines: list[str] = []
    for task in MiniTask:
        lines += [f"### {task.value.capitalize()}", "", *_table(values, task), ""]
    lines += ["### What holds, and what does not", ""]
    lines += ["| task | statement | seeds | difference | result |", "|---|---|---|---|---|"]
    for verdict in verdicts(records):
        shown = _shown(verdict.differences, 4, sign=True) if verdict.differences else "-"
        seeds = len(verdict.differences)
        lines.append(f"| {verdict.task} | {verdict.text} | {seeds} | {shown} | {verdict.result} |")
    return "\n".join(lines)


def _table(values: Values, task: MiniTask) -> list[str]:
    columns = {"understanding": "answers", "velocity": "velocity error", "generation": "pictures"}
    if task is MiniTask.DIGITS:
        columns["frechet"] = "Frechet"
    else:
        columns |= {name: name for name in scenes.COLUMNS}
    lines = [
        f"| model | seeds | {' | '.join(columns.values())} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for part, key, title in rows_of(task.value):
        own = values.get((task.value, part, key))
        if own is None:
            lines.append(f"| {title} | 0 | not run" + " |" * len(columns))
            continue
        cells = [_shown(tuple(own[name].values()), _digits(name)) for name in columns]
        lines.append(f"| {title} | {len(own['velocity'])} | {' | '.join(cells)} |")
    return lines


def _digits(metric: str) -> int:
    return {"velocity": 4, "frechet": 1}.get(metric, 2)


def _shown(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    """Returns the mean and, of several values, their standard deviation."""
    text = f"{mean(values):{'+' if sign else ''}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def fill_page(page: Path, records: Sequence[Record]) -> None:
    """Puts the tables into a page, between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: page must hold {BEGIN} and {END}, got none")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    replace_file(page, f"{before}{BEGIN}\n\n{to_text(records)}\n\n{END}{after}".encode())


_COLOURS = {"und": "#1f6f8b", "gen": "#c9733a"}
# Name and colour of the lines of tuning.
_LINES = {
    "sparse-16-8": ("sparse 16/8", "#1f6f8b"),
    "sparse-32-16": ("sparse 32/16", "#5fa8a0"),
    "coactivation-16-8": ("16/8, by coactivation", "#8a6fb0"),
    "random-16-8": ("16/8, random partition", "#9aa4af"),
    "static": ("static half", "#c9733a"),
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
        points = {1.0: dense}
        for keep in ratios:
            key = f"{component}-width-{keep:g}-generation"
            points[keep] = _series(values.get((task.value, "probe", key)))
        _draw_line(axes, points, component, _COLOURS[component])
    axes.set_title(f"{task.value}: neurons that are kept, untrained", loc="left", weight="bold")
    axes.set_xlabel("share of the neurons of the component")
    _finish(axes)


def _draw_tuning(axes: Any, values: Values, task: MiniTask) -> None:
    stages = ("untrained", *STAGES)
    for part, (name, colour) in _LINES.items():
        points = {i: _series(values.get((task.value, part, own))) for i, own in enumerate(stages)}
        _draw_line(axes, points, name, colour)
    for key, style in (("dense", "-"), ("extra", ":")):
        if point := _series(values.get((task.value, "dense", key))):
            label = "dense" if key == "dense" else "dense, extra steps"
            axes.axhline(point[0], color="#1b1f24", linestyle=style, linewidth=1, label=label)
    axes.set_xticks(range(len(stages)), ["untrained", "routers", "+ experts frozen", "+ full"])
    axes.set_title(f"{task.value}: half of the gen FFN, tuned", loc="left", weight="bold")
    _finish(axes)


def _draw_line(
    axes: Any, points: Mapping[Any, tuple[float, float] | None], label: str, colour: str
) -> None:
    shown = {x: point for x, point in points.items() if point is not None}
    if shown:
        means, errors = zip(*shown.values(), strict=True)
        options = {"marker": "o", "capsize": 3, "color": colour, "label": label}
        axes.errorbar(list(shown), means, errors, **options)


def _finish(axes: Any) -> None:
    axes.set_ylabel("velocity error")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
