# SPDX-License-Identifier: Apache-2.0
"""apply_moe_, load_moe_: all is checked and built before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_unified._common import context, list_some, naming
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.checkpoint.model_dir import find_model, is_hub_id
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.scores import Inputs, resolve_inputs
from sparse_unified.experts import (
    ExpertLayout,
    Partition,
    RouterFit,
    RouterInit,
    check_scores,
    fit_router,
    hidden_activations,
    magnitude_scores,
    order_neurons,
    random_router,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import select
from sparse_unified.surgery.decoder import Decoder, Target, find_decoder
from sparse_unified.surgery.exchange import (
    Change,
    all_or_nothing,
    next_order,
    offload_like,
    put_in,
)
from sparse_unified.surgery.ffn import DenseWeights, projection, read_weights, returns_tuple
from sparse_unified.surgery.prune import require_distinct
from sparse_unified.surgery.report import SwapReport, describe_swap
from sparse_unified.surgery.scores import Scores, of_component, scores_by_layer


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
    with context("apply_moe_"):
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
        component = config.component
        decoder, name = find_decoder(model, component), keys.FFN_NAMES[component]
        num_layers = len(decoder.layers)
        selected = select(
            config.layers, num_layers, lambda layer: decoder.has(layer, name), f"{component} FFN"
        )
        own = of_component(scores, component)
        given = scores_by_layer(own, selected, num_layers, exact=own is scores)
        plans, rankings = [], []
        for layer in selected:
            target = decoder.target(layer, component)
            with naming(target):
                weights = read_weights(target.ffn)
                layout = ExpertLayout(
                    intermediate_size=weights.gate_proj.shape[0],
                    num_experts=config.num_experts,
                    num_shared_experts=config.num_shared_experts,
                )
                is_tuple = returns_tuple(target.ffn, weights)
                rankings.append(_ranking(weights, None if given is None else given[layer]))
            plans.append(_Plan(target, weights, layout, config.top_k, is_tuple))
        require_distinct(plan.target for plan in plans)
        sizes = {plan.target.layer: plan.weights.gate_proj.shape[1] for plan in plans}
        calibration = resolve_inputs(inputs, config, sizes, what="apply_moe_")
        blocks = []
        for plan, ranking in zip(plans, rankings, strict=True):
            with naming(plan.target):
                blocks.append(
                    _permuted_block(plan, config, ranking, calibration.get(plan.target.layer))
                )
        return _exchange("apply_moe_", decoder, plans, blocks, keep_dense=keep_dense)


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
    if not isinstance(checkpoint, Checkpoint):
        if is_hub_id(checkpoint):
            checkpoint = find_model(checkpoint, where="load_moe_")
        checkpoint = Checkpoint(checkpoint)
    moe = checkpoint.moe
    if moe is None:
        raise ValueError(f"{checkpoint.directory}: checkpoint must be sparse, got a dense one")
    with context("load_moe_"):
        decoder = find_decoder(model)
        if checkpoint.num_layers != len(decoder.layers):
            raise ValueError(
                f"model must have {checkpoint.num_layers} layers as {checkpoint.directory} "
                f"has, got {len(decoder.layers)} under {decoder.path}"
            )
        plans, problems = [], []
        for component, layers in moe.layers.items():
            for layer in layers:
                target = decoder.target(layer, component)
                with naming(target):
                    weights = read_weights(target.ffn)
                    if weights.gate_proj.is_meta:
                        raise ValueError("weights must be in memory, got meta")
                    is_tuple = returns_tuple(target.ffn, weights)
                layout = moe.expert_layout(component, layer)
                plan = _Plan(target, weights, layout, moe.top_k, is_tuple)
                problems += plan.misfits(checkpoint)
                plans.append(plan)
        if problems:
            raise ValueError(
                f"{checkpoint.directory}: sparse FFNs must be those of the model, "
                f"got {list_some(problems)}"
            )
        require_distinct(plan.target for plan in plans)
        blocks = [_loaded_block(plan, checkpoint) for plan in plans]
        return _exchange("load_moe_", decoder, plans, blocks, keep_dense=keep_dense)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked replacement: nothing about it can fail any more but memory and files."""

    target: Target
    weights: DenseWeights
    layout: ExpertLayout
    top_k: int
    return_router_logits: bool

    def empty_block(self, device: torch.device | str) -> SparseMoE:
        """Returns the block with the mode, dtype and requires_grad of the dense FFN.

        Routers are zero, expert weights uninitialised. No random numbers are drawn.
        """
        gate_proj = self.weights.gate_proj
        block = SparseMoE(
            gate_proj.shape[1],
            self.layout.intermediate_size,
            self.layout.num_experts,
            self.top_k,
            self.layout.num_shared_experts,
            shared_intermediate_size=self.layout.shared_intermediate_size,
            gate_img=self.target.component == "und",
            return_router_logits=self.return_router_logits,
            device="meta",
            dtype=gate_proj.dtype,
        ).to_empty(device=device)
        set_routers_(block, torch.zeros(block.gate.weight.shape))
        for name in keys.PROJECTIONS:
            trained = projection(self.target.ffn, name).weight.requires_grad
            getattr(block, name).requires_grad_(trained)
        return block.train(self.target.ffn.training)

    def misfits(self, checkpoint: Checkpoint) -> list[str]:
        """Returns a phrase for each tensor that is missing, extra or misshapen in a file."""
        component, layer = self.target.component, self.target.layer
        found = checkpoint.ffns[component][layer]
        sizes = [found.intermediate_size, found.hidden_size]
        if sizes != list(self.weights.gate_proj.shape):
            return [
                f"{self.target} [I, D] = {sizes} in the file, "
                f"{list(self.weights.gate_proj.shape)} in the model"
            ]
        prefix = keys.ffn_prefix(component, layer)
        wanted = {
            prefix + key: list(view.shape)
            for key, view in self.empty_block("meta").official_views().items()
        }
        held = {
            key: list(spec.shape)
            for key, spec in checkpoint.specs.items()
            if key.startswith(prefix)
        }
        return [
            *(f"missing {key} {wanted[key]}" for key in wanted if key not in held),
            *(f"extra {key} {held[key]}" for key in held if key not in wanted),
            *(
                f"misshapen {key} {held[key]}, not {wanted[key]}"
                for key in wanted
                if key in held and held[key] != wanted[key]
            ),
        ]


