# SPDX-License-Identifier: Apache-2.0
"""Which decoder layers a transform touches."""

from __future__ import annotations

import re
from collections.abc import Sequence


def select_layers(layers: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Resolves a layer selection against a model of `num_layers` layers.

    Args:
        layers: "middle" (all but the first and the last), "all", "a-b" (both ends included), "a",
            comma-separated combinations of the last two, or a sequence of indices.
        num_layers: number of decoder layers in the model.

    Returns:
        Ascending layer indices without repeats.

    Raises:
        ValueError: the selection is empty, malformed, or names a layer the model lacks.
    """
    if isinstance(layers, str):
        selected = _parse(layers.strip(), num_layers)
    else:
        selected = list(layers)
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in selected):
            raise ValueError(f"select_layers: layers must be integers, got {selected!r}")
    for layer in selected:
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"select_layers: layers must lie in 0 to {num_layers - 1}, got {layer}"
            )
    if not selected:
        raise ValueError(
            f"select_layers: layers must name at least one of {num_layers} layers, got {layers!r}"
        )
    return tuple(sorted(set(selected)))


def _parse(text: str, num_layers: int) -> list[int]:
    if text == "middle":
        return list(range(1, num_layers - 1))
    if text == "all":
        return list(range(num_layers))
    selected: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None:
            raise ValueError(
                "select_layers: layers must be 'middle', 'all', 'a-b', a number or a "
                f"comma-separated list of these, got {text!r}"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        if last < first:
            raise ValueError(f"select_layers: layers must ascend in a range, got {part.strip()!r}")
        # A huge range names a layer the model lacks; its first such layer is enough to say so.
        selected.extend(range(first, max(first, min(last, num_layers)) + 1))
    return selected
