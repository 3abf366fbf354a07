# SPDX-License-Identifier: Apache-2.0
"""skip_layers_: the tokens of one component pass by a layer, its attention or its FFN."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sparse_unified.checkpoint.keys import attention_modules, ffn_modules
from sparse_unified.checkpoint.modes import Part, SkipLayersConfig
from sparse_unified.experts import select_layers
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.counts import count_component
from sparse_unified.surgery.exchange import Change, all_or_nothing, next_order, put_in
from sparse_unified.surgery.find import Host, find_host, read_dense, takes_absent_parts
from sparse_unified.surgery.probe import returns_tuple
from sparse_unified.surgery.report import PruneReport, part_entries
from sparse_unified.surgery.skipped import SkippedFFN


@torch.no_grad()
def skip_layers_(
    model: object, config: SkipLayersConfig, *, keep_dense: bool = True
) -> PruneReport:
    """Takes layers, or their attention or FFN, away from the tokens of one component, in place.

    The tokens pass by on the residual, and nothing of the part runs for them, its norm included;
    the other component's tokens run as before. Where an attention is skipped, the component's
    tokens do not ask and are not seen: they have no keys and values in that layer, so contexts
    hold fewer there, and with `gen` left alone its tokens see their own image and earlier ones.
    Positions do not change. Layers keep their numbers.

    A FFN can be skipped in every model that `apply_moe_` takes, an attention in ours.

    Args:
        model: a module or pipeline.
        config: which parts of which layers.
        keep_dense: keep the modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the component costs before and after.

    Raises:
        ValueError: nothing matches, a layer does not exist, has nothing of this kind left, or
            cannot do without its attention. The model is as before.
        TypeError: config is no SkipLayersConfig.
    """
    where = "skip_layers_"
    if not isinstance(config, SkipLayersConfig):
        raise TypeError(f"{where}: config must be a SkipLayersConfig, got {type(config).__name__}")
    host = find_host(model, where=where, component=config.component)
    selected = select_layers(config.layers, len(host.layers))
    changes: list[tuple[int, Change]] = []
    for layer in selected:
        found = [
            change
            for part in config.parts
            for change in _changes(host, layer, config.component, part, where)
        ]
        if not found and config.layers not in ("all", "middle"):
            raise ValueError(
                f"{where}: layer {layer} ({host.path}.{layer}): {config.component} "
                f"{config.part.value} must not be skipped already, got none"
            )
        changes += [(layer, change) for change in found]
    if not changes:
        raise ValueError(
            f"{where}: layers must have a {config.component} {config.part.value} left, "
            f"got {config.layers!r}, which all skip it"
        )
    before = count_component(host, config.component)
    order = next_order(host.layers)
    with all_or_nothing([change for _, change in changes]):
        for _, change in changes:
            put_in(change, order=order, keep=keep_dense)
        return PruneReport(
            action=where,
            parts=tuple(part_entries(changes)),
            before=before,
            after=count_component(host, config.component),
        )


def _changes(host: Host, layer: int, component: str, part: Part, where: str) -> Iterator[Change]:
    """Yields the exchanges that take one part out of a layer; none when it is gone already."""
    absent_ok = takes_absent_parts(host.layers[layer])
    if part is Part.ATTENTION and not absent_ok:
        raise ValueError(
            f"{where}: layer {layer} ({host.path}.{layer}): attention must be one that a component "
            f"can do without, as in sparse_unified.bagel, got a {type(host.layers[layer]).__name__}"
            ", which runs it for both components at once; part 'ffn' can be skipped in it"
        )
    if part is Part.FFN and not absent_ok:
        target = host.target(layer, component, where=where)
        if not isinstance(target.ffn, SkippedFFN):
            yield target.change(_stand_in(host, layer, component, where))
        return
    names = attention_modules(component) if part is Part.ATTENTION else ffn_modules(component)
    for name in names:
        place = host.place(layer, name)
        if place is None:
            raise ValueError(
                f"{where}: layer {layer} ({host.path}.{layer}.{name}): {name} must be a module of "
                f"the layer, got none"
            )
        if place.module is not None:
            yield Change(owner=place.owner, name=place.name, old=place.module, new=None)


def _stand_in(host: Host, layer: int, component: str, where: str) -> nn.Module:
    """Returns what stands where a layer of another make calls its FFN whatever happens."""
    target = host.target(layer, component, where=where)
    ffn = target.ffn
    if isinstance(ffn, SparseMoE):
        stand_in = SkippedFFN(ffn.gate_proj, returns_tuple=ffn.return_router_logits)
    else:
        weights = read_dense(target, where=where)
        is_tuple = returns_tuple(target, weights, where=where)
        stand_in = SkippedFFN(weights.gate_proj, returns_tuple=is_tuple)
    return stand_in.train(ffn.training)
