# SPDX-License-Identifier: Apache-2.0
"""Makes a live model the one of a point, for as long as it is looked at.

See `sparse_unified.surgery.changed`: what was replaced is the same object again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparse_unified.analysis.criteria import NeuronScores
from sparse_unified.analysis.points import Axis, Point, SweepConfig
from sparse_unified.analysis.similarity import Similarity
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts import select_layers
from sparse_unified.surgery import Part, PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig
from sparse_unified.surgery.cuts import PruneConfig
from sparse_unified.surgery.decoder import Adapter, takes_absent_parts
from sparse_unified.surgery.temporary import changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a transform did, in words, and the layers that are skipped."""

    text: str = "nothing"
    skipped_layers: tuple[int, ...] = ()


def legal_axes(adapter: Adapter, part: Part = Part.BLOCK) -> tuple[Axis, ...]:
    """Returns the axes along which models of an adapter can be made smaller.

    Args:
        part: what a skipped layer is to lose.
    """
    depth = (Axis.DEPTH,) if part is Part.FFN else ()
    if len(adapter.components) > 1 and not _has_own_attentions(adapter):
        return (*depth, Axis.WIDTH)  # an attention would be lost to all components at once
    return tuple(Axis)


def _has_own_attentions(adapter: Adapter) -> bool:
    """Tells whether the components of BAGEL can lose an attention, or heads, one by one."""
    return set(adapter.components) == set(FFN_NAMES) and all(
        takes_absent_parts(adapter.block(layer, component).layer_module)
        for component in adapter.components
        for layer in range(adapter.num_layers())
        if adapter.holds(layer, component)
    )


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
def transformed(
    host: object,
    adapter: Adapter,
    point: Point,
    config: SweepConfig,
    *,
    similarity: Similarity,
    workload: Callable[[], Callable[[], object]],
    scores: NeuronScores | None = None,
) -> Iterator[Change]:
    """Inside, the model is that of the point; afterwards it is as it was, bit for bit.

    Args:
        host: the model or pipeline; adapter: of it.
        similarity: ranks layers. scores: rank neurons; needed along width.
        workload: sets up a forward of the model, see `Probe`.

    Raises:
        ValueError: the transform refuses the model; the message says why.
    """
    layers: tuple[int, ...] = ()
    if point.axis is Axis.DEPTH:
        layers = layers_to_skip(point, config, adapter.num_layers(), similarity)
    if point.keep_ratio == 1 or (point.axis is Axis.DEPTH and not layers):
        yield Change()
        return
    with changed(
        host,
        _mode(point, config, layers),
        scores[point.component] if point.axis is Axis.WIDTH and scores is not None else None,
        adapter=adapter,
        component=point.component,
        forward=lambda: workload()(),
    ) as text:
        yield Change(text=text, skipped_layers=layers)


def _mode(point: Point, config: SweepConfig, layers: tuple[int, ...]) -> PruneConfig:
    # The only component of a decoder that is not BAGEL's is its und.
    component = point.component if point.component in FFN_NAMES else "und"
    if point.axis is Axis.DEPTH:
        return SkipLayersConfig(component=component, layers=layers, part=config.part)
    shared: dict[str, Any] = {
        "component": component,
        "layers": config.layers,
        "keep_ratio": point.keep_ratio,
        "budget": config.budget,
    }
    if point.axis is Axis.HEADS:
        return PruneHeadsConfig(**shared)
    return PruneWidthConfig(**shared, block_size=config.block_size)
