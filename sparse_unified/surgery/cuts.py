# SPDX-License-Identifier: Apache-2.0
"""What pruning takes from a model, planned once, by official key.

    cuts, shapes_left = plan(config, shapes, sizes, scores)  # {key: Cut(dim, keep) or GONE}

The planner sees scores and sizes, no weights. `convert.prune` carries a plan out on the tensors of
files, `surgery.prune` on the modules of a live model, `verify` compares with it. A key that is not
named stays whole. Several plans are made one after the other, each for what the last one left:

    more, shapes_left = plan(config2, shapes_left, sizes_left(sizes, cuts), scores)
    cuts = then(cuts, more)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import naming
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import LayerShape, LayerShapes, ffn_parts
from sparse_unified.checkpoint.modes import (
    BOTH,
    Part,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.keep import Budget, joint_scores, keep_units
from sparse_unified.experts.layout import keep_in_experts

PruneConfig = PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What stays of one tensor: the indices `keep` [n] int64, ascending, of dimension `dim`."""

    dim: int
    keep: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Returns what stays of a tensor, a copy, bit for bit."""
        return tensor.index_select(self.dim, self.keep.to(tensor.device))


GONE = Cut(0, torch.empty(0, dtype=torch.int64))  # nothing stays, the key neither

Cuts = dict[str, Cut]
Sizes = Mapping[str, Sequence[int]]  # key -> shape of its tensor
Scores = Callable[[str, int], Tensor]  # (component, layer) -> [I] in expert order, or [groups]


def plan(
    config: PruneConfig, shapes: LayerShapes, sizes: Sizes, scores: Scores | None = None
) -> tuple[Cuts, dict[str, dict[int, LayerShape]]]:
    """Plans one step of pruning.

    Args:
        config: what is asked for; its `layers` are not looked at.
        shapes: of the layers to prune. Heads need all components that have the attention.
        sizes: the shape of every tensor of these layers.
        scores: checked, of neurons or groups of heads; not needed to skip layers.

    Returns:
        what stays of each tensor that is pruned, also where all of it does, and the shapes then.

    Raises:
        ValueError: block_size or budget do not suit an FFN, or a component has no queries for some
            KV heads where both are to lose the same.
    """
    left = {component: dict(own) for component, own in shapes.items()}
    if isinstance(config, SkipLayersConfig):
        gone: dict[str, Any] = {"ffn": 0} if Part.FFN in config.parts else {}
        if Part.ATTENTION in config.parts:
            gone |= {"kv_heads": (), "query_groups": ()}
        own = left[config.component]
        modules = skipped_modules(config)
        starts = tuple(prefix for layer in own for prefix in keys.module_prefixes(layer, modules))
        own |= {layer: replace(shape, **gone) for layer, shape in own.items()}
        return {key: GONE for key in sizes if key.startswith(starts)}, left
    assert scores is not None
    if isinstance(config, PruneHeadsConfig):
        return _drop_heads(config, shapes, sizes, scores, left), left
    component, own = config.component, left[config.component]
    kept = keep_neurons(config, own, {layer: scores(component, layer) for layer in own})
    cuts: Cuts = {}
    for layer, shape in own.items():
        for prefix, (start, stop) in ffn_parts(shape.ffn).items():
            inside = (kept[layer] >= start) & (kept[layer] < stop)
            for name in keys.PROJECTIONS:
                key = f"{keys.ffn_prefix(component, layer)}{prefix}{name}.weight"
                cuts[key] = Cut(1 if name == "down_proj" else 0, kept[layer][inside] - start)
        is_dense, index = isinstance(shape.ffn, int), kept[layer]
        own[layer] = replace(shape, ffn=len(index) if is_dense else narrowed(shape.ffn, index))
    return cuts, left


def narrowed(layout: Any, kept: Tensor) -> ExpertLayout:
    """Returns the widths of experts of which neurons `kept` [kept] stay."""
    shared = int((kept < layout.shared_width).sum())
    return replace(layout, intermediate_size=len(kept), shared_intermediate_size=shared)


def keep_neurons(
    config: PruneWidthConfig, shapes: Mapping[int, LayerShape], ranking: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Returns the neurons of each layer that stay, [kept] int64, ascending, in expert order.

    Raises:
        ValueError: block_size or budget do not suit an FFN.
    """
    ratio, size = config.keep_ratio, config.block_size
    dense = {}
    for layer, shape in shapes.items():
        with naming(f"{config.component} layer {layer}"):
            if isinstance(shape.ffn, int):
                dense[layer] = ranking[layer]
                widths, each = [shape.ffn], "neurons"
            else:
                each = "neurons of an expert"
                widths = [w for w in (shape.ffn.shared_width, shape.ffn.expert_width) if w]
                if config.budget is not Budget.UNIFORM:
                    raise ValueError(
                        "budget must be 'uniform' for sparse FFNs, whose experts have one width, "
                        f"got {config.budget.value!r}"
                    )
            if any(width % size for width in widths):
                listed = " and ".join(map(str, widths))
                raise ValueError(f"block_size must divide the {listed} {each}, got {size}")
    kept = keep_units(dense, keep_ratio=ratio, budget=config.budget, block_size=size)
    for layer, shape in shapes.items():
        if isinstance(shape.ffn, ExpertLayout):
            values = ranking[layer]
            kept[layer] = keep_in_experts(values, shape.ffn, keep_ratio=ratio, block_size=size)
    return kept


