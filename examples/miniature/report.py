# SPDX-License-Identifier: Apache-2.0
"""What the records of the study say: tables, figures, and what holds and what does not.

A statement is a difference of means over what the models drew, answered or predicted. Its interval
is a paired bootstrap of these models: of each one pictures, questions or batches of velocities are
drawn with replacement, the same ones of everything that is compared. Three models are too few to
draw them, too; so a statement needs each of them. It holds if the whole interval is above 0 and the
difference of every model is, does not hold if all are below, and is undecided else. Nothing is said
about parts that were not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniature import scenes
from miniature.study import (
    ACTIVE,
    DEPTHS,
    HALVES,
    SCHEDULES,
    SHARED,
    SHOWN,
    STATIC,
    TUNED,
    WIDTHS,
    StudyConfig,
)
from sparse_unified._common import optional
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.mini.model import mini_config

BEGIN, END = "<!-- study -->", "<!-- /study -->"
STEPS = StudyConfig().steps
RESAMPLES = 2000
LAYERS = mini_config().llm.num_hidden_layers
Record = Mapping[str, Any]
# (part, key) -> model -> metrics
Values = dict[tuple[str, str], dict[int, Mapping[str, Any]]]
_METRICS = ("pictures", "answers", "velocity")


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
    return sorted(found, key=lambda r: (r["part"], r["model"]))


def to_json(records: Sequence[Record]) -> str:
    """Returns all records as one JSON text, a line for each."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"records": [\n{lines}\n]}}'


def gather(records: Sequence[Record]) -> Values:
    """Returns the metrics by what they are of."""
    values: Values = {}
    for record in records:
        for key, metrics in record["results"].items():
            values.setdefault((record["part"], key), {})[record["model"]] = metrics
    return values


