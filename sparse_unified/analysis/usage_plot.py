# SPDX-License-Identifier: Apache-2.0
"""A picture of expert usage: the load of every expert, and how it moves between times."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_unified._common import optional
from sparse_unified.analysis.figure import STYLE, bright_map, grid_ticks, heading, panels_of
from sparse_unified.analysis.usage import ExpertUsage, LayerUsage
from sparse_unified.checkpoint.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_usage_plot(usage: ExpertUsage, path: str | os.PathLike[str]) -> None:
    """Draws expert usage into a PNG file; an existing one is replaced whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = optional("matplotlib", extra="plot")
    image = BytesIO()
    with matplotlib.rc_context(STYLE):
        usage_figure(usage).savefig(image, format="png")
    replace_file(Path(path), image.getvalue())


def usage_figure(usage: ExpertUsage) -> Figure:
    """Draws load by layer and expert, and below, where there are times, its change over them."""
    components = list(dict.fromkeys(entry.component for entry in usage.layers))
    loads = [_stack([_relative_load(entry) for entry in usage.of(c)]) for c in components]
    moves = [torch.stack([entry.change().flip(0) for entry in usage.of(c)]) for c in components]
    has_times = any(bool((~move.isnan()).any()) for move in moves)
    figure, panels = panels_of(2 if has_times else 1, len(components), width=4.6, height=2.9)
    heading(
        figure,
        f"Expert usage: {usage.task}",
        "load of each expert, 1 is even"
        + ("; share of the choices that move from one range of times to the next" * has_times),
    )
    names = usage.range_names()[:0:-1]  # from noise to image
    steps = [f"to {name}" for name in names[1:]]
    for column, component in enumerate(components):
        layers = [entry.layer for entry in usage.of(component)]
        experts = [str(expert) for expert in range(loads[column].shape[1])]
        _heat_map(figure, panels[0][column], loads[column], experts, layers, label="load")
        panels[0][column].set_title(component, loc="left", weight="bold")
        panels[0][column].set_xlabel("expert")
        if has_times:
            _heat_map(figure, panels[1][column], moves[column], steps, layers, label="change")
            panels[1][column].set_xlabel("time, from noise to image")
    return figure


def _relative_load(entry: LayerUsage) -> Tensor:
    """[E]: how many tokens chose each expert, over how many would if all were chosen alike."""
    return entry.share() * (entry.num_experts / entry.top_k)


def _stack(rows: list[Tensor]) -> Tensor:
    """Stacks rows of perhaps different lengths, NaN where one ends."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def _heat_map(
    figure: Figure, panel: Any, values: Tensor, columns: list[str], rows: list[int], *, label: str
) -> None:
    known = values[~values.isnan()]
    high = float(known.max()) if len(known) else 0.0
    image = panel.imshow(
        values.numpy(),
        cmap=bright_map(),
        vmin=0,
        vmax=high if high > 0 else 1.0,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    grid_ticks(panel, columns, rows)
    panel.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panel, fraction=0.04, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
