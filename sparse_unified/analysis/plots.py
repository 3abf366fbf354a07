# SPDX-License-Identifier: Apache-2.0
"""Plots of a sweep and of expert usage.

Of a sweep: sensitivity curves, similarity per layer, firing rates, overlap of active neurons.
Colours tell components apart, the same in every plot; heat maps go from dark to bright.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_unified._common import optional
from sparse_unified.analysis.expert_usage import ExpertUsage
from sparse_unified.analysis.similarity import PARTS
from sparse_unified.analysis.statistics import NO_TIME
from sparse_unified.analysis.sweep import SweepResult
from sparse_unified.checkpoint.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1b1f24", "#57606a", "#d8dee4"
COMPONENT_COLORS = {"und": "#1f6f8b", "gen": "#d1762b"}
OTHER_COLORS = ("#5b4b8a", "#4f8a4b", "#a8456a", "#7a6a2f")
PART_STYLES = {"block": "-", "attention": "--", "ffn": ":"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
_REFERENCE: dict[str, Any] = {"color": SOFT, "linewidth": 1, "linestyle": (0, (4, 3))}


def write_plots(result: SweepResult, folder: str | os.PathLike[str]) -> list[Path]:
    """Draws everything that a sweep has shown into PNG files.

    Args:
        result: of `run_sweep`.
        folder: made if it is not there.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = optional("matplotlib", "plot")
    Path(folder).mkdir(exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Figure] = {}
        for task, found in result.tasks.items():
            if found["points"]:
                figures[f"sensitivity-{task}"] = sensitivity(task, found)
            figures[f"similarity-{task}"] = similarity(task, found)
            if found["activation"]:
                figures[f"activation-{task}"] = activation(task, found["activation"])
                figures[f"overlap-{task}"] = overlap(task, found["activation"])
        for name, figure in figures.items():
            written.append(Path(folder) / f"{name}.png")
            figure.savefig(written[-1])
    return written


def write_usage_plot(usage: ExpertUsage, path: str | os.PathLike[str]) -> None:
    """Draws expert usage into a PNG file; an existing one is replaced whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = optional("matplotlib", "plot")
    image = BytesIO()
    with matplotlib.rc_context(STYLE):
        usage_figure(usage).savefig(image, format="png")
    replace_file(Path(path), image.getvalue())


def sensitivity(task: str, found: Mapping[str, Any]) -> Figure:
    """Draws each metric over the ratio that is kept, one panel per axis, one line per component."""
    axes_swept = list(dict.fromkeys(row["axis"] for row in found["points"]))
    components = list(dict.fromkeys(row["component"] for row in found["points"]))
    metrics = list(found["better"])
    title, note = f"Sensitivity: {task}", "metrics over the share that is kept"
    figure, panels = _panels(len(metrics), len(axes_swept), title, note, width=3.1, height=2.3)
    for metric, row in zip(metrics, panels, strict=True):
        dense = found["dense"][metric]
        for axis, panel in zip(axes_swept, row, strict=True):
            panel.axhline(dense, label="dense", **_REFERENCE)
            for component in components:
                points = sorted(
                    (own["keep_ratio"], own["metrics"][metric])
                    for own in found["points"]
                    if own["component"] == component and own["axis"] == axis
                )
                if points:
                    points += [(1.0, dense)] if points[-1][0] < 1 else []
                    ratios, values = zip(*points, strict=True)
                    _curve(panel, ratios, values, component, components, label=component)
            panel.set_xlim(0, 1.03)
        row[0].set_ylabel(f"{metric.replace('_', ' ')}\n({found['better'][metric]} is better)")
    for axis, first, last in zip(axes_swept, panels[0], panels[-1], strict=True):
        first.set_title(axis, loc="left", weight="bold")
        last.set_xlabel("kept ratio")
    _share_rows(panels)
    panels[0][-1].legend(loc="best", fontsize=8)
    return figure


def similarity(task: str, found: Mapping[str, Any]) -> Figure:
    """Draws the cosine of each layer and part, one panel per component."""
    components = list(dict.fromkeys(entry["component"] for entry in found["similarity"]))
    figure, panels = _panels(
        1,
        len(components),
        f"Similarity per layer: {task}",
        "cosine of input and output after the residual add; near 1 is redundant",
        width=4.2,
        height=2.9,
    )
    for panel, component in zip(panels[0], components, strict=True):
        entries = [entry for entry in found["similarity"] if entry["component"] == component]
        layers = [entry["layer"] for entry in entries]
        for part in PARTS:
            cosines = [entry[part] for entry in entries]
            style = {"linestyle": PART_STYLES[part], "markersize": 3, "linewidth": 1.5}
            _curve(panel, layers, cosines, component, components, label=part, **style)
        panel.set_title(component, loc="left", weight="bold")
        _layer_axis(panel)
        panel.legend(loc="best", fontsize=8)
    _share_rows(panels)
    panels[0][0].set_ylabel("cosine")
    return figure


def activation(task: str, maps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the share of firing neurons, layer by timestep range, one panel per component."""
    figure, panels = _panels(
        1,
        len(maps),
        f"Activation: {task}",
        "share of the neurons that fire on a token; the rest is sparsity",
        width=4.4,
        height=3.4,
    )
    rates = [_array(own["firing"]) for own in maps]
    low, high = (f([f(own) for own in rates]) for f in (np.nanmin, np.nanmax))
    image: Any = None
    for panel, own, values in zip(panels[0], maps, rates, strict=True):
        limits = (low, high if high > low else low + 0.01)
        image = _heat_map(panel, values, own["ranges"], own["layers"], limits)
        if NO_TIME in own["ranges"][1:]:
            panel.axvline(own["ranges"].index(NO_TIME) - 0.5, color="white", linewidth=4)
        panel.set_title(own["component"], loc="left", weight="bold")
        panel.set_xlabel("time, from noise to image" if len(own["ranges"]) > 1 else "")
    _color_bar(figure, image, panels[0], "firing rate", fraction=0.035)
    return figure


