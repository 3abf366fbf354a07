# SPDX-License-Identifier: Apache-2.0
"""apply_moe_, load_moe_: all is checked and built before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.hub import find_model, is_hub_id
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.routing import Inputs, resolve_inputs
from sparse_unified.experts import ExpertLayout, RouterInit, check_scores, magnitude_scores
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.blocks import Plan, check_keys, loaded_block, permuted_block, refuse
from sparse_unified.surgery.exchange import all_or_nothing, next_order, put_in
from sparse_unified.surgery.find import (
    Host,
    Target,
    find_host,
    read_dense,
    select_held,
)
from sparse_unified.surgery.probe import returns_tuple
from sparse_unified.surgery.report import SwapReport, describe
from sparse_unified.surgery.routing import neuron_order, start_routers_
from sparse_unified.surgery.scores import Scores, by_layer, of_component
from sparse_unified.surgery.weights import DenseWeights


@torch.no_grad()
def apply_moe_(
    model: object,
    config: MoEConfig,
    scores: Scores | None = None,
    *,
    inputs: Inputs | None = None,
    keep_dense: bool = True,
) -> SwapReport:
    """Replaces dense FFNs of a live model by sparse ones with the same weights, in place.

    FFNs are found by structure: decoder layers with `mlp` and `mlp_moe_gen`, or `mlp` alone (und),
    each made of gate_proj, up_proj and down_proj, or gate_up_proj and down_proj, in our model, an
    official one, a decoder of transformers or of an engine, or a pipeline that holds one. A block
    keeps the replaced module's return convention, device, dtype, mode, requires_grad of each
    projection, hooks, and accelerate's patched forward; where accelerate keeps the weights outside
    of the device, on the CPU or on disk, it keeps those of the block on the CPU. Neurons are
    permuted, nothing is rounded; with routers that start at zero and top_k = num_experts the output
    is the dense one.

    What does not carry over: hooks on the projections inside an FFN, and optimisers, which hold
    the dense parameters and have to be made anew.

    Args:
        model: a module or pipeline.
        config: how many experts, in which FFNs, of which neurons, and how routers start.
        scores: importance of each neuron, float `{layer: [I]}` for exactly the selected layers, a
            tensor [num_layers, I], or a mapping of components to scores of at least these layers.
            Without scores, neurons are ranked by weight magnitude.
        inputs: what the FFNs were given on calibration tokens, float `{layer: [N, D]}` of at least
            the selected layers, or a mapping of components to that, N >= 8; given exactly where
            config has the partition "coactivation" or router_init "activation". See
            `FfnStatistics.inputs`.
        keep_dense: keep the replaced modules for `restore_`: their weights, as many bytes as the
            experts have, stay in memory where they are. Otherwise they are freed when the call
            returns; during the call both are there, so that an error can leave the model alone.

    Returns:
        what was changed, one entry per layer.

    Raises:
        ValueError: nothing matches, a selected layer is not a plain dense SwiGLU, or layers,
            counts, scores or inputs do not fit; the message names the layer. The model is as
            before.
        TypeError: config is no MoEConfig, or scores or inputs are no tensors.
    """
    where = "apply_moe_"
    if not isinstance(config, MoEConfig):
        raise TypeError(f"{where}: config must be a MoEConfig, got {type(config).__name__}")
    host = find_host(model, where=where, component=config.component)
    names = [FFN_NAMES[config.component]]
    selected = select_held(host, config.layers, names, where=where)
    own = of_component(scores, config.component, where=where)
    given = by_layer(own, selected, len(host.layers), where=where, exact=own is scores)
    plans, rankings = [], []
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
        values = None if given is None else given[layer]
        plans.append(plan)
        rankings.append(neuron_scores(weights, values, target.describe(where)))
    require_distinct([plan.target for plan in plans], where=where)
    sizes = {plan.target.layer: plan.weights.gate_proj.shape[1] for plan in plans}
    calibration = resolve_inputs(inputs, config, sizes, what=where)
    blocks = []
    for plan, ranking in zip(plans, rankings, strict=True):
        layer, at = plan.target.layer, plan.target.describe(where)
        own = calibration.get(layer)
        starts_empty = config.router_init is RouterInit.ZERO and own is None
        if plan.weights.gate_proj.is_meta and not starts_empty:
            raise ValueError(
                f"{at}: weights must be in memory for partition {config.partition.value!r} and "
                f"router_init {config.router_init.value!r}, got meta"
            )
        start_ = partial(start_routers_, config=config, layer=layer, inputs=own, where=at)
        blocks.append(permuted_block(plan, neuron_order(plan, config, ranking, own), start_))
    return _exchange(where, host, plans, blocks, keep_dense=keep_dense)


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
        checkpoint: a sparse model directory, or a hub id such as
            "LLM-Drop/BAGEL-MoE-7B-GEN-16to8", which is downloaded.
        keep_dense: see `apply_moe_`.

    Raises:
        ValueError: there is no such checkpoint, it is dense or damaged, nothing matches, a layer is
            not a plain dense SwiGLU, or file and model differ in layers, sizes, keys or shapes. The
            model is as before.
        RuntimeError: the file changes while it is read; the model is as before.
    """
    where = "load_moe_"
    if not isinstance(checkpoint, Checkpoint):
        if is_hub_id(checkpoint):
            checkpoint = find_model(checkpoint, where=where)
        checkpoint = Checkpoint(checkpoint)
    moe = checkpoint.moe
    if moe is None:
        raise ValueError(f"{checkpoint.directory}: checkpoint must be sparse, got a dense one")
    host = find_host(model, where=where)
    if checkpoint.num_layers != len(host.layers):
        raise ValueError(
            f"{where}: model must have {checkpoint.num_layers} layers as {checkpoint.directory} "
            f"has, got {len(host.layers)} under {host.path}"
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
    require_distinct([plan.target for plan in plans], where=where)
    blocks = [loaded_block(plan, checkpoint) for plan in plans]
    return _exchange(where, host, plans, blocks, keep_dense=keep_dense)


def _exchange(
    action: str, host: Host, plans: Sequence[Plan], blocks: Sequence[SparseMoE], *, keep_dense: bool
) -> SwapReport:
    entries = []
    order = next_order(host.layers)
    changes = [plan.target.change(block) for plan, block in zip(plans, blocks, strict=True)]
    with all_or_nothing(changes):
        for plan, change, block in zip(plans, changes, blocks, strict=True):
            put_in(change, order=order, keep=keep_dense)
            names = (type(plan.target.ffn).__name__, type(block).__name__)
            entries.append(describe(plan.target, block, before=names[0], after=names[1]))
    return SwapReport(action=action, layers=tuple(entries))


def require_distinct(targets: Iterable[Target], *, where: str) -> None:
    """Raises ValueError when one module is the FFN of two places."""
    paths: dict[int, str] = {}
    for target in targets:
        first = paths.setdefault(id(target.ffn), target.path)
        if first != target.path:
            raise ValueError(
                f"{target.describe(where)}: FFN must be its own module, got that of {first}"
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


def neuron_scores(weights: DenseWeights, given: Tensor | None, at: str) -> Tensor:
    """Returns the scores [I] of the neurons of a FFN: those given, else by weight magnitude.

    Raises:
        ValueError: they do not fit or are not finite, or there are neither scores nor weights.
    """
    width = weights.gate_proj.shape[0]
    if given is not None:
        check_scores(given, width, where=at)
        return given
    if weights.gate_proj.is_meta:
        raise ValueError(f"{at}: scores must be given for weights without data, got meta tensors")
    ranking = magnitude_scores(*weights)
    check_scores(ranking, width, where=f"{at}: magnitude of its weights")
    return ranking
