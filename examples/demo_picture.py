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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The time of one FFN; speedup is that of the fastest dense FFN divided by it."""

    name: str
    milliseconds: float
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one model drew: pictures [3, H, W] in [-1, 1] of the prompts, in their order."""

    title: str
    note: str
    prompts: Sequence[str]
    pictures: Sequence[Tensor]


def draw(path: Path, rows: Sequence[Row], bars: Sequence[Bar], *, shape: str) -> None:
    """Writes the picture.

    Args:
        path: a PNG file.
        rows: one for each model; those with the same prompts stand below each other.
        bars: the first one is the baseline.
        shape: of the FFNs, in words.
    """
    with rc_context({"font.family": "DejaVu Sans", "text.color": INK, "ytick.color": INK}):
        compose(rows, bars, shape).savefig(path)


def compose(rows: Sequence[Row], bars: Sequence[Bar], shape: str) -> Figure:
    """Lays out the images, a row for each model and a block for each task, beside the bars."""
    figure = Figure(figsize=(15, 8.4), dpi=100, facecolor="white")
    figure.text(0.02, 0.95, "Dense, pruned and sparse", size=17, weight="bold")
    figure.text(
        0.02,
        0.92,
        "Same prompts, same noise, no guidance. Models of 0.8 M parameters.",
        size=10,
        color=SOFT,
    )
    tasks = list(dict.fromkeys(tuple(row.prompts) for row in rows))
    height = 0.87 / len(tasks)
    for number, prompts in enumerate(tasks):
        own = [row for row in rows if tuple(row.prompts) == prompts]
        top = 0.855 - number * height
        grid = figure.add_gridspec(
            len(own), len(prompts), left=0.16, right=0.56, top=top, bottom=top - height + 0.06
        )
        for i, row in enumerate(own):
            for j, picture in enumerate(row.pictures):
                axes = figure.add_subplot(grid[i, j])
                show(axes, picture, row.prompts[j] if i == 0 else "")
                if j == 0:
                    text = f"{row.title}\n{row.note.replace(', ', chr(10))}"
                    axes.set_ylabel(text, size=8, rotation=0, ha="right", va="center", labelpad=8)
    timings = figure.add_gridspec(1, 1, left=0.71, right=0.97, top=0.82, bottom=0.35)
    draw_bars(figure.add_subplot(timings[0, 0]), bars, shape)
    return figure


def show(axes: Any, picture: Tensor, title: str) -> None:
    pixels = (picture.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(fill(title, 18), size=8, pad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)


def draw_bars(axes: Any, bars: Sequence[Bar], shape: str) -> None:
    longest = max(bar.milliseconds for bar in bars)
    last = len(bars) - 1
    for row, bar in enumerate(bars):
        axes.barh(row, bar.milliseconds, height=0.62, color=OURS if row == last else BASELINE)
        text = f"{bar.milliseconds:.0f} ms" + (f"  {bar.speedup:.2f}x" if bar.speedup > 1 else "")
        weight = "bold" if row == last else "normal"
        axes.text(
            bar.milliseconds + 0.015 * longest, row, text, va="center", size=11, weight=weight
        )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], size=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xticks([])
    axes.tick_params(length=0)
    heading = "Time of one FFN on this CPU, less is better"
    axes.set_title(heading, x=-0.42, size=13, weight="bold", loc="left", pad=12)
    note = f"{fill(shape, 46)}\nmedian, interleaved; ratios over the faster dense FFN, at most 2x"
    axes.set_xlabel(note, size=9, color=SOFT, loc="left", labelpad=6)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(LINE)