def overlap(task: str, maps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how much of the active neurons stays from sample to sample and from step to step."""
    sides = {"between samples": "overlap", "between successive times": "steps"}
    shown = {
        title: [own for own in maps if any(value is not None for value in own[name])]
        for title, name in sides.items()
    }
    shown = {title: listed for title, listed in shown.items() if listed} or {"between samples": []}
    figure, panels = _panels(
        1,
        len(shown),
        f"Overlap of active neurons: {task}",
        "Jaccard overlap of the most active neurons; near chance is dynamic sparsity",
        width=4.6,
        height=3.0,
    )
    components = [own["component"] for own in maps]
    for panel, (title, listed) in zip(panels[0], shown.items(), strict=True):
        for own in listed:
            component, values = own["component"], _array(own[sides[title]])
            _curve(panel, own["layers"], values, component, components, label=component)
        panel.axhline(maps[0]["chance"], label="chance", **_REFERENCE)
        if not listed:
            panel.text(0.5, 0.5, "one sample: nothing to compare", ha="center", color=SOFT)
        panel.set_ylim(0, 1.03)
        panel.set_title(title, loc="left", weight="bold")
        _layer_axis(panel)
    panels[0][0].set_ylabel("overlap")
    panels[0][-1].legend(loc="best", fontsize=8)
    return figure


def usage_figure(usage: ExpertUsage) -> Figure:
    """Draws load by layer and expert, and below, where there are times, its change over them."""
    components = list(dict.fromkeys(entry.component for entry in usage.layers))
    # Tokens that chose each expert, over those if all were chosen equally often.
    loads = [
        _stack([entry.share() * (entry.num_experts / entry.top_k) for entry in usage.of(c)])
        for c in components
    ]
    moves = [_stack([entry.change().flip(0) for entry in usage.of(c)]) for c in components]
    has_times = not all(np.isnan(move).all() for move in moves)
    figure, panels = _panels(
        2 if has_times else 1,
        len(components),
        f"Expert usage: {usage.task}",
        "load of each expert, 1 is even"
        + ("; share of the choices that move from one range of times to the next" * has_times),
        width=4.6,
        height=2.9,
    )
    steps = [f"to {name}" for name in usage.ranges[-2:0:-1]]  # from noise to image
    for column, component in enumerate(components):
        layers = [entry.layer for entry in usage.of(component)]
        experts = [str(expert) for expert in range(loads[column].shape[1])]
        rows = [(loads[column], experts, "load", "expert")]
        if has_times:
            rows.append((moves[column], steps, "change", "time, from noise to image"))
        for row, (values, names, label, x_label) in enumerate(rows):
            panel = panels[row][column]
            high = 0.0 if np.isnan(values).all() else float(np.nanmax(values))
            image = _heat_map(panel, values, names, layers, (0, high if high > 0 else 1.0))
            _color_bar(figure, image, panel, label, fraction=0.04)
            panel.set_xlabel(x_label)
        panels[0][column].set_title(component, loc="left", weight="bold")
    return figure


def _array(values: object) -> np.ndarray:
    """Returns nested lists as an array, NaN for None."""
    return np.array(values, dtype=float)


def _stack(rows: Sequence[Any]) -> np.ndarray:
    """Stacks rows of perhaps different lengths, NaN where one ends."""
    stacked = np.full((len(rows), max(map(len, rows))), np.nan)
    for own, row in zip(stacked, rows, strict=True):
        own[: len(row)] = row
    return stacked


def _panels(
    rows: int, columns: int, title: str, note: str, *, width: float, height: float
) -> tuple[Figure, Any]:
    """Returns a figure and its panels [rows][columns] under a heading; sizes in inches."""
    from matplotlib.figure import Figure

    # Room for the heading above, whatever the number of rows.
    figure = Figure(
        figsize=(max(width * columns + 1.0, 5.6), height * rows + 1.0), layout="constrained"
    )
    figure.suptitle(f"{title}\n", x=0.01, ha="left", size=13, weight="bold")
    above = 1 - 0.36 / figure.get_size_inches()[1]
    figure.text(0.01, above, note, size=9, color=SOFT, va="top")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.tick_params(length=0)
    return figure, panels


def _curve(
    panel: Any, x: Any, y: Any, component: str, components: Sequence[str], **style: Any
) -> None:
    color = COMPONENT_COLORS.get(component)
    if color is None:
        others = [name for name in components if name not in COMPONENT_COLORS]
        color = OTHER_COLORS[others.index(component) % len(OTHER_COLORS)]
    panel.plot(x, y, **{"color": color, "marker": "o", "markersize": 4, "linewidth": 1.6, **style})


def _heat_map(
    panel: Any,
    values: np.ndarray,
    columns: Sequence[str],
    layers: Sequence[int],
    limits: tuple[float, float],
) -> Any:
    """Draws values from dark to bright, grey where there were no tokens; names columns and rows."""
    from matplotlib import colormaps

    image = panel.imshow(
        values,
        cmap=colormaps["magma"].with_extremes(bad=LINE),
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    panel.grid(False)
    panel.set_ylabel("layer")
    step = max(1, len(layers) // 14)
    panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    # As many names as there is room for, at some 40 letters a panel; the last one always.
    step = max(1, math.ceil(len(columns) * (max(map(len, columns)) + 2) / 40))
    ticks = list(range(len(columns) - 1, -1, -step))
    panel.set_xticks(ticks, [columns[tick] for tick in ticks])
    return image


def _color_bar(figure: Figure, image: Any, panels: Any, label: str, *, fraction: float) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=fraction, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _layer_axis(panel: Any) -> None:
    panel.set_xlabel("layer")
    panel.xaxis.get_major_locator().set_params(integer=True)


def _share_rows(panels: Any) -> None:
    """Gives the panels of a row one range, so that their curves can be compared."""
    for row in panels:
        low = min(panel.get_ylim()[0] for panel in row)
        high = max(panel.get_ylim()[1] for panel in row)
        for panel in row:
            panel.set_ylim(low, high)
        for panel in row[1:]:
            panel.tick_params(labelleft=False)