def _ranking(weights: DenseWeights, given: Tensor | None) -> Tensor:
    """Returns the scores [I] of the neurons of a FFN: those given, else by weight magnitude."""
    width = weights.gate_proj.shape[0]
    if given is not None:
        check_scores(given, width)
        return given
    if weights.gate_proj.is_meta:
        raise ValueError("scores must be given for weights without data, got meta tensors")
    ranking = magnitude_scores(*weights)
    with naming("magnitude of its weights"):
        check_scores(ranking, width)
    return ranking


def _permuted_block(
    plan: _Plan, config: MoEConfig, ranking: Tensor, inputs: Tensor | None
) -> SparseMoE:
    """Returns the block with the dense weights in expert order, bit for bit, and first routers."""
    starts_empty = config.router_init is RouterInit.ZERO and inputs is None
    if plan.weights.gate_proj.is_meta and not starts_empty:
        raise ValueError(
            f"weights must be in memory for partition {config.partition.value!r} and "
            f"router_init {config.router_init.value!r}, got meta"
        )
    layer, hidden = plan.target.layer, None
    if config.partition is Partition.COACTIVATION and inputs is not None:
        hidden = hidden_activations(inputs, plan.weights.gate_proj, plan.weights.up_proj)
    neuron_index = order_neurons(
        config.partition, ranking, plan.layout, seed=config.seed, layer=layer, hidden=hidden
    ).to(plan.weights.gate_proj.device)
    block = plan.empty_block(plan.weights.gate_proj.device)
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        fused = getattr(block, name).data
        torch.index_select(getattr(plan.weights, name), dim, neuron_index, out=fused)
    weight, _ = first_router(
        block, config.router_init, layer=layer, seed=config.seed, inputs=inputs
    )
    set_routers_(block, weight)
    offload_like(block, plan.target.ffn)
    return block


def _loaded_block(plan: _Plan, checkpoint: Checkpoint) -> SparseMoE:
    """Returns the block with the weights of a file, read one official tensor at a time."""
    gate_proj = plan.weights.gate_proj
    block = plan.empty_block(gate_proj.device)
    prefix = keys.ffn_prefix(plan.target.component, plan.target.layer)
    for key, view in block.official_views().items():
        view.copy_(checkpoint.read(prefix + key).to(gate_proj.dtype))
    offload_like(block, plan.target.ffn)
    return block


def _exchange(
    action: str,
    decoder: Decoder,
    plans: Sequence[_Plan],
    blocks: Sequence[SparseMoE],
    *,
    keep_dense: bool,
) -> SwapReport:
    changes = [
        Change(plan.target.slot, plan.target.ffn, block)
        for plan, block in zip(plans, blocks, strict=True)
    ]
    order, entries = next_order(decoder.layers), []
    with all_or_nothing(changes):
        for plan, change in zip(plans, changes, strict=True):
            put_in(change, order=order, keep=keep_dense)
            entries.append(describe_swap(plan.target.layer, plan.target.component, change))
    return SwapReport(action=action, layers=tuple(entries))


@torch.no_grad()
def first_router(
    block: SparseMoE, method: RouterInit, *, layer: int, seed: int, inputs: Tensor | None
) -> tuple[Tensor, RouterFit | None]:
    """Returns router weights [E, D] for a block, and of "activation" what they are worth.

    Args:
        inputs: [N, D] of "activation".

    Raises:
        ValueError: inputs do not fit.
    """
    shape = (block.num_experts, block.hidden_size)
    if method is RouterInit.RANDOM:
        return random_router(*shape, seed=seed, layer=layer), None
    if method is RouterInit.ZERO or inputs is None:
        return torch.zeros(shape), None
    weights = (block.gate_proj, block.up_proj, block.down_proj)
    fit = fit_router(inputs, *weights, block.layout, block.top_k)
    return fit.weight, fit


@torch.no_grad()
def set_routers_(block: SparseMoE, weight: Tensor) -> None:
    """Writes router weights [E, D] into a block; that of the shared expert becomes zero.

    The two routers of und blocks, of text and of ViT tokens, start the same.
    """
    for router in (block.gate, block.gate_img):
        if router is not None:
            router.weight.copy_(weight)
    block.gate_shared.weight.zero_()