def title_of(part: str) -> str:
    """Returns the name of a part in tables and figures."""
    kind, *numbers = part.split("-")
    if kind == "static":
        return f"static {numbers[0]}/{numbers[1]}"
    if not numbers:
        return kind
    experts, active, shared = numbers
    return (
        f"{experts}/{active}"
        + (f"+{shared}" if shared != "0" else "")
        + (f", {kind}" if kind != "sparse" else "")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One statement: what `first` has more of `metric` than `second`, or less of an error.

    Attributes:
        table, row, column: where it stands.
        metric: "pictures", "answers" or "velocity".
        first, second: part and key of each.
    """

    table: str
    row: str
    column: str
    metric: str
    first: tuple[str, str]
    second: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the numbers say of a statement.

    Attributes:
        low, high: ends of the interval of 95 % of the mean difference.
        differences: of each model; positive ones speak for it. None was run if it is empty.
    """

    low: float
    high: float
    differences: tuple[float, ...]

    @property
    def result(self) -> str:
        """Returns "holds", "does not hold", "undecided" or "not run"."""
        if not self.differences:
            return "not run"
        if min(self.low, *self.differences) > 0:
            return "holds"
        return "does not hold" if max(self.high, *self.differences) < 0 else "undecided"


def _items(metrics: Mapping[str, Any], metric: str) -> NDArray[np.float64]:
    """Returns what a metric is the mean of; of pictures the columns, which are equally large."""
    found = metrics["items"][metric]
    return np.array([float(value) for value in found])


def bootstrap(
    values: Values,
    sources: Sequence[tuple[str, str, str]],
    compute: Callable[..., Any],
) -> tuple[float, float, tuple[float, ...]]:
    """Returns the ends of the interval of 95 % of a statistic of means, and it of each model.

    Args:
        sources: part, key and metric of each mean.
        compute: means -> statistic, elementwise on arrays.
    """
    own = [values.get((part, key), {}) for part, key, _ in sources]
    models = sorted(set.intersection(*map(set, own)))
    if not models:
        return (0.0, 0.0, ())
    generator = np.random.default_rng(0)
    exact, drawn = [], []
    for model in models:
        counts: dict[str, NDArray[np.float64]] = {}
        means, resampled = [], []
        for found, (_, _, metric) in zip(own, sources, strict=True):
            items = _items(found[model], metric)
            if metric not in counts:
                even = np.full(len(items), 1 / len(items))
                counts[metric] = generator.multinomial(len(items), even, RESAMPLES) / len(items)
            means.append(items.mean())
            resampled.append(counts[metric] @ items)
        exact.append(compute(*means))
        drawn.append(compute(*resampled))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(low), float(high), tuple(map(float, exact))


def comparisons() -> Iterable[Comparison]:
    """Yields all statements, table by table."""
    last = str(STEPS[-1])
    cuts = [(f"width-{keep:g}", f"{keep:g} of the neurons") for keep in WIDTHS]
    cuts += [(f"depth-{count}", f"{count} of {LAYERS} layers off") for count in DEPTHS]
    table = "und (scored on the same task) loses less than gen, untrained"
    for cut, row in cuts:
        und, gen = (("probe", f"{c}-{cut}-generation") for c in ("und", "gen"))
        for metric in ("pictures", "velocity"):
            yield _compare(table, row, metric, metric, und, gen)
        asked = ("probe", f"und-{cut}-understanding")
        yield _compare(table, row, "answers", "answers", asked, gen)
    pairs = [(part, "static-1-2") for part in HALVES]
    pairs += [("sparse-28-4-4", "static-1-4"), ("sparse-30-2-2", "static-1-8")]
    for metric in ("pictures", "velocity"):
        table = f"Sparse beats static with as many neurons active: {metric}"
        for part, static in pairs:
            row = f"{title_of(part)} beats {title_of(static)}"
            for key in map(str, STEPS):
                yield _compare(table, row, f"{key} steps", metric, (part, key), (static, key))
            if metric == "pictures":
                column = f"{last} steps, guided"
                yield _compare(table, row, column, metric, (part, "guided"), (static, "guided"))
    table = f"Others, after {last} steps"
    others = [("dense", static, "dense beats {1}: its width is needed") for static in STATIC]
    others += [
        ("sparse-24-8-8", "sparse-16-8-0", "a shared expert helps: {0} beats {1}"),
        ("sparse-32-16-0", "sparse-16-8-0", "finer experts help: {0} beats {1}"),
        ("sparse-48-16-16", "sparse-24-8-8", "finer experts beside a shared one: {0} beats {1}"),
        ("sparse-16-8-0", "random-16-8-0", "the partition by importance helps: {0} beats {1}"),
        ("coactivation-24-8-8", "sparse-24-8-8", "neurons that fire together: {0} beats {1}"),
        ("time-16-8-0", "sparse-16-8-0", "routers that know the time: {0} beats {1}"),
        ("sparse-16-8-0", "frozen-16-8-0", "tuning experts too: {0} beats {1}"),
        ("distilled-16-8-0", "frozen-16-8-0", "distillation: {0} beats {1}"),
        ("sparse-24-8-8", "dense", "{0} beats {1}, trained as many steps more"),
    ]
    for first, second, words in others:
        row = words.format(title_of(first), title_of(second))
        for metric in _METRICS:
            yield _compare(table, row, metric, metric, (first, last), (second, last))
    for top_k in ACTIVE:
        row = f"16/8 with {top_k} experts beats the same with 8"
        for metric in _METRICS:
            other, own = (("sparse-16-8-0", key) for key in (f"top_k {top_k}", last))
            yield _compare(table, row, metric, metric, other, own)
    for words in SCHEDULES:
        row = f"16/8 with {words} experts beats the same with 8"
        other, own = (("sparse-16-8-0", key) for key in (f"top_k {words}", last))
        yield _compare(table, row, "pictures", "pictures", other, own)


def _compare(
    table: str,
    row: str,
    column: str,
    metric: str,
    first: tuple[str, str],
    second: tuple[str, str],
) -> Comparison:
    return Comparison(
        table=table, row=row, column=column, metric=metric, first=first, second=second
    )


def verdict(values: Values, statement: Comparison) -> Verdict:
    """Returns what the metrics of `gather` say about a statement."""
    sign = -1.0 if statement.metric == "velocity" else 1.0
    sources = [(*side, statement.metric) for side in (statement.first, statement.second)]
    low, high, differences = bootstrap(values, sources, lambda a, b: sign * (a - b))
    return Verdict(low=low, high=high, differences=differences)


def to_text(records: Sequence[Record]) -> str:
    """Returns tables in Markdown, and what holds."""
    values = gather(records)
    lines = [_numbers(values), ""]
    lines += ["### Narrower and shallower, untrained", "", *_probe_table(values), ""]
    lines += ["### Half, a quarter and an eighth of the gen FFN, tuned", "", *_tuned_table(values)]
    if routing := list(_routing_rows(values)):
        lines += ["", "### What the choice of an expert says about a token, in bits", ""]
        heads = "cell | time | column of the prompt | first shape"
        lines += [f"| in brackets: shuffled labels, at most | {heads} |", "|---" * 5 + "|"]
        lines += routing
    return "\n".join([*lines, *_verdict_tables(values)])


def _numbers(values: Values) -> str:
    """Says how much everything is the mean of."""
    found = next(iter(next(iter(values.values())).values()))["items"]
    models, pictures = len(_models(values)), len(found["pictures"])
    return (
        f"n = {models} models x {pictures} pictures ({pictures // len(scenes.COLUMNS)} a column), "
        f"{len(found['answers'])} answers, {len(found['velocity'])} batches of 16 pictures for the "
        f"velocity; ± is half of an interval of 95 %."
    )


def _models(values: Values) -> set[int]:
    return set().union(*values.values())


def _verdict_tables(values: Values) -> Iterable[str]:
    number = len(list(comparisons()))
    yield from (
        "",
        "### What holds, and what does not",
        "",
        "Differences (of errors with the sign turned) and their intervals of 95 %. Bold ones are",
        "decided, by the interval and by each of the models: above 0 the statement holds, below it",
        f"does not. There are {number} statements: if nothing were so, some of them would be bold.",
    )
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for statement in comparisons():
        rows = cells.setdefault(statement.table, {})
        told = verdict(values, statement)
        cell = _verdict_cell(told, statement.metric) + _fewer(values, told.differences)
        rows.setdefault(statement.row, {})[statement.column] = cell
    for table, rows in cells.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        yield from ("", f"| {table} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|")
        for row, found in rows.items():
            yield f"| {row} | {' | '.join(found.get(column, '') for column in columns)} |"


def _verdict_cell(found: Verdict, metric: str) -> str:
    if not found.differences:
        return found.result
    digits = 3 if metric == "velocity" else 2
    mean = f"{fmean(found.differences):+.{digits}f}"
    if found.result != "undecided":
        mean = f"**{mean}**"
    return f"{mean} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _cell(values: Values, part: str, key: str, metric: str) -> str:
    """Returns a mean with half the width of its interval."""
    low, high, means = bootstrap(values, [(part, key, metric)], lambda x: x)
    if not means:
        return "not run"
    digits = 3 if metric == "velocity" else 2
    text = f"{fmean(means):.{digits}f} ± {(high - low) / 2:.{digits}f}"
    return text + _fewer(values, means)


def _fewer(values: Values, own: Sequence[float]) -> str:
    """Says where a number is of fewer models than others."""
    return f", {len(own)} model(s)" if 0 < len(own) < len(_models(values)) else ""


def _probe_table(values: Values) -> list[str]:
    cuts = [(f"width-{keep:g}", f"{keep:g} wide") for keep in WIDTHS]
    cuts += [(f"depth-{count}", f"{count} of {LAYERS} layers off") for count in DEPTHS]
    lines = [
        "| what is left | und, scored on generation: pictures | gen: pictures | "
        "und, scored on questions: answers | und, scored on generation: answers | gen: answers |",
        "|---" * 6 + "|",
    ]
    dense = [_cell(values, "dense", "0", metric) for metric in ("pictures", "answers")]
    shown = [dense[i] for i in (0, 0, 1, 1, 1)]
    lines.append(f"| all | {' | '.join(shown)} |")
    for cut, name in cuts:
        und, gen, own = f"und-{cut}-generation", f"gen-{cut}-generation", f"und-{cut}-understanding"
        shown = [
            _cell(values, "probe", key, metric)
            for key, metric in (
                (und, "pictures"),
                (gen, "pictures"),
                (own, "answers"),
                (und, "answers"),
                (gen, "answers"),
            )
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _tuned_table(values: Values) -> list[str]:
    last = str(STEPS[-1])
    heads = [f"pictures, {step} steps" for step in STEPS]
    heads += [f"{last} steps, guided", f"answers, {last}", f"velocity, {last}"]
    lines = [f"| gen FFN | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for part in ("dense", *TUNED):
        shown = [_cell(values, part, key, "pictures") for key in (*map(str, STEPS), "guided")]
        shown += [_cell(values, part, last, metric) for metric in ("answers", "velocity")]
        lines.append(f"| {title_of(part)} | {' | '.join(shown)} |")
    return lines


def _routing_rows(values: Values) -> Iterable[str]:
    for part in TUNED:
        if own := values.get((part, "routing"), {}).values():
            names = ("cell", "time", "column", "shape")
            shown = (
                f"{fmean(m[name]['bits'] for m in own):.4f} "
                f"({max(m[name]['chance'] for m in own):.4f})"
                for name in names
            )
            yield f"| {title_of(part)} | {' | '.join(shown)} |"


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


_LINES = {
    "dense": "#1b1f24",
    "static-1-2": "#c9733a",
    "sparse-16-8-0": "#5fa8a0",
    "sparse-32-16-0": "#8a6fb0",
    "sparse-24-8-8": "#1f6f8b",
}


def write_plot(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draws the figure: untrained and tuned models over what is kept, halves over steps of tuning.

    Points are means over the models, bars intervals of 95 %; what was not run is left out. The
    suffix of `path` says the format, .svg or .png.
    """
    figure_class = optional("matplotlib.figure", extra="plot").Figure
    values, last = gather(records), str(STEPS[-1])
    figure = figure_class(figsize=(11, 8.4), dpi=100, facecolor="white", layout="constrained")
    (untrained, trained), (pictures, velocity) = figure.subplots(2, 2)
    for component, task, metric, label, colour in (
        ("und", "generation", "pictures", "und: pictures", "#1f6f8b"),
        ("gen", "generation", "pictures", "gen: pictures", "#c9733a"),
        ("und", "understanding", "answers", "und: answers", "#9aa4af"),
    ):
        keys = {1.0: ("dense", "0")}
        keys |= {keep: ("probe", f"{component}-width-{keep:g}-{task}") for keep in WIDTHS}
        _draw_line(untrained, values, keys, metric, label, colour)
    whole = {1.0: ("dense", last)}
    for label, parts, colour in (
        ("static", STATIC, "#c9733a"),
        ("sparse, with a shared expert", SHARED, "#1f6f8b"),
    ):
        keys = whole | {share: (part, last) for part, share in parts.items()}
        _draw_line(trained, values, keys, "pictures", label, colour)
    for beside, (part, colour) in enumerate(_LINES.items(), -2):  # so that bars do not overlap
        steps = {i + 0.05 * beside: (part, str(step)) for i, step in enumerate(STEPS)}
        _draw_line(pictures, values, steps, "pictures", title_of(part), colour)
        _draw_line(velocity, values, steps, "velocity", title_of(part), colour)
    share = "share of the neurons that is active"
    _finish(untrained, "Untrained", share, "share right")
    _finish(trained, f"gen FFN, {last} steps of tuning", share, "pictures right")
    for axes in (untrained, trained):
        axes.set_xscale("log", base=2)
        axes.set_xticks([1.0, *WIDTHS], ["1", *(f"{keep:g}" for keep in WIDTHS)])
        axes.minorticks_off()
    for axes, name in ((pictures, "pictures right"), (velocity, "velocity error")):
        axes.set_xticks(range(len(STEPS)), [str(step) for step in STEPS])
        _finish(axes, "Half of the gen FFN", "steps of tuning", name)
    figure.savefig(os.fspath(path))


def _draw_line(
    axes: Any,
    values: Values,
    keys: Mapping[float, tuple[str, str]],
    metric: str,
    label: str,
    colour: str,
) -> None:
    found = {x: bootstrap(values, [(*key, metric)], lambda v: v) for x, key in keys.items()}
    shown = {x: point for x, point in sorted(found.items()) if point[2]}
    if shown:
        low, high, own = zip(*shown.values(), strict=True)
        means = np.array([fmean(models) for models in own])
        errors = np.stack([means - low, high - means]).clip(min=0)
        options = {"marker": "o", "capsize": 3, "color": colour, "label": label}
        axes.errorbar(list(shown), means, errors, **options)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", weight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:  # below the axes, where no data is
        at = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axes.legend(frameon=False, fontsize=8, ncols=3, **at)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_panel(folder: Path, path: str | os.PathLike[str], parts: Sequence[str]) -> None:
    """Draws what the models of seed 0 drew at the end, a row for each part, of `SHOWN`.

    Args:
        folder: of the study, which keeps a strip of pictures of each part.
    """
    figure_class = optional("matplotlib.figure", extra="plot").Figure
    image = optional("PIL.Image", extra="bagel")
    figure = figure_class(
        figsize=(2 * len(SHOWN), 2 * len(parts) + 0.6), dpi=100, layout="constrained"
    )
    grid = figure.subplots(len(parts), len(SHOWN), squeeze=False)
    for row, part in zip(grid, parts, strict=True):
        strip = np.asarray(image.open(folder / f"0-{part}.png"))
        for axes, prompt, drawn in zip(row, SHOWN, np.split(strip, len(SHOWN), 1), strict=True):
            axes.imshow(drawn, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if part == parts[0]:
                axes.set_title(prompt, size=8)
        row[0].set_ylabel(title_of(part))
    figure.savefig(os.fspath(path))
