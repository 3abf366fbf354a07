# SPDX-License-Identifier: Apache-2.0
"""Plots of a sweep and of expert usage.

Of a sweep: sensitivity curves, similarity per layer, firing rates, overlap of active neurons.
Colours tell components apart, the same in every plot; heat maps go from dark to bright.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_unified._common import StrPath, optional
from sparse_unified.analysis.expert_usage import ExpertUsage
from sparse_unified.analysis.statistics import NO_TIME
from sparse_unified.analysis.sweep import SweepResult
from sparse_unified.checkpoint.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOFT, LINE = "#57606a", "#d8dee4"
COLORS = {"und": "#1f6f8b", "gen": "#d1762b"}  # others take matplotlib's
PART_STYLES = {"block": "-", "attention": "--", "ffn": ":"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "grid.color": LINE,
    "lines.marker": "o",
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def write_plots(result: SweepResult, folder: StrPath) -> list[Path]:
    """Draws everything that a sweep has shown into PNG files, and returns these.

    Args:
        result: of `run_sweep`.
        folder: made if it is not there.
    """
    Path(folder).mkdir(exist_ok=True)
    written = []
    with optional("matplotlib", "plot").rc_context(STYLE):
        for task, found in result.tasks.items():
            figures = {"similarity": similarity(task, found)}
            if found["points"]:
                figures["sensitivity"] = sensitivity(task, found)
            if maps := found["activation"]:
                figures["activation"] = activation(task, maps)
                figures["overlap"] = overlap(task, maps)
                figures["never-always"] = never_always(task, maps)
            for kind, figure in figures.items():
                written.append(Path(folder) / f"{kind}-{task}.png")
                figure.savefig(written[-1])
    return written


def write_usage_plot(usage: ExpertUsage, path: StrPath) -> None:
    """Draws expert usage into a PNG file; an existing one is replaced whole or not at all."""
    image = BytesIO()
    with optional("matplotlib", "plot").rc_context(STYLE):
        usage_figure(usage).savefig(image, format="png")
    replace_file(Path(path), image.getvalue())


def sensitivity(task: str, found: Mapping[str, Any]) -> Figure:
    """Draws each metric over the ratio that is kept, one panel per axis, one line per component."""
    points, dense = found["points"], found["dense"]
    axes, components = _each(points, "axis"), _each(points, "component")
    shape, note = (len(dense), len(axes)), "metrics over the kept share"
    figure, panels = _panels(shape, (3.1, 2.3), f"Sensitivity: {task}", note)
    for (metric, way), row in zip(found["better"].items(), panels, strict=True):
        for axis, panel in zip(axes, row, strict=True):
            for component in components:
                own = [p for p in points if (p["component"], p["axis"]) == (component, axis)]
                curve = {1.0: dense[metric]} | {p["keep_ratio"]: p["metrics"][metric] for p in own}
                _line(panel, sorted(curve), [curve[x] for x in sorted(curve)], component)
            _reference(panel, dense[metric], "dense")
            panel.set(xlim=(0, 1.03), xlabel="kept ratio")
            panel.set_title(axis)
        row[0].set_ylabel(f"{metric.replace('_', ' ')}\n({way} is better)")
    panels[0][-1].legend()
    return figure


def similarity(task: str, found: Mapping[str, Any]) -> Figure:
    """Draws the cosine of each layer and part, one panel per component."""
    components = _each(found["similarity"], "component")
    note = "cosine of input and output after the residual add; near 1 is redundant"
    title = f"Similarity per layer: {task}"
    figure, panels = _panels((1, len(components)), (4.2, 2.9), title, note)
    for panel, component in zip(panels[0], components, strict=True):
        entries = [entry for entry in found["similarity"] if entry["component"] == component]
        for part, style in PART_STYLES.items():
            layers, values = [e["layer"] for e in entries], [e[part] for e in entries]
            _line(panel, layers, values, component, label=part, linestyle=style)
        panel.set_title(component)
        panel.set_xlabel("layer")
        panel.legend()
    panels[0][0].set_ylabel("cosine")
    return figure


def activation(task: str, maps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the share of firing neurons, layer by timestep range, one panel per component."""
    note = "share of the neurons that fire on a token; the rest is sparsity"
    figure, panels = _panels((1, len(maps)), (4.4, 3.4), f"Activation: {task}", note)
    rates = [np.array(own["firing"], dtype=float) for own in maps]
    low, high = (f([f(own) for own in rates]) for f in (np.nanmin, np.nanmax))
    limits = (low, max(high, low + 0.01))
    for panel, own, values in zip(panels[0], maps, rates, strict=True):
        ranges = own["ranges"]
        _heat_map(figure, panel, values, ranges, own["layers"], limits, "firing rate")
        if NO_TIME in ranges[1:]:
            panel.axvline(ranges.index(NO_TIME) - 0.5, color="white", lw=4, marker="")
        panel.set_title(own["component"])
        panel.set_xlabel("time, from noise to image" if len(ranges) > 1 else "")
    return figure


