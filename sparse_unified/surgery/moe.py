# SPDX-License-Identifier: Apache-2.0
"""apply_moe_, load_moe_: all is checked and built before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_unified._common import StrPath, context, naming
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.checkpoint.model_dir import find_model, is_hub_id
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.scores import Inputs, Scores, rank, resolve_inputs
from sparse_unified.experts import ExpertLayout
from sparse_unified.experts.keep import magnitude_scores
from sparse_unified.experts.layout import Partition, order_neurons
from sparse_unified.experts.router import (
    RouterFit,
    RouterInit,
    fit_router,
    hidden_activations,
    random_router,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.decoder import Decoder, find_decoder, gives_times, hash_ffns
from sparse_unified.surgery.exchange import Slot, offload_like, put_all
from sparse_unified.surgery.ffn import DenseWeights, describe_module, read_weights, returns_tuple
from sparse_unified.surgery.report import SurgeryReport, transform


@torch.no_grad()
def apply_moe_(
    model: object,
    config: MoEConfig,
    scores: Scores | None = None,
    *,
    inputs: Inputs | None = None,
    keep_dense: bool = True,
) -> SurgeryReport:
    """Replaces dense FFNs of a live model by sparse ones with the same weights, in place.

    FFNs are found by structure: decoder layers with `mlp` and `mlp_moe_gen`, or `mlp` alone (und),
    each made of gate_proj, up_proj and down_proj, or gate_up_proj and down_proj, in our model, an
    official one, a decoder of transformers or of an engine, or a pipeline that holds one. A block
    keeps the replaced module's return convention, device, dtype, mode, requires_grad of each
    projection, hooks, and accelerate's patched forward; weights that accelerate keeps outside of
    the device stay on the CPU. Neurons are permuted, nothing is rounded; with routers that start at
    zero and top_k = num_experts the output is the dense one. Adapters of peft on the projections
    are merged into what becomes the experts; those elsewhere stay as they are.

    What does not carry over: hooks on the projections inside an FFN, and optimisers, which hold
    the dense parameters and have to be made anew.

    Args:
        model: a module or pipeline.
        config: how many experts, in which FFNs, of which neurons, and how routers start.
        scores: importance of each neuron, float `{layer: [I]}` for exactly the selected layers, a
            tensor [num_layers, I], a mapping of components to scores of at least these layers, or
            a scores file, of this model as it is if `calibrate` wrote it. Without scores, neurons
            are ranked by weight magnitude.
        inputs: what the FFNs were given on calibration tokens, float `{layer: [N, D]}` of at least
            the selected layers, or a mapping of components to that, N >= 8; given exactly where
            config has the partition "coactivation" or router_init "activation". See
            `FfnStatistics.inputs`.
        keep_dense: keep the replaced modules for `restore_`: their weights, as many bytes as the
            experts have, stay in memory where they are. Otherwise they are freed at the end.

    Raises:
        ValueError: nothing matches, a selected layer is not a plain dense SwiGLU, or layers,
            counts, scores or inputs do not fit; the message names the layer. The model is as
            before.
        TypeError: config is no MoEConfig, or scores or inputs are no tensors.

    Example:
        >>> report = apply_moe_(model, MoEConfig(num_experts=16, top_k=8))  # doctest: +SKIP
    """
    with context("apply_moe_"):
        component = config.component
        decoder = find_decoder(model, component)
        is_bagel = any(hasattr(layer, keys.FFN_NAMES["gen"]) for layer in decoder.layers)
        plans: dict[int, _Plan] = {}
        for slot, ffn in decoder.select_ffns(config.layers, component):
            with naming(slot):
                weights = read_weights(ffn, merge=True)
                layout = ExpertLayout(
                    intermediate_size=weights.gate_proj.shape[0],
                    num_experts=config.num_experts,
                    num_shared_experts=config.num_shared_experts,
                    time_router=config.time_router,
                )
                _check_times(decoder, slot.layer, layout)
                plans[slot.layer] = _Plan(slot, ffn, weights, layout, config.top_k, is_bagel)
        ranking, _ = rank(
            scores,
            component,
            {layer: plan.layout.intermediate_size for layer, plan in plans.items()},
            len(decoder.layers),
            lambda layer: magnitude_scores(*plans[layer].weights),
            partial(hash_ffns, decoder, component),
        )
        sizes = {layer: plan.weights.gate_proj.shape[1] for layer, plan in plans.items()}
        calibration = resolve_inputs(inputs, config, sizes)
        blocks = []
        for layer, plan in plans.items():
            with naming(plan.slot):
                own = calibration.get(layer)
                blocks.append((plan, _permuted_block(plan, config, ranking(layer), own)))
        return _put_in("apply_moe_", decoder, blocks, keep_dense)


@torch.no_grad()
def load_moe_(
    model: object, checkpoint: Checkpoint | StrPath, *, keep_dense: bool = True
) -> SurgeryReport:
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

    Example:
        >>> load_moe_(model, "LLM-Drop/BAGEL-MoE-7B-GEN-16to8")  # doctest: +SKIP
    """
    if not isinstance(checkpoint, Checkpoint):
        if is_hub_id(checkpoint):
            checkpoint = find_model(checkpoint, where="load_moe_")
        checkpoint = Checkpoint(checkpoint)
    experts, top_k = checkpoint.experts, checkpoint.top_k
    if top_k is None:
        raise ValueError(f"{checkpoint.directory}: checkpoint must be sparse, got a dense one")
    with context("load_moe_"):
        decoder = find_decoder(model)
        if checkpoint.num_layers != len(decoder.layers):
            raise ValueError(
                f"model must have {checkpoint.num_layers} layers as {checkpoint.directory} "
                f"has, got {len(decoder.layers)} under {decoder.path}"
            )
        plans = []
        for component, layers in experts.items():
            for slot, ffn in decoder.select_ffns(list(layers), component):
                with naming(slot):
                    weights = read_weights(ffn, merge=True)
                    if weights.gate_proj.is_meta:
                        raise ValueError("weights must be in memory, got meta")
                    found = checkpoint.ffns[component][slot.layer]
                    sizes = [found.width, found.hidden_size]
                    if sizes != list(weights.gate_proj.shape):
                        raise ValueError(
                            f"sparse FFNs must be those of the model, got [I, D] = {sizes} in the "
                            f"file, {list(weights.gate_proj.shape)} in the model"
                        )
                    _check_times(decoder, slot.layer, layers[slot.layer])
                    plan = _Plan(slot, ffn, weights, layers[slot.layer], top_k, True)
                    plans.append((plan, plan.block()))
        for plan, block in plans:
            prefix = keys.ffn_prefix(plan.component, plan.slot.layer)
            for key, view in block.official_views().items():
                view.copy_(checkpoint.read(prefix + key).to(view.dtype))
        return _put_in("load_moe_", decoder, plans, keep_dense)


