# SPDX-License-Identifier: Apache-2.0
"""What stays of a checkpoint when it is pruned, found out from headers and scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import format_layers, list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.held import Layers, skip, whole_layers
from sparse_unified.checkpoint.modes import (
    BOTH,
    Mode,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.recipe import LayerHeads, Step
from sparse_unified.checkpoint.scores import Scores, resolve_head_scores, resolve_scores
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.experts import (
    Budget,
    ExpertLayout,
    joint_scores,
    keep_in_experts,
    keep_units,
    select_layers,
)

WHAT = "prune"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """A planned pruning.

    Attributes:
        before, after: what the layers hold.
        neurons: `{(component, layer): [kept] int64}`, ascending, of each FFN that gets narrower;
            of a sparse one, positions in expert order.
        steps: what the recipe gains.
    """

    before: Layers
    after: Layers
    neurons: Mapping[tuple[str, int], np.ndarray]
    steps: tuple[Step, ...]


def plan_pruning(
    source: Checkpoint, modes: Sequence[Mode], *, scores: Scores | None, seed: int | None
) -> PrunePlan:
    """Carries out modes one after the other on what a checkpoint holds.

    Raises:
        ValueError: a mode cannot be carried out on this checkpoint, or scores do not fit.
        TypeError: a mode is none that prunes.
    """
    before = source.held if source.held is not None else whole_layers(source.llm_config)
    layers: Layers = {component: dict(own) for component, own in before.items()}
    neurons: dict[tuple[str, int], np.ndarray] = {}
    steps: list[Step] = []
    ranked: set[str] = set()
    for config in modes:
        if isinstance(config, SkipLayersConfig):
            steps.append(_skip(source, layers, config))
            continue
        if not isinstance(config, (PruneWidthConfig, PruneHeadsConfig)):
            raise TypeError(
                f"{WHAT}: modes must be PruneWidthConfig, PruneHeadsConfig or SkipLayersConfig, "
                f"got {type(config).__name__}"
            )
        # Scores are those of the file, so that each part of it is ranked once.
        names = config.components if isinstance(config, PruneHeadsConfig) else (config.component,)
        again = sorted({f"{config.mode} of {name}" for name in names} & ranked)
        if again:
            raise ValueError(
                f"{WHAT}: modes must name the {again[0]} once; prune the result again, got it twice"
            )
        ranked |= {f"{config.mode} of {name}" for name in names}
        if isinstance(config, PruneWidthConfig):
            step, kept = _narrow(source, layers, config, scores, seed)
            neurons |= kept
        else:
            step = _drop_heads(source, before, layers, config, scores, seed)
        steps.append(step)
    gone = [name for name in neurons if not layers[name[0]][name[1]].width]
    for name in gone:
        del neurons[name]
    return PrunePlan(before=before, after=layers, neurons=neurons, steps=tuple(steps))


def _select(layers: Layers, components: Sequence[str], config: Mode, part: str) -> tuple[int, ...]:
    """Returns the selected layers in which the components have a part; "all" passes over others."""
    selected = select_layers(config.layers, len(layers["gen"]))

    def has(layer: int) -> bool:
        held = [layers[component][layer] for component in components]
        return all(h.width > 0 if part == "FFN" else h.has_attention for h in held)

    left = tuple(layer for layer in selected if has(layer))
    if left and config.layers in ("all", "middle"):
        return left
    gone = [layer for layer in selected if not has(layer)]
    if gone:
        raise ValueError(
            f"{WHAT}: layers must have a {' and '.join(components)} {part}, "
            f"got {list_some(gone)}, which skip it"
        )
    return selected


def _skip(source: Checkpoint, layers: Layers, config: SkipLayersConfig) -> Step:
    component, own = config.component, layers[config.component]
    if not _has_part(source, component, "FFN" if config.part.value == "ffn" else "attention"):
        raise ValueError(
            f"{source.directory}: keys must hold {component} layers, got no {config.part.value} "
            "of them"
        )
    selected = select_layers(config.layers, len(own))
    changed = tuple(layer for layer in selected if skip(own[layer], config) != own[layer])
    gone = [layer for layer in selected if layer not in changed]
    if not changed or (gone and config.layers not in ("all", "middle")):
        raise ValueError(
            f"{WHAT}: layers must have a {component} {config.part.value} left, "
            f"got {list_some(gone)}, which skip it already"
        )
    for layer in changed:
        own[layer] = skip(own[layer], config)
    return Step(config=replace(config, layers=changed), scores=None, tool=tool_version())


def _narrow(
    source: Checkpoint,
    layers: Layers,
    config: PruneWidthConfig,
    scores: Scores | None,
    seed: int | None,
) -> tuple[Step, dict[tuple[str, int], np.ndarray]]:
    component = config.component
    if not _has_part(source, component, "FFN"):
        raise ValueError(
            f"{source.directory}: keys must hold {component} FFNs "
            f"({keys.dense_key(component, 0, 'gate_proj')} and so on), got none"
        )
    selected, ffns = _select(layers, [component], config, "FFN"), source.ffns[component]
    layouts: dict[int, ExpertLayout] = {}
    for layer in selected:
        _check_dtype(source, ffns[layer].dtype)
        if ffns[layer].sparse is not None:
            assert source.moe is not None
            layouts[layer] = source.moe.expert_layout(component, layer)
            check_experts(
                layouts[layer],
                budget=config.budget,
                block_size=config.block_size,
                where=f"{WHAT}: {component} layer {layer}",
            )
        elif ffns[layer].intermediate_size % config.block_size:
            raise ValueError(
                f"{WHAT}: block_size must divide the {ffns[layer].intermediate_size} neurons of "
                f"{component} layer {layer}, got {config.block_size}"
            )
    scores_of, origin = resolve_scores(
        source, component, selected, scores=scores, seed=seed, what=WHAT
    )
    kept = keep_units(
        {layer: scores_of(layer) for layer in selected if layer not in layouts},
        keep_ratio=config.keep_ratio,
        budget=config.budget,
        block_size=config.block_size,
    )
    for layer, layout in layouts.items():
        kept[layer] = keep_in_experts(
            scores_of(layer), layout, keep_ratio=config.keep_ratio, block_size=config.block_size
        )
    kept = {layer: kept[layer] for layer in selected}
    for layer, index in kept.items():
        layers[component][layer] = replace(layers[component][layer], width=len(index))
    step = Step(
        config=replace(config, layers=selected),
        scores=origin,
        tool=tool_version(),
        widths={layer: len(index) for layer, index in kept.items()},
    )
    return step, {(component, layer): index.numpy() for layer, index in kept.items()}


def _drop_heads(
    source: Checkpoint,
    before: Layers,
    layers: Layers,
    config: PruneHeadsConfig,
    scores: Scores | None,
    seed: int | None,
) -> Step:
    for component in config.components:
        if not _has_part(source, component, "attention"):
            raise ValueError(
                f"{source.directory}: keys must hold a {component} attention "
                f"({keys.layer_prefix(0)}{keys.attention_modules(component)[1]}.weight and so "
                "on), got none"
            )
    selected = _select(layers, config.components, config, "attention")
    places = {layer: _places(before, layers, layer) for layer in selected}
    ranking: dict[int, list[Tensor]] = {layer: [] for layer in selected}
    origin = ""
    for component in config.components:
        reads = {layer: places[layer][component] for layer in selected}
        if config.component == BOTH:
            partial = [n for n in selected if len(reads[n]) < len(layers[component][n].keys)]
            if partial:
                raise ValueError(
                    f"{WHAT}: component 'both' must have queries for all key heads, got "
                    f"{component} layers {format_layers(partial)}, which read some of them"
                )
        values, origin = resolve_head_scores(
            source, component, reads, scores=scores, seed=seed, what=WHAT
        )
        for layer in selected:
            ranking[layer].append(values[layer])
    kept = keep_units(
        {
            layer: joint_scores(values) if config.component == BOTH else values[0]
            for layer, values in ranking.items()
        },
        keep_ratio=config.keep_ratio,
        budget=config.budget,
    )
    heads = {}
    for layer, groups in kept.items():
        own = {component: groups.tolist() for component in config.components}
        heads[layer] = _apply(before, layers, layer, plan_heads(places[layer], own))
    return Step(
        config=replace(config, layers=selected), scores=origin, tool=tool_version(), heads=heads
    )


def _places(before: Layers, layers: Layers, layer: int) -> dict[str, list[int]]:
    """Returns which key heads of the file, by place, each component with an attention reads."""
    in_file = _keys_in_file(before, layer)
    return {
        component: [in_file.index(head) for head in own[layer].reads]
        for component, own in layers.items()
        if own[layer].has_attention
    }


def _keys_in_file(before: Layers, layer: int) -> tuple[int, ...]:
    return max((own[layer].keys for own in before.values()), key=len)


def _apply(before: Layers, layers: Layers, layer: int, plan: HeadPlan) -> LayerHeads:
    in_file = _keys_in_file(before, layer)
    now = tuple(in_file[place] for place in plan.key_heads)
    reads: dict[str, tuple[int, ...]] = {}
    for component, own in layers.items():
        places = plan.reads.get(component)
        reads[component] = () if places is None else tuple(now[place] for place in places)
        if places is not None:
            own[layer] = replace(own[layer], keys=now, reads=reads[component])
    return LayerHeads(keys=now, reads=reads)


def _has_part(source: Checkpoint, component: str, part: str) -> bool:
    """Tells whether any layer of the file has the part."""
    if part == "FFN":
        return bool(source.ffns.get(component))
    last = keys.attention_modules(component)[1]
    return any(key.endswith(f"{last}.weight") for key in source.specs)


def _check_dtype(source: Checkpoint, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(
            f"{source.directory}: FFN dtype must be one of {', '.join(map(str, _DTYPES))}, "
            f"got {dtype}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """What stays of an attention; everything ascends.

    Attributes:
        key_heads: key heads that stay, of those before.
        query_groups: `{component: groups that stay, of its groups before}`.
        reads: `{component: the key head each of its groups reads}`, of those that stay.
    """

    key_heads: tuple[int, ...]
    query_groups: Mapping[str, tuple[int, ...]]
    reads: Mapping[str, tuple[int, ...]]


def plan_heads(reads: Mapping[str, Sequence[int]], kept: Mapping[str, Sequence[int]]) -> HeadPlan:
    """Plans which heads stay.

    Args:
        reads: `{component: the key head each of its groups reads}`, of those with an attention.
        kept: `{component: which of its groups stay}`; those not named keep all.
    """
    groups = {name: tuple(kept.get(name, range(len(heads)))) for name, heads in reads.items()}
    still = {name: [reads[name][group] for group in own] for name, own in groups.items()}
    key_heads = sorted({head for heads in still.values() for head in heads})
    return HeadPlan(
        key_heads=tuple(key_heads),
        query_groups=groups,
        reads={name: tuple(map(key_heads.index, heads)) for name, heads in still.items()},
    )


def check_experts(layout: ExpertLayout, *, budget: Budget, block_size: int, where: str) -> None:
    """Raises ValueError unless experts can be made narrower as is asked for."""
    widths = [width for width in (layout.shared_width, layout.expert_width) if width]
    if any(width % block_size for width in widths):
        raise ValueError(
            f"{where}: block_size must divide the {' and '.join(map(str, widths))} neurons of an "
            f"expert, got {block_size}"
        )
    if budget is not Budget.UNIFORM:
        raise ValueError(
            f"{where}: budget must be 'uniform' for sparse FFNs, whose experts have one width, "
            f"got {budget.value!r}"
        )
