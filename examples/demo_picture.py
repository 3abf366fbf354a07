# SPDX-License-Identifier: Apache-2.0
"""The picture of the demo: what the models drew above, how long an FFN takes below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL.Image import Image

INK, SOFT, LINE = "#1b1f24", "#6a737d", "#d8dee4"
COLORS = ("#9aa4af", "#c9a36a", "#1f6f8b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The time of one FFN; speedup is that of the dense FFN divided by it."""

    name: str
    milliseconds: float
    speedup: float


def draw(
    path: Path, images: Mapping[str, Image], bars: Sequence[Bar], *, shape: str, prompt: str
) -> None:
    """Writes the picture.

    Args:
        path: a PNG file.
        images: by title; the last one is also shown as its difference from the first.
        bars: the first one is the baseline.
        shape: of the FFNs, in words.
        prompt: what was drawn.
    """
    with rc_context({"font.family": "DejaVu Sans", "text.color": INK, "ytick.color": INK}):
        compose(images, bars, shape, prompt).savefig(path)


def compose(images: Mapping[str, Image], bars: Sequence[Bar], shape: str, prompt: str) -> Figure:
    """Lays out the images in a row, each with its distance from the first, above the bars."""
    figure = Figure(figsize=(11, 7.6), dpi=150, facecolor="white")
    pictures = figure.add_gridspec(1, 4, left=0.04, right=0.96, top=0.815, bottom=0.44, wspace=0.1)
    timings = figure.add_gridspec(1, 1, left=0.175, right=0.96, top=0.31, bottom=0.075)
    figure.text(0.04, 0.938, "A dense checkpoint and its sparse version", size=17, weight="bold")
    figure.text(
        0.04,
        0.897,
        f"The same prompt ({prompt!r}) and the same noise. The weights are random and the model "
        "is tiny,\nso the images are noise: what matters is which of them are equal.",
        size=10,
        color=SOFT,
        va="center",
        linespacing=1.5,
    )
    pixels = {title: np.asarray(image, dtype=np.float32) for title, image in images.items()}
    first, last = next(iter(pixels.values())), list(pixels.values())[-1]
    for column, (title, values) in enumerate(pixels.items()):
        distance = float(np.abs(values - first).mean())
        note = "reference" if column == 0 else f"mean difference {distance:.2f} of 255"
        show(figure.add_subplot(pictures[0, column]), values / 255, title, note)
    difference = np.abs(last - first).mean(axis=2)
    axes = figure.add_subplot(pictures[0, 3])
    show(axes, difference, "dense minus the last", f"at most {difference.max():.0f} of 255")
    draw_bars(figure.add_subplot(timings[0, 0]), bars, shape)
    return figure


def show(axes: Any, values: Any, title: str, note: str) -> None:
    axes.imshow(values, cmap="magma", interpolation="nearest")
    axes.set_title(title, size=11, weight="bold", loc="left", pad=7)
    axes.set_xlabel(note, size=9, color=SOFT, loc="left", labelpad=6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)


def draw_bars(axes: Any, bars: Sequence[Bar], shape: str) -> None:
    longest = max(bar.milliseconds for bar in bars)
    for row, bar in enumerate(bars):
        axes.barh(row, bar.milliseconds, height=0.62, color=COLORS[row % len(COLORS)])
        text = f"{bar.milliseconds:.0f} ms" + (f"   {bar.speedup:.2f}x dense" if row else "")
        axes.text(
            bar.milliseconds + 0.012 * longest,
            row,
            text,
            va="center",
            size=11,
            weight="bold" if row == len(bars) - 1 else "normal",
        )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], size=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.set_xticks([])
    axes.tick_params(length=0)
    heading = "Time of one FFN on this CPU, less is better"
    axes.set_title(heading, x=-0.173, size=13, weight="bold", loc="left", pad=12)
    axes.set_xlabel(shape + "; median, interleaved", size=9, color=SOFT, loc="left", labelpad=6)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(LINE)
