# SPDX-License-Identifier: Apache-2.0
"""The order of the neurons of a live FFN, and first routers of a live block."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.experts import (
    Partition,
    RouterFit,
    RouterInit,
    fit_router,
    hidden_activations,
    order_neurons,
    random_router,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.blocks import Plan


def neuron_order(plan: Plan, config: MoEConfig, scores: Tensor, inputs: Tensor | None) -> Tensor:
    """Returns neuron_index [I] int64, position in expert order -> dense neuron.

    Args:
        scores: [I], finite. inputs: [N, D], checked; of a partition by coactivation alone.

    Raises:
        ValueError: the neurons give values that are not finite.
    """
    hidden = None
    if config.partition is Partition.COACTIVATION and inputs is not None:
        hidden = hidden_activations(inputs, plan.weights.gate_proj, plan.weights.up_proj)
    return order_neurons(
        config.partition,
        scores,
        plan.layout,
        seed=config.seed,
        layer=plan.target.layer,
        hidden=hidden,
    )


@torch.no_grad()
def first_router(
    block: SparseMoE,
    method: RouterInit,
    *,
    layer: int,
    seed: int,
    inputs: Tensor | None,
    where: str,
) -> tuple[Tensor, RouterFit | None]:
    """Returns router weights [E, D] for a block, and of "activation" what they are worth.

    Args:
        inputs: [N, D] of "activation". where: start of messages.

    Raises:
        ValueError: inputs do not fit.
    """
    shape = (block.num_experts, block.hidden_size)
    if method is RouterInit.RANDOM:
        return random_router(*shape, seed=seed, layer=layer), None
    if method is RouterInit.ZERO or inputs is None:
        return torch.zeros(shape), None
    weights = (block.gate_proj, block.up_proj, block.down_proj)
    fit = fit_router(inputs, *weights, block.layout, block.top_k, where=where)
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


def start_routers_(
    block: SparseMoE, *, config: MoEConfig, layer: int, inputs: Tensor | None, where: str
) -> None:
    """Sets the routers of a new block as a config says; arguments as of `first_router`."""
    weight, _ = first_router(
        block, config.router_init, layer=layer, seed=config.seed, inputs=inputs, where=where
    )
    set_routers_(block, weight)