class _Plan(NamedTuple):
    """A dense FFN and its weights, and what takes its place."""

    slot: Slot
    ffn: nn.Module
    weights: DenseWeights
    layout: ExpertLayout
    top_k: int
    is_bagel: bool  # whose files have routers for ViT tokens and for a shared expert in any case

    @property
    def component(self) -> str:
        return keys.COMPONENT_OF_FFN[self.slot.name]

    def block(self) -> SparseMoE:
        """Returns the block with the device, mode, dtype and requires_grad of the dense FFN.

        Routers are zero, experts uninitialised. No random numbers are drawn.
        """
        gate_proj = self.weights.gate_proj
        block = SparseMoE(
            gate_proj.shape[1],
            self.layout.intermediate_size,
            self.layout.num_experts,
            self.top_k,
            self.layout.num_shared_experts,
            shared_intermediate_size=self.layout.shared_intermediate_size,
            gate_img=self.is_bagel and self.component == "und",
            gate_shared=self.is_bagel,
            gate_time=self.layout.time_router,
            return_router_logits=returns_tuple(self.ffn, self.weights),
            device="meta",
            dtype=gate_proj.dtype,
        ).to_empty(device=gate_proj.device)
        set_routers_(block, torch.zeros(block.gate.weight.shape))
        for name, dense in self.weights._asdict().items():
            getattr(block, name).requires_grad_(dense.requires_grad)
        return block.train(self.ffn.training)


def _check_times(decoder: Decoder, layer: int, layout: ExpertLayout) -> None:
    if layout.time_router and not gives_times(decoder.layers[layer]):
        raise ValueError(
            "layer must give its FFN the times of tokens for time_router, as those of "
            f"sparse_unified.bagel.Bagel do, got a {describe_module(decoder.layers[layer])}"
        )


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
    layer, hidden = plan.slot.layer, None
    if config.partition is Partition.COACTIVATION and inputs is not None:
        hidden = hidden_activations(inputs, plan.weights.gate_proj, plan.weights.up_proj)
    index = order_neurons(
        config.partition, ranking, plan.layout, seed=config.seed, layer=layer, hidden=hidden
    )
    block = plan.block()
    for name, dense in plan.weights._asdict().items():
        dim = int(name == "down_proj")
        index = index.to(dense.device)
        torch.index_select(dense.detach(), dim, index, out=getattr(block, name).data)
    weight, _ = first_router(
        block, config.router_init, layer=layer, seed=config.seed, inputs=inputs
    )
    set_routers_(block, weight)
    return block


def _put_in(
    action: str, decoder: Decoder, blocks: Sequence[tuple[_Plan, SparseMoE]], keep_dense: bool
) -> SurgeryReport:
    for plan, block in blocks:
        offload_like(block, plan.ffn)
    changes = [(plan.slot, block) for plan, block in blocks]
    return transform(action, decoder, partial(put_all, changes), keep=keep_dense)


@torch.no_grad()
def first_router(
    block: SparseMoE, method: RouterInit, *, layer: int, seed: int, inputs: Tensor | None
) -> tuple[Tensor, RouterFit | None]:
    """Returns router weights [E, D] for a block, and what those fitted to inputs are worth."""
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
    """Writes router weights [E, D] into a block; gate_shared and gate_time become zero.

    The two routers of und blocks, of text and of ViT tokens, start the same.
    """
    for router in (block.gate, block.gate_img):
        if router is not None:
            router.weight.copy_(weight)
    for router in (block.gate_shared, block.gate_time):
        if router is not None:
            router.weight.zero_()
