# SPDX-License-Identifier: Apache-2.0
"""What the operations on checkpoints return: dataclasses that print as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any


class Report:
    """Base of the report dataclasses."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts and lists, ready for json.dump."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """Returns the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """Returns the report as a table for people."""
        raise NotImplementedError


def format_table(rows: Sequence[Sequence[object]], *, header: bool = False) -> str:
    """Lays out rows in columns, numbers to the right; `header` underlines the first row."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row, cells in zip(texts, rows, strict=True):
        padded = [
            text.rjust(width) if isinstance(cell, (int, float)) else text.ljust(width)
            for text, cell, width in zip(row, cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_layers(layers: Sequence[int]) -> str:
    """Writes ascending layer indices with ranges: `1-26` or `0, 2-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts) or "none"


def format_bytes(count: int) -> str:
    """Writes a size in decimal units, as disks are sold: `29.2 GB`."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
