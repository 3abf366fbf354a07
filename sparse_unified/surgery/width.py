# SPDX-License-Identifier: Apache-2.0
"""prune_width_: narrower FFNs into a live model."""

from __future__ import annotations

import torch

from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import PruneWidthConfig
from sparse_unified.experts import check_experts, keep_in_experts, keep_units
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.blocks import narrow_block, narrow_ffn
from sparse_unified.surgery.counts import count_component
from sparse_unified.surgery.exchange import all_or_nothing, next_order, put_in
from sparse_unified.surgery.find import Target, find_host, read_dense, select_held
from sparse_unified.surgery.probe import returns_tuple
from sparse_unified.surgery.report import PruneReport, part_entries
from sparse_unified.surgery.scores import Scores, by_layer, of_component
from sparse_unified.surgery.transforms import neuron_scores, require_distinct
from sparse_unified.surgery.weights import DenseWeights


@torch.no_grad()
def prune_width_(
    model: object,
    config: PruneWidthConfig,
    scores: Scores | None = None,
    *,
    keep_dense: bool = True,
) -> PruneReport:
    """Leaves the neurons with the highest scores in the FFNs of one component, in place.

    The three weights of a FFN become shorter and keep the order of their neurons; what is pruned
    takes neither memory nor time. FFNs are found as in `apply_moe_` and keep the same things of
    their surroundings; `apply_moe_` takes the result. See `keep_units` for what a budget means.

    A sparse FFN is pruned inside: every routed expert keeps as many neurons, see `keep_in_experts`,
    and the routers stay as they are. Its scores are in expert order, the shared expert first.

    Args:
        model: a module or pipeline.
        config: how much of which FFNs stays.
        scores: importance of each neuron, float `{layer: [I]}`, a tensor [num_layers, I], or a
            mapping of components to either. Without scores, neurons are ranked by weight magnitude.
        keep_dense: keep the replaced modules for `restore_`, in memory where they are.

    Returns:
        what was changed, and what the component costs before and after.

    Raises:
        ValueError: nothing matches, a selected layer is neither a plain dense SwiGLU nor a
            SparseMoE, or layers, budget, block_size or scores do not fit; the message names the
            layer. The model is as before.
        TypeError: config is no PruneWidthConfig, or scores are no tensors.
    """
    where = "prune_width_"
    if not isinstance(config, PruneWidthConfig):
        raise TypeError(f"{where}: config must be a PruneWidthConfig, got {type(config).__name__}")
    host = find_host(model, where=where, component=config.component)
    component, num_layers = config.component, len(host.layers)
    selected = select_held(host, config.layers, [FFN_NAMES[component]], where=where)
    own = of_component(scores, component, where=where)
    given = by_layer(own, selected, num_layers, where=where)
    targets = [host.target(layer, component, where=where) for layer in selected]
    require_distinct(targets, where=where)
    ranking = {}
    for target in targets:
        values = None if given is None else given[target.layer]
        at = target.describe(where)
        ranking[target.layer] = neuron_scores(_read(target, config, where), values, at)
    kept = keep_units(
        {t.layer: ranking[t.layer] for t in targets if not isinstance(t.ffn, SparseMoE)},
        keep_ratio=config.keep_ratio,
        budget=config.budget,
        block_size=config.block_size,
    )
    changes = []
    for target in targets:
        if isinstance(target.ffn, SparseMoE):
            index, layout = keep_in_experts(
                ranking[target.layer],
                target.ffn.layout,
                keep_ratio=config.keep_ratio,
                block_size=config.block_size,
            )
            narrow = narrow_block(target.ffn, index, layout)
        else:
            dense = read_dense(target, where=where)
            is_tuple = returns_tuple(target, dense, where=where)
            narrow = narrow_ffn(target.ffn, dense, kept[target.layer], returns_tuple=is_tuple)
        changes.append((target.layer, target.change(narrow)))
    before = count_component(host, component)
    order = next_order(host.layers)
    with all_or_nothing([change for _, change in changes]):
        for _, change in changes:
            put_in(change, order=order, keep=keep_dense)
        return PruneReport(
            action=where,
            parts=tuple(part_entries(changes)),
            before=before,
            after=count_component(host, component),
        )


def _read(target: Target, config: PruneWidthConfig, where: str) -> DenseWeights:
    """Returns the weights of a FFN, of a sparse one in expert order.

    Raises:
        ValueError: the FFN is of another kind, or its width does not suit the config.
    """
    at, ffn = target.describe(where), target.ffn
    if not isinstance(ffn, SparseMoE):
        weights = read_dense(target, where=where)
        width = weights.gate_proj.shape[0]
        if width % config.block_size:
            raise ValueError(
                f"{at}: block_size must divide the {width} neurons, got {config.block_size}"
            )
        return weights
    check_experts(ffn.layout, budget=config.budget, block_size=config.block_size, where=at)
    if ffn.gate_proj.is_meta and hasattr(ffn, "_hf_hook"):
        raise ValueError(f"{at}: weights must be in memory, got weights offloaded by accelerate")
    return DenseWeights(ffn.gate_proj.detach(), ffn.up_proj.detach(), ffn.down_proj.detach())
