# SPDX-License-Identifier: Apache-2.0
"""The picture of the demo: what the models drew, and how long an FFN takes beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

INK, SOFT, LINE = "#1b1f24", "#6a737d", "#d8dee4"
BASELINE, OURS = "#9aa4af", "#1f6f8b"
RIGHT, WRONG = "#2f9e5b", "#c43d3d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The time of one FFN; speedup is that of the fastest dense FFN divided by it."""

    name: str
    milliseconds: float
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one model drew: pictures [3, H, W] in [-1, 1], which are right, and a note of lines."""

    title: str
    note: str
    pictures: Sequence[Tensor]
    right: Sequence[bool]


def draw(
    path: Path, prompts: Sequence[str], rows: Sequence[Row], bars: Sequence[Bar], *, shape: str
) -> None:
    """Writes the picture.

    Args:
        path: a PNG file.
        prompts: of the columns.
        rows: one for each model.
        bars: those of this package name it.
        shape: of the FFNs, in words.
    """
    with rc_context({"font.family": "DejaVu Sans", "text.color": INK, "ytick.color": INK}):
        compose(prompts, rows, bars, shape).savefig(path)


def compose(prompts: Sequence[str], rows: Sequence[Row], bars: Sequence[Bar], shape: str) -> Figure:
    """Lays out the images, a row for each model, above the bars."""
    figure = Figure(figsize=(13.5, 9.6), dpi=100, facecolor="white")
    figure.text(0.02, 0.955, "Half of the neurons for each token", size=19, weight="bold")
    figure.text(
        0.02,
        0.927,
        "A BAGEL in miniature. Same prompts, new to it, same noise, guided. "
        "Green frames: right, red ones: wrong, by exact rules. In brackets: n, interval of 95 %.",
        size=11,
        color=SOFT,
    )
    grid = figure.add_gridspec(
        len(rows), len(prompts), left=0.2, right=0.985, top=0.86, bottom=0.31, wspace=0.06
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row.pictures):
            axes = figure.add_subplot(grid[i, j])
            frame = RIGHT if row.right[j] else WRONG
            show(axes, picture, prompts[j] if i == 0 else "", frame)
            if j == 0:
                axes.set_ylabel(
                    f"{fill(row.title, 24)}\n{row.note}",
                    size=9,
                    rotation=0,
                    ha="right",
                    va="center",
                    labelpad=10,
                )
    timings = figure.add_gridspec(1, 1, left=0.2, right=0.9, top=0.245, bottom=0.07)
    draw_bars(figure.add_subplot(timings[0, 0]), bars, shape)
    return figure


def show(axes: Any, picture: Tensor, title: str, frame: str) -> None:
    pixels = (picture.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels, interpolation="bicubic")
    axes.set_title(fill(title, 20), size=10, pad=5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2)


def draw_bars(axes: Any, bars: Sequence[Bar], shape: str) -> None:
    longest = max(bar.milliseconds for bar in bars)
    last = len(bars) - 1
    for row, bar in enumerate(bars):
        is_ours = "sparse_unified" in bar.name
        axes.barh(row, bar.milliseconds, height=0.62, color=OURS if is_ours else BASELINE)
        text = f"{bar.milliseconds:.0f} ms" + (f"  {bar.speedup:.2f}x" if bar.speedup > 1 else "")
        weight = "bold" if is_ours else "normal"
        axes.text(
            bar.milliseconds + 0.012 * longest, row, text, va="center", size=10, weight=weight
        )
    # What half of the arithmetic takes at the rate of the fastest dense FFN.
    ceiling = bars[last].milliseconds * bars[last].speedup / 2
    axes.axvline(ceiling, color=INK, linewidth=1, linestyle=":")
    axes.text(ceiling, last + 0.75, "2x: half of the work", size=8, ha="center", va="center")
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], size=10)
    axes.set_ylim(last + 0.95, -0.6)
    axes.set_xlim(0, 1.15 * longest)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(
        "Time of one FFN of realistic size on this CPU", size=12, weight="bold", loc="left", pad=6
    )
    note = f"{shape}; median, interleaved; ratios over the faster dense FFN, at most 2x"
    axes.set_xlabel(note, size=8, color=SOFT, loc="left", labelpad=2)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(LINE)
