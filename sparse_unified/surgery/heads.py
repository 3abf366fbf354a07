# SPDX-License-Identifier: Apache-2.0
"""prune_heads_: groups of attention heads out of a live model.

A group is a key head with the query heads that read it. The components of a layer share the key
heads, see `sparse_unified.experts.heads` for which of them stay and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.checkpoint.counts import Counts
from sparse_unified.checkpoint.keys import ATTENTION_PROJECTIONS, SUFFIXES
from sparse_unified.checkpoint.modes import BOTH, PruneHeadsConfig
from sparse_unified.experts import (
    HeadPlan,
    check_scores,
    head_magnitude_scores,
    joint_scores,
    keep_units,
    plan_heads,
)
from sparse_unified.nn import QueryProjection, key_heads_read
from sparse_unified.surgery.counts import count_component
from sparse_unified.surgery.exchange import Change, all_or_nothing, next_order, put_in
from sparse_unified.surgery.find import Host, find_host, select_held, takes_absent_parts
from sparse_unified.surgery.report import PruneReport, part_entries
from sparse_unified.surgery.scores import Scores, by_layer, of_component

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """The attention of one layer: projections by component and name, and its sizes.

    Attributes:
        reads: `{component: the key head each of its groups reads}`, of those with an attention.
    """

    layer: int
    path: str
    projections: Mapping[str, Mapping[str, nn.Linear]]
    owner: nn.Module
    head_dim: int
    num_key_heads: int
    reads: Mapping[str, tuple[int, ...]]


@torch.no_grad()
def prune_heads_(
    model: object,
    config: PruneHeadsConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> PruneReport:
    """Leaves the groups of attention heads with the highest scores of one component, in place.

    The query rows of a group go, with its columns of the output projection: for the component's
    tokens this is the layer with those columns at zero. Und and gen tokens see each other through
    the same key heads, so the keys and values of a group go, for both, once neither component has
    queries for it; until then they stay for the other. With `component="both"` the groups are the
    same and their keys and values go at once. What stays keeps its order.

    Args:
        model: a module or pipeline with an attention of `sparse_unified.bagel`.
        config: how much of which attentions stays.
        scores: importance of each group, float `{layer: [G]}`, a tensor [num_layers, G], or a
            mapping of components to either; G counts the groups that the component still has. For
            "both", the scores of each component are divided by their mean and added. Without
            scores, groups are ranked by the weights of values and output.
        keep_dense: keep the replaced modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the components of the changed layers cost before and after.

    Raises:
        ValueError: nothing matches, a selected layer lacks the attention, weights are no plain
            ones, or scores do not fit; the message names the layer. The model is as before.
        TypeError: config is no PruneHeadsConfig, or scores are no tensors.
    """
    where = "prune_heads_"
    if not isinstance(config, PruneHeadsConfig):
        raise TypeError(f"{where}: config must be a PruneHeadsConfig, got {type(config).__name__}")
    host = find_host(model, where=where)
    names = [f"self_attn.q_proj{SUFFIXES[component]}" for component in config.components]
    selected = select_held(host, config.layers, names, where=where)
    attentions = [_read_attention(host, layer, where) for layer in selected]
    ranking = _ranking(config, scores, attentions, len(host.layers), where)
    kept = keep_units(ranking, keep_ratio=config.keep_ratio, budget=config.budget)
    changes: list[tuple[int, Change]] = []
    for attention in attentions:
        own_kept = {component: kept[attention.layer].tolist() for component in config.components}
        plan = plan_heads(attention.reads, own_kept)
        own = _changes(attention, plan, config.components)
        changes += [(attention.layer, change) for change in own]
    before = _count(host)
    order = next_order(host.layers)
    with all_or_nothing([change for _, change in changes]):
        for _, change in changes:
            put_in(change, order=order, keep=keep_dense)
        return PruneReport(
            action=where, parts=tuple(part_entries(changes)), before=before, after=_count(host)
        )


def _count(host: Host) -> Counts:
    return count_component(host, "und") + count_component(host, "gen")


def _read_attention(host: Host, layer: int, where: str) -> _Attention:
    at = f"{where}: layer {layer} ({host.path}.{layer}.self_attn)"
    if not takes_absent_parts(host.layers[layer]):
        raise ValueError(
            f"{at}: attention must be one whose weights tell its heads, as in "
            f"sparse_unified.bagel, got that of a {type(host.layers[layer]).__name__}"
            ", which packs the heads of both components into one tensor of fixed size"
        )
    projections: dict[str, dict[str, nn.Linear]] = {}
    owner: nn.Module | None = None
    for component, suffix in SUFFIXES.items():
        found: dict[str, nn.Linear] = {}
        for name in ATTENTION_PROJECTIONS:
            place = host.place(layer, f"self_attn.{name}{suffix}")
            if place is not None and place.module is not None:
                found[name] = _plain_linear(place.module, f"{at}: {name}{suffix}")
                owner = place.owner
        if found:
            projections[component] = found
    if owner is None:
        raise ValueError(f"{at}: attention must have projections, got none")
    head_dim = int(owner.head_dim)  # type: ignore[arg-type]
    num_key_heads = next(iter(projections.values()))["k_proj"].out_features // head_dim
    return _Attention(
        layer=layer,
        path=f"{host.path}.{layer}.self_attn",
        projections=projections,
        owner=owner,
        head_dim=head_dim,
        num_key_heads=num_key_heads,
        reads={
            component: key_heads_read(found["q_proj"], num_key_heads)
            for component, found in projections.items()
        },
    )


def _plain_linear(module: nn.Module, at: str) -> nn.Linear:
    weight = getattr(module, "weight", None)
    got = type(module).__name__
    if isinstance(module, nn.Linear) and type(weight) in (nn.Parameter, Tensor):
        if module.weight.dtype in _DTYPES:
            if module.weight.is_meta and hasattr(module, "_hf_hook"):
                raise ValueError(f"{at} must be in memory, got weights offloaded by accelerate")
            others = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
            if not others:
                return module
            got = f"{got} with {others[0]}"
        else:
            got = str(module.weight.dtype)
    raise ValueError(
        f"{at} must be a linear layer of plain float32, bfloat16 or float16 weights and nothing "
        f"else, got {got}"
    )


def _ranking(
    config: PruneHeadsConfig,
    scores: Scores | None,
    attentions: list[_Attention],
    num_layers: int,
    where: str,
) -> dict[int, Tensor]:
    """Returns the scores [G] of each layer's groups."""
    selected = [attention.layer for attention in attentions]
    ranking: dict[int, list[Tensor]] = {layer: [] for layer in selected}
    for component in config.components:
        own = of_component(scores, component, where=where)
        given = by_layer(own, selected, num_layers, where=where)
        for attention in attentions:
            at = f"{where}: layer {attention.layer} ({attention.path}), {component}"
            groups = len(attention.reads[component])
            if config.component == BOTH and groups != attention.num_key_heads:
                raise ValueError(
                    f"{at}: component 'both' must have queries for all {attention.num_key_heads} "
                    f"key heads, got {groups} groups"
                )
            values = _magnitudes(attention, component, at) if given is None else None
            values = given[attention.layer] if values is None and given is not None else values
            assert values is not None
            check_scores(values, groups, where=at)
            ranking[attention.layer].append(values)
    return {
        layer: joint_scores(values) if config.component == BOTH else values[0]
        for layer, values in ranking.items()
    }