def never_always(task: str, maps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the shares of never and of always active neurons, layer by timestep range.

    Beside these heat maps are the shares over all times, a line per component.
    """
    note = "share of the neurons among the active ones of no sample (above), of every one (below)"
    size = (2, len(maps) + 1)
    figure, panels = _panels(size, (4.2, 3.0), f"Never or always active: {task}", note)
    for above, own in zip(panels.T, maps, strict=False):
        above[0].set_title(own["component"])
        for panel, name in zip(above, ("never", "always"), strict=True):
            values = np.array(own[f"{name}_by_time"], dtype=float)
            _heat_map(figure, panel, values, own["ranges"], own["layers"], (0, 1), name)
        above[1].set_xlabel("time, from noise to image" if len(own["ranges"]) > 1 else "")
    over_all = ("never_at_any_time", "always_at_all_times")
    for panel, name in zip(panels[:, -1], over_all, strict=True):
        for own in maps:
            shares = np.array(own[name], dtype=float)
            _line(panel, shares, range(len(shares)), own["component"])
        panel.set(xlim=(-0.02, 1.02), xlabel="share of the neurons")
        panel.set_title(name.replace("_", " "))
    panels[0, -1].legend()
    return figure


def overlap(task: str, maps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how much of the active neurons stays from sample to sample and from step to step."""
    sides = {"overlap": "between samples", "steps": "between successive times"}
    note = "Jaccard overlap of the most active neurons; near chance is dynamic sparsity"
    figure, panels = _panels((1, 2), (4.6, 3.0), f"Overlap of active neurons: {task}", note)
    for panel, (name, title) in zip(panels[0], sides.items(), strict=True):
        drawn = [own for own in maps if any(value is not None for value in own[name])]
        for own in drawn:
            _line(panel, own["layers"], np.array(own[name], dtype=float), own["component"])
        if not drawn:
            panel.text(0.5, 0.5, "nothing to compare", ha="center", color=SOFT)
        _reference(panel, maps[0]["chance"], "chance")
        panel.set(ylim=(0, 1.03), xlabel="layer")
        panel.set_title(title)
    panels[0][0].set_ylabel("overlap")
    panels[0][-1].legend()
    return figure


def usage_figure(usage: ExpertUsage) -> Figure:
    """Draws load by layer and expert, and below, where there are times, its change over them."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for own in usage.layers:
        columns.setdefault(own["component"], []).append(own)
    has_times = any(move is not None for own in usage.layers for move in own["change"])
    note = "load of each expert, 1 is even"
    note += "; share of the choices that move from one range of times to the next" * has_times
    size = (1 + has_times, len(columns))
    figure, panels = _panels(size, (4.6, 2.9), f"Expert usage: {usage.task}", note)
    steps = [f"to {name}" for name in usage.ranges[-2:0:-1]]  # from noise to image
    for above, (component, rows) in zip(panels.T, columns.items(), strict=True):
        layers = [own["layer"] for own in rows]
        # Tokens that chose each expert, over those if all were chosen equally often.
        even = np.array([[own["num_experts"] / own["top_k"]] for own in rows])
        loads = even * _stack([own["share"] for own in rows])
        experts = [str(expert) for expert in range(loads.shape[1])]
        shown = [(loads, experts, "load", "expert")]
        if has_times:
            moves = _stack([own["change"][::-1] for own in rows])
            shown.append((moves, steps, "change", "time, from noise to image"))
        above[0].set_title(component)
        for panel, (values, names, label, x_label) in zip(above, shown, strict=True):
            limits = (0, np.nan_to_num(values).max() or 1.0)
            _heat_map(figure, panel, values, names, layers, limits, label)
            panel.set_xlabel(x_label)
    return figure


def _each(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Returns the values of a field, each once, in order."""
    return list(dict.fromkeys(row[name] for row in rows))


def _stack(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Stacks rows of perhaps different lengths, NaN where one ends."""
    size = max(map(len, rows))
    return np.array([[*row, *[None] * (size - len(row))] for row in rows], dtype=float)


def _line(panel: Any, x: Any, y: Any, component: str, **style: Any) -> None:
    panel.plot(x, y, color=COLORS.get(component), **{"label": component, **style})


def _reference(panel: Any, value: float, label: str) -> None:
    panel.axhline(value, label=label, marker="", color=SOFT, linewidth=1, linestyle="--")


def _panels(
    shape: tuple[int, int], size: tuple[float, float], title: str, note: str
) -> tuple[Figure, Any]:
    """Returns a figure and its panels [rows][columns] of a size in inches, under a heading.

    The panels of a row have one range, so that their curves can be compared.
    """
    from matplotlib.figure import Figure

    sides = (max(size[0] * shape[1] + 1.0, 5.6), size[1] * shape[0] + 1.0)
    figure = Figure(figsize=sides, layout="constrained")
    figure.suptitle(f"{title}\n", x=0.01, ha="left", size=13, weight="bold")
    figure.text(0.01, 1 - 0.36 / sides[1], note, size=9, color=SOFT, va="top")
    return figure, figure.subplots(*shape, squeeze=False, sharey="row")


def _heat_map(
    figure: Figure,
    panel: Any,
    values: np.ndarray,
    columns: Sequence[str],
    layers: Sequence[int],
    limits: tuple[float, float],
    label: str,
) -> None:
    """Draws values from dark to bright, grey where there were no tokens; names columns and rows."""
    from matplotlib import colormaps

    style = {"cmap": colormaps["magma"].with_extremes(bad=LINE), "interpolation": "nearest"}
    style |= {"vmin": limits[0], "vmax": limits[1], "aspect": "auto", "origin": "lower"}
    image = panel.imshow(values, **style)
    panel.grid(False)
    panel.set_ylabel("layer")
    step = max(1, len(layers) // 14)
    panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    # As many names as there is room for, at some 40 letters a panel; the last one always.
    step = max(1, math.ceil(len(columns) * (max(map(len, columns)) + 2) / 40))
    ticks = list(range(len(columns) - 1, -1, -step))
    panel.set_xticks(ticks, [columns[tick] for tick in ticks])
    figure.colorbar(image, ax=panel, fraction=0.04, pad=0.02, label=label)
