# SPDX-License-Identifier: Apache-2.0
"""Makes a live model the one of a point, for as long as it is looked at.

Models with the components of BAGEL go through the transforms of `sparse_unified.surgery`, all
others through `surgery`. Either way what was replaced is the same object again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparse_unified._common import format_layers, list_some
from sparse_unified.analysis.adapter import Adapter
from sparse_unified.analysis.criteria import NeuronScores, join_experts
from sparse_unified.analysis.head_surgery import fewer_heads, read_attention
from sparse_unified.analysis.points import Axis, Point, SweepConfig
from sparse_unified.analysis.similarity import Similarity
from sparse_unified.analysis.surgery import as_module, narrowed, without_layers, without_part
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts import keep_units, select_layers
from sparse_unified.surgery import (
    Part,
    PruneHeadsConfig,
    PruneReport,
    PruneWidthConfig,
    SkipLayersConfig,
    prune_heads_,
    prune_width_,
    restore_,
    skip_layers_,
)
from sparse_unified.surgery.find import takes_absent_parts


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
    if point.keep_ratio == 1:
        yield Change()
    elif set(adapter.components) == set(FFN_NAMES):
        yield from _swap(host, adapter, point, config, similarity, scores)
    else:
        yield from _cut(host, adapter, point, config, similarity, workload, scores)


def _swap(
    host: object,
    adapter: Adapter,
    point: Point,
    config: SweepConfig,
    similarity: Similarity,
    scores: NeuronScores | None,
) -> Iterator[Change]:
    layers: tuple[int, ...] = ()
    if point.axis is Axis.DEPTH:
        layers = layers_to_skip(point, config, adapter.num_layers(), similarity)
        if not layers:
            yield Change()
            return
        report = skip_layers_(
            host, SkipLayersConfig(component=point.component, layers=layers, part=config.part)
        )
    elif point.axis is Axis.WIDTH:
        assert scores is not None
        report = prune_width_(
            host,
            PruneWidthConfig(
                component=point.component,
                layers=config.layers,
                keep_ratio=point.keep_ratio,
                budget=config.budget,
                block_size=config.block_size,
            ),
            join_experts(scores[point.component]),
        )
    else:
        report = prune_heads_(
            host,
            PruneHeadsConfig(
                component=point.component,
                layers=config.layers,
                keep_ratio=point.keep_ratio,
                budget=config.budget,
            ),
        )
    try:
        yield Change(text=_words(layers, report, config), skipped_layers=layers)
    finally:
        restore_(host, latest=True)


def _cut(
    host: object,
    adapter: Adapter,
    point: Point,
    config: SweepConfig,
    similarity: Similarity,
    workload: Callable[[], Callable[[], object]],
    scores: NeuronScores | None,
) -> Iterator[Change]:
    component = point.component
    legal = select_layers(config.layers, adapter.num_layers())
    if point.axis is Axis.DEPTH:
        layers = layers_to_skip(point, config, adapter.num_layers(), similarity)
        without = (
            without_layers(as_module(host), adapter, component, layers)
            if config.part is Part.BLOCK
            else without_part(adapter, component, layers, config.part, workload())
        )
        with without:
            yield Change(text=_without(layers, config), skipped_layers=layers)
        return
    if point.axis is Axis.HEADS:
        attentions = [read_attention(adapter, component, layer) for layer in legal]
        groups = keep_units(
            {attention.layer: attention.scores() for attention in attentions},
            keep_ratio=point.keep_ratio,
            budget=config.budget,
        )
        changed = [(a.text(), a.text(len(groups[a.layer]))) for a in attentions]
        with fewer_heads(attentions, {n: index.tolist() for n, index in groups.items()}):
            yield Change(text=_each(changed))
        return
    assert scores is not None
    ffns = [ffn for ffn in adapter.ffns(component) if ffn.layer in legal]
    kept = keep_units(
        {i: scores[component][ffn.key] for i, ffn in enumerate(ffns)},
        keep_ratio=point.keep_ratio,
        budget=config.budget,
        block_size=config.block_size,
    )
    by_key = {ffn.key: kept[i] for i, ffn in enumerate(ffns)}
    widths = [(f"{f.intermediate_size} neurons", f"{len(by_key[f.key])} neurons") for f in ffns]
    with narrowed(ffns, by_key):
        yield Change(text=_each(widths))


def _words(layers: tuple[int, ...], report: PruneReport, config: SweepConfig) -> str:
    if layers:
        return _without(layers, config)
    return _each((part.before, part.after) for part in report.parts)


def _without(layers: Sequence[int], config: SweepConfig) -> str:
    if not layers:
        return "nothing"
    part = "" if config.part is Part.BLOCK else f"{config.part.value} of "
    return f"{part}{format_layers(layers)} skipped"


def _each(changes: Iterable[tuple[str, str]]) -> str:
    texts = dict.fromkeys(f"{old} -> {new}" for old, new in changes if old != new)
    return list_some(texts, 2) if texts else "nothing"