def _magnitudes(attention: _Attention, component: str, at: str) -> Tensor:
    found, heads = attention.projections[component], attention.reads[component]
    if found["v_proj"].weight.is_meta:
        raise ValueError(f"{at}: scores must be given for weights without data, got meta tensors")
    values = found["v_proj"].weight.unflatten(0, (-1, attention.head_dim))
    output = found["o_proj"].weight.unflatten(1, (len(heads), -1))
    return head_magnitude_scores(values[list(heads)], output)


def _changes(attention: _Attention, plan: HeadPlan, pruned: Sequence[str]) -> list[Change]:
    changes: list[Change] = []
    keys_stay = len(plan.key_heads) == attention.num_key_heads
    for component, found in attention.projections.items():
        if keys_stay and component not in pruned:
            continue
        width = found["q_proj"].out_features // len(attention.reads[component])
        queries = _spread(plan.query_groups[component], width)
        keys = _spread(plan.key_heads, attention.head_dim)
        reads = plan.reads[component]
        for name, index, dim in (
            ("q_proj", queries, 0),
            ("k_proj", keys, 0),
            ("v_proj", keys, 0),
            ("o_proj", queries, 1),
        ):
            key_heads = reads if name == "q_proj" and len(reads) < len(plan.key_heads) else None
            change = Change(
                owner=attention.owner,
                name=f"{name}{SUFFIXES[component]}",
                old=found[name],
                new=_narrow_linear(found[name], index, dim, key_heads),
            )
            changes.append(change)
    return changes


def _spread(units: tuple[int, ...], width: int) -> Tensor:
    """Returns the channels [units * width] of the given heads or groups."""
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _narrow_linear(
    linear: nn.Linear, index: Tensor, dim: int, key_heads: tuple[int, ...] | None
) -> nn.Linear:
    """Returns a linear layer of some of the outputs (dim 0) or inputs (dim 1), bit for bit."""
    weight, bias = linear.weight, linear.bias
    shape = list(weight.shape)
    shape[dim] = len(index)
    factory: Any = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if key_heads is None:
        narrow = nn.Linear(shape[1], shape[0], **factory)
    else:
        narrow = QueryProjection(shape[1], shape[0], key_heads=key_heads, **factory)
    narrow.to_empty(device=weight.device)
    index = index.to(weight.device)
    narrow.weight.copy_(weight.index_select(dim, index))
    narrow.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        narrow.bias.copy_(bias.index_select(0, index) if dim == 0 else bias)
        narrow.bias.requires_grad_(bias.requires_grad)
    return narrow.train(linear.training)
