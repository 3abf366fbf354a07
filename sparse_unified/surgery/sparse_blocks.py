# SPDX-License-Identifier: Apache-2.0
"""The sparse blocks that a live model holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparse_unified._common import list_some
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.find import find_host


class SparseBlock(NamedTuple):
    """A sparse FFN and where it stands."""

    component: str
    layer: int
    module: SparseMoE


def find_sparse_blocks(
    model: object, components: Sequence[str] | None = None, *, where: str
) -> list[SparseBlock]:
    """Returns the sparse FFNs of a model or pipeline, component by component.

    Args:
        components: of which; None is all.
        where: start of messages.

    Raises:
        ValueError: no decoder layers are found, a component is unknown, or none is sparse.
    """
    wanted = tuple(FFN_NAMES) if components is None else tuple(components)
    if not wanted or not set(wanted) <= set(FFN_NAMES):
        raise ValueError(
            f"{where}: components must be of {', '.join(FFN_NAMES)}, got {list_some(wanted)}"
        )
    host = find_host(model, where=where)
    blocks = []
    for component in wanted:
        for layer in range(len(host.layers)):
            place = host.place(layer, FFN_NAMES[component])
            if place is not None and isinstance(place.module, SparseMoE):
                blocks.append(SparseBlock(component, layer, place.module))
    if not blocks:
        raise ValueError(
            f"{where}: model must have sparse FFNs of {' or '.join(wanted)}, got none among the "
            f"{len(host.layers)} layers under {host.path}; convert or apply_moe_ make them"
        )
    return blocks
