# SPDX-License-Identifier: Apache-2.0
"""What a sweep goes through: tasks, components, axes and ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from sparse_unified.analysis.criteria import find_criterion
from sparse_unified.analysis.sums import StatisticsConfig
from sparse_unified.surgery import Budget, Part


class Axis(str, Enum):
    """Along what a model is made smaller."""

    DEPTH = "depth"  # layers that a component skips
    WIDTH = "width"  # neurons of its FFNs
    HEADS = "heads"  # groups of its attention heads


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """What to sweep, and how.

    Args:
        components: of the model, such as "und" and "gen".
        axes: `Axis` values or their names.
        ratios: shares that are kept, in (0, 1].
        criterion: what ranks the neurons along width, see `criteria`. Layers are ranked by
            similarity (drawn at random for `random`), heads by the magnitude of their weights.
        layers: which of them may lose something: "all", "middle", "a-b", or indices.
        part: what a skipped layer loses.
        budget: of width and heads: "uniform", every layer keeps the ratio, or "global".
        block_size: neurons go in blocks of so many.
        seed: of the criterion `random`.
        repeats: timed forwards per point.
        statistics: what is counted of the neurons while the dense model runs the samples.

    Raises:
        ValueError: a value is none of these, repeated, or out of range.
    """

    components: tuple[str, ...]
    axes: tuple[Axis, ...] = (Axis.DEPTH, Axis.WIDTH)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    criterion: str = "activation"
    layers: str | tuple[int, ...] = "all"
    part: Part = Part.BLOCK
    budget: Budget = Budget.UNIFORM
    block_size: int = 1
    seed: int = 0
    repeats: int = 5
    statistics: StatisticsConfig = field(
        default_factory=lambda: StatisticsConfig(num_time_ranges=8)
    )

    def __post_init__(self) -> None:
        for name in ("components", "axes", "ratios"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        object.__setattr__(self, "axes", tuple(_as(Axis, "axis", axis) for axis in self.axes))
        object.__setattr__(self, "part", _as(Part, "part", self.part))
        object.__setattr__(self, "budget", _as(Budget, "budget", self.budget))
        find_criterion(self.criterion)
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        for ratio in self.ratios:
            is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            if not is_number or not math.isfinite(ratio) or not 0 < ratio <= 1:
                raise ValueError(f"analyze: ratio must be above 0 and at most 1, got {ratio!r}")
        size = self.block_size
        if type(size) is not int or not (size == 1 or 16 <= size <= 128):
            raise ValueError(f"analyze: block_size must be 1 or 16 to 128, got {size!r}")
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"analyze: repeats must be at least 1, got {self.repeats!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {
            name: value.value
            if isinstance(value, Enum)
            else [v.value if isinstance(v, Enum) else v for v in value]
            if isinstance(value, tuple)
            else value
            for name, value in asdict(self).items()
        }

    def points(self, task: str, components: Iterable[str]) -> list[Point]:
        """Returns the points of a task, for those components that take part in it."""
        return [
            Point(task=task, component=component, axis=axis, keep_ratio=float(ratio))
            for component in self.components
            if component in components
            for axis in self.axes
            for ratio in sorted(self.ratios, reverse=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model of a sweep: what is kept of one component along one axis, seen on one task."""

    task: str
    component: str
    axis: Axis
    keep_ratio: float

    @property
    def name(self) -> str:
        """Returns a name that is unique in a sweep and fit for a folder."""
        return f"{self.task}-{self.component}-{self.axis.value}-{self.keep_ratio:g}"


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"analyze: {name} must be a list of at least one, got {values!r}")
    if len(set(values)) != len(values):
        raise ValueError(
            f"analyze: {name} must be given once each, got {', '.join(map(str, values))}"
        )
    return tuple(values)


def _as(kind: Any, name: str, value: object) -> Any:
    try:
        return kind(value)
    except ValueError:
        legal = ", ".join(choice.value for choice in kind)
        raise ValueError(f"analyze: {name} must be one of {legal}, got {value!r}") from None
