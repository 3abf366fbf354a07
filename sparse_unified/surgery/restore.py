# SPDX-License-Identifier: Apache-2.0
"""restore_: undoes swaps and prunings, the latest or all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_unified.checkpoint.keys import COMPONENT_OF_FFN
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.exchange import (
    Change,
    Place,
    all_or_nothing,
    below,
    find_replaced,
    follow,
    is_unmoved_meta,
    put_back,
)
from sparse_unified.surgery.find import Target, find_host
from sparse_unified.surgery.report import (
    PrunedPart,
    SwappedLayer,
    SwapReport,
    describe,
    part_entries,
)


@torch.no_grad()
def restore_(model: object, *, latest: bool = False) -> SwapReport:
    """Puts back everything that swaps and prunings of a live model replaced or took out.

    The modules are the very same objects, their weights bit for bit those of the moment they were
    replaced, whatever the blocks have learned since. Hooks go back, those added since included. If
    the model has changed mode, device or dtype in the meantime, they follow.

    Args:
        model: a module or pipeline.
        latest: undo the last transform alone, and leave those before it.

    Raises:
        ValueError: nothing of the model was replaced.
        RuntimeError: something was replaced with keep_dense=False, or kept on the meta device
            while the model got its weights; the model is as before.
    """
    where = "restore_"
    host = find_host(model, where=where)
    found = [
        (layer, place)
        for layer, module in enumerate(host.layers)
        for place in find_replaced(module, f"{host.path}.{layer}")
    ]
    if not found:
        raise ValueError(
            f"{where}: model must have FFNs replaced by apply_moe_ or load_moe_, or parts pruned, "
            f"got none among the {len(host.layers)} layers under {host.path}"
        )
    last = max(place.state.order for _, place in found)
    places = [
        (layer, level)
        for layer, place in found
        for level in _levels(place)
        if not latest or level.state.order == last
    ]
    for layer, place in places:
        at = f"{where}: layer {layer} ({place.path})"
        if place.state.module is None:
            raise RuntimeError(
                f"{at}: dense FFN must have been kept, got keep_dense=False at the swap"
            )
        if is_unmoved_meta(place):
            raise RuntimeError(f"{at}: kept weights must hold data, got meta tensors")
    for _, place in places:
        follow(place)
    entries: list[SwappedLayer] = []
    parts: list[PrunedPart] = []
    changes = [
        Change(owner=place.owner, name=place.name, old=place.now, new=place.state.module)
        for _, place in places
    ]
    pruned: dict[int, list[tuple[int, Change]]] = {}
    with all_or_nothing(changes):
        for (layer, place), change in zip(places, changes, strict=True):
            put_back(place)
            was_sparse = isinstance(place.state.module, SparseMoE)
            if isinstance(place.now, SparseMoE) and not was_sparse:
                entries.append(_restored(layer, place, place.now))
            else:
                pruned.setdefault(place.state.order, []).append((layer, change))
    for order in sorted(pruned, reverse=True):
        parts += part_entries(pruned[order])
    return SwapReport(action=where, layers=tuple(entries), parts=tuple(parts))


def _levels(place: Place) -> Iterator[Place]:
    """Yields a place, and what it looks like each time something is put back into it."""
    level: Place | None = place
    while level is not None:
        yield level
        level = below(level)


def _restored(layer: int, place: Place, block: SparseMoE) -> SwappedLayer:
    dense = place.state.module
    assert dense is not None
    target = Target(
        layer=layer,
        component=COMPONENT_OF_FFN[place.name],
        path=place.path,
        owner=place.owner,
        name=place.name,
        ffn=block,
    )
    names = (type(block).__name__, type(dense).__name__)
    return describe(target, block, before=names[0], after=names[1], restored=True)
