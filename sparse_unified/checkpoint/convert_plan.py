# SPDX-License-Identifier: Apache-2.0
"""Which FFNs of a dense checkpoint are split into experts, and into which ranges of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_unified._common import format_layers, list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.reader import Checkpoint
from sparse_unified.checkpoint.surroundings import require_surroundings
from sparse_unified.experts import ExpertLayout, select_layers

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def plan_layouts(
    source: Checkpoint,
    num_experts: int,
    top_k: int,
    num_shared_experts: int,
    layers: str | Sequence[int],
    component: str,
    *,
    what: str,
) -> dict[int, ExpertLayout]:
    """Returns the neuron ranges of each layer that is to be split, ascending.

    Arguments are those of `convert`; what: start of messages.

    Raises:
        ValueError: they do not fit the checkpoint, or it is not one to be converted.
    """
    if component not in keys.FFN_NAMES:
        raise ValueError(f"{what}: component must be gen or und, got {component!r:.120}")
    require_surroundings(source)
    ffns = source.ffns.get(component, {})
    if not ffns:
        raise ValueError(
            f"{source.directory}: keys must hold {component} FFNs "
            f"({keys.dense_key(component, 0, 'gate_proj')} and so on), got none"
        )
    moe = source.moe
    if moe is not None and component in moe.layers:
        raise ValueError(
            f"{source.directory}: {component} FFNs must all be dense, got sparse layers "
            f"{format_layers(list(moe.layers[component]))}; invert gives the dense files back"
        )
    selected = select_layers(layers, source.num_layers)
    if layers in ("all", "middle"):
        selected = tuple(layer for layer in selected if layer in ffns) or selected
    skipped = [layer for layer in selected if layer not in ffns]
    if skipped:
        raise ValueError(
            f"{what}: layers must have a {component} FFN, got {list_some(skipped)}, which skip it"
        )
    dtypes = {ffns[layer].dtype for layer in selected} - set(_DTYPES)
    if dtypes:
        raise ValueError(
            f"{source.directory}: FFN dtype must be one of "
            f"{', '.join(map(str, _DTYPES))}, got {dtypes.pop()}"
        )
    layouts = {}
    for layer in selected:
        try:
            layouts[layer] = ExpertLayout(
                intermediate_size=ffns[layer].intermediate_size,
                num_experts=num_experts,
                num_shared_experts=num_shared_experts,
            )
        except ValueError as error:
            at = f"{component} layer {layer}: " if source.held is not None else ""
            raise ValueError(f"{at}{error}") from error
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{what}: top_k must be 1 to num_experts = {num_experts}, got {top_k!r:.120}"
        )
    # The config has one set of counts for both components.
    wanted = (num_experts, num_shared_experts, top_k)
    if moe is not None and (moe.num_experts, moe.num_shared_experts, moe.top_k) != wanted:
        raise ValueError(
            f"{what}: num_experts, num_shared_experts and top_k must be {moe.num_experts}, "
            f"{moe.num_shared_experts} and {moe.top_k} as in the component that is sparse "
            f"already, got {num_experts}, {num_shared_experts} and {top_k}"
        )
    return layouts