def _drop_heads(
    config: PruneHeadsConfig,
    shapes: LayerShapes,
    sizes: Sizes,
    scores: Scores,
    left: dict[str, dict[int, LayerShape]],
) -> Cuts:
    ranking = {}
    for layer in shapes[config.components[0]]:
        values = []
        for component in config.components:
            shape = shapes[component][layer]
            if config.component == BOTH and shape.query_groups != shape.kv_heads:
                raise ValueError(
                    f"{component} layer {layer}: component 'both' must have queries for all "
                    f"{len(shape.kv_heads)} KV heads, got {len(shape.query_groups)} groups"
                )
            values.append(scores(component, layer))
        ranking[layer] = joint_scores(values) if config.component == BOTH else values[0]
    kept = keep_units(ranking, keep_ratio=config.keep_ratio, budget=config.budget)
    cuts: Cuts = {}
    for layer, index in kept.items():
        own = {c: at[layer] for c, at in left.items() if layer in at and at[layer].has_attention}
        cuts |= _cut_heads(layer, own, sizes, dict.fromkeys(config.components, index))
        for component, shape in own.items():
            left[component][layer] = shape
    return cuts


def _cut_heads(
    layer: int, shapes: dict[str, LayerShape], sizes: Sizes, kept: Mapping[str, Tensor]
) -> Cuts:
    """Cuts the groups of query heads that are not kept, and KV heads that nothing reads then.

    The components share the KV heads of a layer: those of a group go once no component reads them;
    until then the component that dropped the group merely stops reading them. `shapes` become
    those that are left.
    """
    groups = {c: kept.get(c, torch.arange(len(shape.query_groups))) for c, shape in shapes.items()}
    places = {c: torch.tensor(shape.query_places)[groups[c]] for c, shape in shapes.items()}
    kv_places = torch.cat([*places.values()]).unique()  # sorted
    cuts: Cuts = {}
    for component, shape in shapes.items():
        if component not in kept and len(kv_places) == len(shape.kv_heads):
            continue
        for name in keys.ATTENTION_PROJECTIONS:
            module = keys.attention_module(component, layer, name)
            reads_groups = name in ("q_proj", "o_proj")
            units = groups[component] if reads_groups else kv_places
            count = len(shape.query_groups) if reads_groups else len(shape.kv_heads)
            dim = 1 if name == "o_proj" else 0
            cut = Cut(dim, spread(units, sizes[f"{module}.weight"][dim] // count))
            cuts[f"{module}.weight"] = cut
            if dim == 0 and f"{module}.bias" in sizes:
                cuts[f"{module}.bias"] = cut
        shapes[component] = replace(
            shape,
            kv_heads=tuple(shape.kv_heads[i] for i in kv_places.tolist()),
            query_groups=tuple(shape.query_groups[i] for i in groups[component].tolist()),
        )
    return cuts


def spread(units: Tensor, width: int) -> Tensor:
    """Returns the channels [units * width] of the given heads or groups."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def skipped_modules(config: SkipLayersConfig) -> list[str]:
    """Returns the modules of a decoder layer that are skipped."""
    of = {Part.ATTENTION: keys.attention_modules, Part.FFN: keys.ffn_modules}
    return [
        name
        for part, names in of.items()
        if part in config.parts
        for name in names(config.component)
    ]


def then(cuts: Cuts, more: Cuts) -> Cuts:
    """Returns the cuts that do at once what `cuts` and then `more` do."""
    joined = cuts | more
    for key, cut in more.items():
        first = cuts.get(key)
        if first is not None and cut is not GONE:
            joined[key] = Cut(cut.dim, first.keep[cut.keep])
    return joined


def sizes_left(sizes: Sizes, cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that cuts leave."""
    left = {}
    for key, size in sizes.items():
        cut = cuts.get(key)
        if cut is None:
            left[key] = tuple(size)
        elif cut is not GONE:
            left[key] = (*size[: cut.dim], len(cut.keep), *size[cut.dim + 1 :])
    return left
