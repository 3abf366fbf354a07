# SPDX-License-Identifier: Apache-2.0
"""apply_moe_, load_moe_, restore_: all is checked and built before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.ffn import list_some
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.nn import SparseMoE
from sparse_unified.partition import (
    ExpertLayout,
    as_scores,
    check_scores,
    magnitude_scores,
    select_layers,
    snake_partition,
)
from sparse_unified.swap.blocks import Plan, check_keys, loaded_block, permuted_block, refuse
from sparse_unified.swap.config import MoEConfig
from sparse_unified.swap.exchange import (
    all_or_nothing,
    dense_weight,
    follow,
    put_back,
    put_in,
    replaced_by,
)
from sparse_unified.swap.find import DenseWeights, find_host, read_dense
from sparse_unified.swap.probe import returns_tuple
from sparse_unified.swap.report import SwapReport, describe

Scores = Mapping[int, Tensor] | Tensor


@torch.no_grad()
def apply_moe_(
    model: object, config: MoEConfig, scores: Scores | None = None, *, keep_dense: bool = True
) -> SwapReport:
    """Replaces dense FFNs of a live model by sparse ones with the same weights, in place.

    FFNs are found by structure: decoder layers with `mlp` and `mlp_moe_gen`, each made of
    gate_proj, up_proj and down_proj, in our model, an official one, or a pipeline that holds one. A
    block keeps the replaced module's return convention, device, dtype, mode, requires_grad of each
    projection, hooks, and accelerate's patched forward. Neurons are permuted, nothing is rounded;
    routers start at zero, so that with top_k = num_experts the output is the dense one.

    What does not carry over: hooks on the projections inside an FFN, and optimisers, which hold
    the dense parameters and have to be made anew.

    Args:
        model: a module or pipeline.
        config: how many experts, in which FFNs.
        scores: importance of each neuron, float `{layer: [I]}` for exactly the selected layers, or
            a tensor [num_layers, I]. Without scores, neurons are ranked by weight magnitude.
        keep_dense: keep the replaced modules for `restore_`: their weights, as many bytes as the
            experts have, stay in memory where they are. Otherwise they are freed when the call
            returns; during the call both are there, so that an error can leave the model alone.

    Returns:
        what was changed, one entry per layer.

    Raises:
        ValueError: nothing matches, a selected layer is not a plain dense SwiGLU, or layers,
            counts or scores do not fit; the message names the layer. The model is as before.
        TypeError: config is no MoEConfig, or scores are no tensors.
    """
    where = "apply_moe_"
    if not isinstance(config, MoEConfig):
        raise TypeError(f"{where}: config must be a MoEConfig, got {type(config).__name__}")
    host = find_host(model, where=where)
    selected = select_layers(config.layers, len(host.layers))
    given = _by_layer(scores, selected, len(host.layers), where=where)
    plans, neuron_indices = [], []
    for layer in selected:
        target = host.target(layer, config.component, where=where)
        weights = read_dense(target, where=where)
        plan = Plan(
            target=target,
            weights=weights,
            layout=_layout(config, weights, target.describe(where)),
            top_k=config.top_k,
            return_router_logits=returns_tuple(target, weights, where=where),
        )
        ranking = _ranking(plan, None if given is None else given[layer], where=where)
        plans.append(plan)
        neuron_indices.append(snake_partition(ranking, plan.layout))
    _require_distinct(plans, where=where)
    blocks = [
        permuted_block(plan, index) for plan, index in zip(plans, neuron_indices, strict=True)
    ]
    return _exchange(where, plans, blocks, keep_dense=keep_dense)


@torch.no_grad()
def load_moe_(
    model: object, checkpoint: Checkpoint | str | os.PathLike[str], *, keep_dense: bool = True
) -> SwapReport:
    """Replaces dense FFNs of a live model by the sparse FFNs of a checkpoint, in place.

    The file says which layers of which components, how many experts and how wide; llm_config.json
    gives top_k and has to agree with the keys. Weights become the dtype and go to the device of
    the FFN they replace, one tensor at a time. All else is as in `apply_moe_`. Only sparse FFNs are
    loaded: a checkpoint whose attention was tuned too needs its other weights loaded as well.

    Args:
        model: a module or pipeline whose FFNs are dense.
        checkpoint: a sparse model directory.
        keep_dense: see `apply_moe_`.

    Raises:
        ValueError: the checkpoint is dense or damaged, nothing matches, a layer is not a plain
            dense SwiGLU, or file and model differ in layers, sizes, keys or shapes. The model is
            as before.
        RuntimeError: the file changes while it is read; the model is as before.
    """
    where = "load_moe_"
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    moe = checkpoint.moe
    if moe is None:
        raise ValueError(f"{checkpoint.directory}: checkpoint must be sparse, got a dense one")
    host = find_host(model, where=where)
    for component in moe.layers:
        num_layers = len(checkpoint.ffns[component])
        if num_layers != len(host.layers):
            raise ValueError(
                f"{where}: model must have {num_layers} layers as {checkpoint.directory} has, "
                f"got {len(host.layers)} under {host.path}"
            )
    plans, problems = [], []
    for component, layers in moe.layers.items():
        for layer in layers:
            target = host.target(layer, component, where=where)
            weights = read_dense(target, where=where)
            if weights.gate_proj.is_meta:
                raise ValueError(f"{target.describe(where)}: weights must be in memory, got meta")
            found = checkpoint.ffns[component][layer]
            shape = [found.intermediate_size, found.hidden_size]
            if shape != list(weights.gate_proj.shape):
                problems.append(
                    f"layer {layer} ({target.path}) [I, D] = {shape} in the file, "
                    f"{list(weights.gate_proj.shape)} in the model"
                )
                continue
            plan = Plan(
                target=target,
                weights=weights,
                layout=moe.expert_layout(component, layer),
                top_k=moe.top_k,
                return_router_logits=returns_tuple(target, weights, where=where),
            )
            problems += check_keys(plan, checkpoint)
            plans.append(plan)
    refuse(f"{where}: {checkpoint.directory}", problems)
    _require_distinct(plans, where=where)
    blocks = [loaded_block(plan, checkpoint) for plan in plans]
    return _exchange(where, plans, blocks, keep_dense=keep_dense)


@torch.no_grad()
def restore_(model: object) -> SwapReport:
    """Puts back every dense FFN that `apply_moe_` or `load_moe_` replaced.

    The modules are the very same objects, their weights bit for bit those of the moment they were
    replaced, whatever the blocks have learned since. Hooks go back, those added since included. If
    the model has changed mode, device or dtype in the meantime, they follow.

    Raises:
        ValueError: no FFN of the model was replaced.
        RuntimeError: one was replaced with keep_dense=False, or kept on the meta device while the
            model got its weights; the model is as before.
    """
    where = "restore_"
    host = find_host(model, where=where)
    swapped = []
    for layer, module in enumerate(host.layers):
        for component, name in FFN_NAMES.items():
            block = getattr(module, name, None)
            state = replaced_by(block) if isinstance(block, SparseMoE) else None
            if isinstance(block, SparseMoE) and state is not None:
                target = host.target(layer, component, where=where)
                at = target.describe(where)
                if state.dense is None:
                    raise RuntimeError(
                        f"{at}: dense FFN must have been kept, got keep_dense=False at the swap"
                    )
                if dense_weight(state.dense).is_meta and not block.gate_proj.is_meta:
                    raise RuntimeError(f"{at}: kept weights must hold data, got meta tensors")
                swapped.append((target, block, state.dense))
    if not swapped:
        raise ValueError(
            f"{where}: model must have FFNs replaced by apply_moe_ or load_moe_, got none among "
            f"the {len(host.layers)} layers under {host.path}"
        )
    for _, block, dense in swapped:
        follow(dense, block)
    entries = []
    with all_or_nothing([(target, dense) for target, _, dense in swapped]):
        for target, block, dense in swapped:
            put_back(target, dense)
            names = (type(block).__name__, type(dense).__name__)
            entries.append(describe(target, block, before=names[0], after=names[1], restored=True))
    return SwapReport(action=where, layers=tuple(entries))


def _exchange(
    action: str, plans: Sequence[Plan], blocks: Sequence[SparseMoE], *, keep_dense: bool
) -> SwapReport:
    entries = []
    pairs = [(plan.target, block) for plan, block in zip(plans, blocks, strict=True)]
    with all_or_nothing(pairs):
        for target, block in pairs:
            put_in(target, block, keep_dense=keep_dense)
            names = (type(target.ffn).__name__, type(block).__name__)
            entries.append(describe(target, block, before=names[0], after=names[1]))
    return SwapReport(action=action, layers=tuple(entries))


def _require_distinct(plans: Sequence[Plan], *, where: str) -> None:
    paths: dict[int, str] = {}
    for plan in plans:
        first = paths.setdefault(id(plan.target.ffn), plan.target.path)
        if first != plan.target.path:
            raise ValueError(
                f"{plan.target.describe(where)}: FFN must be its own module, got that of {first}"
            )


def _layout(config: MoEConfig, weights: DenseWeights, at: str) -> ExpertLayout:
    try:
        return ExpertLayout(
            intermediate_size=weights.gate_proj.shape[0],
            num_experts=config.num_experts,
            num_shared_experts=config.num_shared_experts,
        )
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


def _by_layer(
    scores: Scores | None, selected: Sequence[int], num_layers: int, *, where: str
) -> Mapping[int, Tensor] | None:
    """Returns scores by layer, at least those of every selected one."""
    if scores is None:
        return None
    if not isinstance(scores, Mapping):
        stacked = as_scores(scores, where=where)
        if stacked.ndim != 2 or stacked.shape[0] != num_layers:
            raise ValueError(
                f"{where}: scores must have shape [{num_layers} layers, intermediate_size], "
                f"got {list(stacked.shape)}"
            )
        return dict(enumerate(stacked))
    missing = [layer for layer in selected if layer not in scores]
    extra = [layer for layer in scores if layer not in selected]
    if missing or extra:
        got = [f"none for {list_some(missing)}"] * bool(missing)
        got += [f"some for {list_some(extra)}"] * bool(extra)
        raise ValueError(
            f"{where}: scores must be given for the selected layers, {list_some(selected)}, "
            f"got {' and '.join(got)}"
        )
    return {
        layer: as_scores(value, where=f"{where}: layer {layer}") for layer, value in scores.items()
    }


def _ranking(plan: Plan, given: Tensor | None, *, where: str) -> Tensor:
    at = plan.target.describe(where)
    width = plan.layout.intermediate_size
    if given is not None:
        check_scores(given, width, where=at)
        return given
    if plan.weights.gate_proj.is_meta:
        raise ValueError(f"{at}: scores must be given for weights without data, got meta tensors")
    ranking = magnitude_scores(*plan.weights)
    check_scores(ranking, width, where=f"{at}: magnitude of its weights")
    return ranking
