# SPDX-License-Identifier: Apache-2.0
"""What all pictures of an analysis share: panels, colours, headings, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1b1f24", "#57606a", "#d8dee4"
COMPONENT_COLORS = {"und": "#1f6f8b", "gen": "#d1762b"}
OTHER_COLORS = ("#5b4b8a", "#4f8a4b", "#a8456a", "#7a6a2f")
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


def panels_of(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """Returns a figure and its panels [rows][columns]; sizes of a panel in inches."""
    from matplotlib.figure import Figure

    # Room for the heading above, whatever the number of rows.
    figure = Figure(
        figsize=(max(width * columns + 1.0, 5.6), height * rows + 1.0), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.tick_params(length=0)
    return figure, panels


def heading(figure: Figure, title: str, note: str) -> None:
    """Writes a title, and a line below that says what is shown."""
    figure.suptitle(f"{title}\n", x=0.01, ha="left", size=13, weight="bold")
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.36 / height, note, size=9, color=SOFT, va="top")


def share_rows(panels: Any) -> None:
    """Gives the panels of a row one range, so that their curves can be compared."""
    for row in panels:
        low = min(panel.get_ylim()[0] for panel in row)
        high = max(panel.get_ylim()[1] for panel in row)
        for panel in row:
            panel.set_ylim(low, high)
        for panel in row[1:]:
            panel.tick_params(labelleft=False)


def bright_map() -> Any:
    """Dark to bright, and grey where there were no tokens."""
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=LINE)


def grid_ticks(panel: Any, columns: Sequence[str], rows: Sequence[int]) -> None:
    """Names the columns and rows of a heat map, as many as there is room for."""
    panel.grid(False)
    step = max(1, len(rows) // 14)
    panel.set_yticks(range(0, len(rows), step), [str(row) for row in rows[::step]])
    # As many names as there is room for, at some 40 letters a panel; the last one always.
    step = max(1, math.ceil(len(columns) * (max(map(len, columns)) + 2) / 40))
    ticks = list(range(len(columns) - 1, -1, -step))
    panel.set_xticks(ticks, [columns[tick] for tick in ticks])


def color_of(component: str, components: Sequence[str]) -> str:
    """Returns the colour of a component, the same in every picture."""
    others = [name for name in components if name not in COMPONENT_COLORS]
    if component in COMPONENT_COLORS:
        return COMPONENT_COLORS[component]
    return OTHER_COLORS[others.index(component) % len(OTHER_COLORS)]
