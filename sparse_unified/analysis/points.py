# SPDX-License-Identifier: Apache-2.0
"""What a sweep goes through, and how a live model becomes that of a point for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from sparse_unified.analysis.criteria import CRITERIA, NeuronScores
from sparse_unified.analysis.similarity import Similarity
from sparse_unified.analysis.statistics import StatisticsConfig
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts import select_layers
from sparse_unified.surgery import (
    Budget,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.surgery.cuts import PruneConfig
from sparse_unified.surgery.decoder import Adapter, takes_absent_parts
from sparse_unified.surgery.temporary import changed


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
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise ValueError(f"analyze: {name} must be a list of at least one, got {given!r}")
            if len(set(given)) != len(given):
                raise ValueError(f"analyze: {name} must be given once each, got {given}")
            object.__setattr__(self, name, tuple(given))
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not set(self.axes) <= {axis.value for axis in Axis}:
            raise ValueError(f"analyze: axes must be of depth, width, heads, got {self.axes}")
        object.__setattr__(self, "axes", tuple(map(Axis, self.axes)))
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"analyze: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}"
            )
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"analyze: repeats must be at least 1, got {self.repeats!r}")
        # The configs of the points refuse the rest.
        for ratio in self.ratios:
            width = PruneWidthConfig(
                keep_ratio=ratio, budget=self.budget, block_size=self.block_size
            )
        depth = SkipLayersConfig(layers=(0,), part=self.part)
        object.__setattr__(self, "budget", width.budget)
        object.__setattr__(self, "part", depth.part)

    def points(self, task: str, components: Sequence[str]) -> list[Point]:
        """Returns the points of a task, for those components that take part in it."""
        return [
            Point(task=task, component=component, axis=axis, keep_ratio=float(ratio))
            for component in components
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


def legal_axes(adapter: Adapter, part: Part = Part.BLOCK) -> tuple[Axis, ...]:
    """Returns the axes along which models of an adapter can be made smaller.

    Args:
        adapter: of the model.
        part: what a skipped layer is to lose.
    """
    # An attention that components share would be lost to all of them at once.
    has_own_attentions = len(adapter.components) == 1 or (
        set(adapter.components) == set(FFN_NAMES)
        and all(
            takes_absent_parts(adapter.block(layer, component).layer_module)
            for component in adapter.components
            for layer in range(adapter.num_layers())
            if adapter.holds(layer, component)
        )
    )
    if has_own_attentions:
        return tuple(Axis)
    return (Axis.DEPTH, Axis.WIDTH) if part is Part.FFN else (Axis.WIDTH,)


def layers_to_skip(
    point: Point, config: SweepConfig, num_layers: int, similarity: Similarity
) -> tuple[int, ...]:
    """Returns the layers a point skips: the most redundant ones, or random ones.

    Of N layers that may go, max(1, round(keep_ratio * N)) stay.
    """
    measured = {entry.layer for entry in similarity.of(point.component)}
    legal = [n for n in select_layers(config.layers, num_layers) if n in measured]
    count = len(legal) - max(1, round(point.keep_ratio * len(legal)))
    if config.criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(legal), generator=generator).tolist()
        return tuple(sorted(legal[i] for i in order[:count]))
    return similarity.redundant(point.component, count, config.part.value, layers=legal)


@contextmanager
def made_smaller(
    host: object,
    adapter: Adapter,
    point: Point,
    config: SweepConfig,
    *,
    similarity: Similarity,
    forward: Callable[[], object],
    scores: NeuronScores | None = None,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Inside, the model is that of the point; afterwards it is as it was, bit for bit.

    Args:
        host: the model or pipeline.
        adapter: of it.
        point: what is kept.
        config: of the sweep.
        similarity: ranks layers.
        forward: runs the model once.
        scores: rank neurons; needed along width.

    Yields:
        What was done, in words, and the layers that are skipped.

    Raises:
        ValueError: the transform refuses the model; the message says why.
    """
    layers: tuple[int, ...] = ()
    if point.axis is Axis.DEPTH:
        layers = layers_to_skip(point, config, adapter.num_layers(), similarity)
    if point.keep_ratio == 1 or (point.axis is Axis.DEPTH and not layers):
        yield "nothing", ()
        return
    shared: dict[str, Any] = {
        # The only component of a decoder that is not BAGEL's is its und.
        "component": point.component if point.component in FFN_NAMES else "und",
        "layers": layers or config.layers,
    }
    ranked: dict[str, Any] = {"keep_ratio": point.keep_ratio, "budget": config.budget}
    mode: PruneConfig
    if point.axis is Axis.DEPTH:
        mode = SkipLayersConfig(**shared, part=config.part)
    elif point.axis is Axis.HEADS:
        mode = PruneHeadsConfig(**shared, **ranked)
    else:
        mode = PruneWidthConfig(**shared, **ranked, block_size=config.block_size)
    own = scores[point.component] if scores is not None and point.axis is Axis.WIDTH else None
    with changed(
        host, mode, own, adapter=adapter, component=point.component, forward=forward
    ) as text:
        yield text, layers
