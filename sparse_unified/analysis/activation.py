# SPDX-License-Identifier: Apache-2.0
"""Statistics of neurons, condensed to what a picture shows: layers by ranges of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.surgery.decoder import FfnKey

NO_TIME = "no time"  # text, ViT tokens, finished images


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMap:
    """How the neurons of one component fire in one task; of a mixture, the mean of its experts.

    Attributes:
        layers: their numbers, L of them.
        ranges: names of the C ranges of time that have tokens, from noise to image, then `NO_TIME`.
        firing: [L, C] share of the neurons that fire on a token, 0 to 1; NaN without tokens.
        overlap: [L] share of the active neurons that two samples have in common (Jaccard), the mean
            over the ranges; NaN where no two samples have tokens.
        steps: [L] the same of one sample in successive ranges of time.
        chance: what sets drawn at random would overlap by.
    """

    task: str
    component: str
    layers: Sequence[int]
    ranges: Sequence[str]
    firing: Tensor
    overlap: Tensor
    steps: Tensor
    chance: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, None for NaN, for JSON."""
        return {
            "component": self.component,
            "layers": list(self.layers),
            "ranges": list(self.ranges),
            "firing": [_plain(row) for row in self.firing],
            "overlap": _plain(self.overlap),
            "steps": _plain(self.steps),
            "chance": self.chance,
        }


def activation_maps(statistics: FfnStatistics, task: str) -> list[ActivationMap]:
    """Returns the maps of the components that have statistics of a task; none of another task."""
    maps = []
    num_ranges = statistics.config.num_time_ranges
    fraction = statistics.config.active_fraction
    columns = [*range(num_ranges, 0, -1), 0]
    for component in statistics.ffns.get(task, {}):
        keys = statistics.keys(task, component)
        firing = statistics.firing_rate(task, component)[:, columns]
        seen = ~firing.isnan().all(0)
        names = [
            NO_TIME if r == 0 else f"{r / num_ranges:.3g}-{(r - 1) / num_ranges:.3g}"
            for r in columns
        ]
        layers, per_layer = _by_layer(keys, firing[:, seen])
        overlap = statistics.sample_overlap(task, component).nanmean(1)
        steps = statistics.step_overlap(task, component).nanmean(1)
        maps.append(
            ActivationMap(
                task=task,
                component=component,
                layers=layers,
                ranges=[name for name, used in zip(names, seen.tolist(), strict=True) if used],
                firing=per_layer,
                overlap=_by_layer(keys, overlap)[1],
                steps=_by_layer(keys, steps)[1],
                chance=fraction / (2 - fraction),
            )
        )
    return maps


def _by_layer(keys: Sequence[FfnKey], values: Tensor) -> tuple[list[int], Tensor]:
    """Averages [F, ...] over the FFNs of each layer; FFNs without tokens do not count."""
    owner = [key if isinstance(key, int) else key[0] for key in keys]
    layers = sorted(set(owner))
    rows = [
        values[[i for i, layer in enumerate(owner) if layer == wanted]].nanmean(0)
        for wanted in layers
    ]
    return layers, torch.stack(rows)


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
