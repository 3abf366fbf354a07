# SPDX-License-Identifier: Apache-2.0
"""Pictures of a sweep: sensitivity curves, similarity per layer, activation maps, overlap.

Colours tell components apart, the same in every picture; heat maps go from dark to bright.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_unified._common import optional
from sparse_unified.analysis.activation import NO_TIME, ActivationMap
from sparse_unified.analysis.evaluate import Better
from sparse_unified.analysis.figure import (
    SOFT,
    STYLE,
    bright_map,
    color_of,
    grid_ticks,
    heading,
    panels_of,
    share_rows,
)
from sparse_unified.analysis.points import Axis
from sparse_unified.analysis.results import SweepResult, TaskResult
from sparse_unified.analysis.similarity import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART_STYLES = {"block": "-", "attention": "--", "ffn": ":"}


def write_plots(result: SweepResult, folder: Path) -> list[Path]:
    """Draws everything that a sweep has shown into PNG files.

    Args:
        folder: made if it is not there.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = optional("matplotlib", extra="plot")
    folder.mkdir(exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Figure] = {}
        for task in result.tasks:
            if task.points:
                figures[f"sensitivity-{task.task}"] = sensitivity(task)
            figures[f"similarity-{task.task}"] = similarity(task)
            if task.activation:
                figures[f"activation-{task.task}"] = activation(task.activation)
                figures[f"overlap-{task.task}"] = overlap(task.activation)
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            figure.savefig(path)
            written.append(path)
    return written


def sensitivity(task: TaskResult) -> Figure:
    """Draws each metric over the ratio that is kept, one panel per axis, one line per component."""
    axes_swept = list(dict.fromkeys(entry.point.axis for entry in task.points))
    components = list(dict.fromkeys(entry.point.component for entry in task.points))
    rows, columns = len(task.better), len(axes_swept)
    figure, panels = panels_of(rows, columns, width=3.1, height=2.3)
    heading(figure, f"Sensitivity: {task.task}", "metrics over the share that is kept")
    for row, (metric, way) in enumerate(task.better.items()):
        for column, axis in enumerate(axes_swept):
            panel = panels[row][column]
            dense = task.dense[metric]
            panel.axhline(dense, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="dense")
            for component in components:
                points = _curve(task, component, axis, metric)
                if points:
                    if points[-1][0] < 1:
                        points.append((1.0, dense))
                    ratios, values = zip(*points, strict=True)
                    panel.plot(
                        ratios,
                        values,
                        color=color_of(component, components),
                        marker="o",
                        markersize=4,
                        linewidth=1.6,
                        label=component,
                    )
            panel.set_xlim(0, 1.03)
            if row == 0:
                panel.set_title(axis.value, loc="left", weight="bold")
            if row == rows - 1:
                panel.set_xlabel("kept ratio")
            if column == 0:
                arrow = "lower is better" if way is Better.LOWER else "higher is better"
                panel.set_ylabel(f"{metric.replace('_', ' ')}\n({arrow})")
    share_rows(panels)
    panels[0][-1].legend(loc="best", fontsize=8)
    return figure


def similarity(task: TaskResult) -> Figure:
    """Draws the cosine of each layer and part, one panel per component."""
    components = list(dict.fromkeys(entry.component for entry in task.similarity.layers))
    figure, panels = panels_of(1, len(components), width=4.2, height=2.9)
    heading(
        figure,
        f"Similarity per layer: {task.task}",
        "cosine of input and output after the residual add; near 1 is redundant",
    )
    for panel, component in zip(panels[0], components, strict=True):
        entries = task.similarity.of(component)
        for part in PARTS:
            panel.plot(
                [entry.layer for entry in entries],
                [getattr(entry, part) for entry in entries],
                color=color_of(component, components),
                linestyle=PART_STYLES[part],
                marker="o",
                markersize=3,
                linewidth=1.5,
                label=part,
            )
        panel.set_title(component, loc="left", weight="bold")
        panel.set_xlabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(loc="best", fontsize=8)
    share_rows(panels)
    panels[0][0].set_ylabel("cosine")
    return figure


def activation(maps: Sequence[ActivationMap]) -> Figure:
    """Draws the share of firing neurons, layer by timestep range, one panel per component."""
    figure, panels = panels_of(1, len(maps), width=4.4, height=3.4)
    heading(
        figure,
        f"Activation: {maps[0].task}",
        "share of the neurons that fire on a token; the rest is sparsity",
    )
    rates = torch.cat([found.firing[~found.firing.isnan()] for found in maps])
    low, high = float(rates.min()), float(rates.max())
    image: Any = None
    for panel, found in zip(panels[0], maps, strict=True):
        image = panel.imshow(
            found.firing.numpy(),
            cmap=bright_map(),
            vmin=low,
            vmax=high if high > low else low + 0.01,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
        )
        grid_ticks(panel, found.ranges, found.layers)
        if NO_TIME in found.ranges[1:]:
            panel.axvline(found.ranges.index(NO_TIME) - 0.5, color="white", linewidth=4)
        panel.set_title(found.component, loc="left", weight="bold")
        panel.set_xlabel("time, from noise to image" if len(found.ranges) > 1 else "")
        panel.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels[0], fraction=0.035, pad=0.02)
    bar.set_label("firing rate")
    bar.outline.set_visible(False)
    return figure


def overlap(maps: Sequence[ActivationMap]) -> Figure:
    """Draws how much of the active neurons stays from sample to sample and from step to step."""
    sides = {"between samples": "overlap", "between successive times": "steps"}
    shown = {
        title: [found for found in maps if not getattr(found, name).isnan().all()]
        for title, name in sides.items()
    }
    shown = {title: found for title, found in shown.items() if found} or {"between samples": []}
    figure, panels = panels_of(1, len(shown), width=4.6, height=3.0)
    heading(
        figure,
        f"Overlap of active neurons: {maps[0].task}",
        "Jaccard overlap of the most active neurons; near chance is dynamic sparsity",
    )
    components = [found.component for found in maps]
    for panel, (title, listed) in zip(panels[0], shown.items(), strict=True):
        for found in listed:
            panel.plot(
                list(found.layers),
                getattr(found, sides[title]).tolist(),
                color=color_of(found.component, components),
                marker="o",
                markersize=4,
                linewidth=1.6,
                label=found.component,
            )
        panel.axhline(
            maps[0].chance, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="chance"
        )
        if not listed:
            panel.text(0.5, 0.5, "one sample: nothing to compare", ha="center", color=SOFT)
        panel.set_ylim(0, 1.03)
        panel.set_title(title, loc="left", weight="bold")
        panel.set_xlabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_ylabel("overlap")
    panels[0][-1].legend(loc="best", fontsize=8)
    return figure


def _curve(task: TaskResult, component: str, axis: Axis, metric: str) -> list[tuple[float, float]]:
    return sorted(
        (entry.point.keep_ratio, entry.metrics[metric])
        for entry in task.points
        if entry.point.component == component and entry.point.axis is axis
    )
