# SPDX-License-Identifier: Apache-2.0
"""The training forward: text cross-entropy, flow-matching error, and the losses of the routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_unified.bagel.joint_attention import JointPacking
from sparse_unified.bagel.segments import TrainingBatch

if TYPE_CHECKING:
    from sparse_unified.bagel.model import Bagel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutput:
    """Losses of a batch, fp32 scalars with a graph; zero, without one, where nothing asks for them.

    Attributes:
        text_loss_sum: cross-entropy, summed over the `text_tokens` that are asked for.
        image_loss_sum: squared error of the velocity, mean over channels, summed over the
            `image_tokens` that are asked for.
        balance_loss: E * sum_e f_e * P_e, mean over the sparse blocks: f_e is the share of
            assignments that expert e takes, P_e its mean probability under softmax. 1 when both are
            even. Source: Switch Transformer (arXiv 2101.03961), with top-k counts.
        router_z_loss: mean of logsumexp(logits)^2, mean over the sparse blocks (arXiv 2202.08906).
        expert_load: tokens that each expert took, [E] int64, by (component, layer).
    """

    text_loss_sum: Tensor
    text_tokens: int
    image_loss_sum: Tensor
    image_tokens: int
    balance_loss: Tensor
    router_z_loss: Tensor
    expert_load: dict[tuple[str, int], Tensor]


def _run_layer(
    layer: nn.Module, und: Tensor, gen: Tensor | None, packing: JointPacking
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    routed = packing.routed
    assert routed is not None
    routed.clear()
    und, gen = layer(und, gen, packing)
    return und, gen, routed.copy()


def training_forward(
    model: Bagel, batch: TrainingBatch, *, checkpointing: bool = False
) -> TrainingOutput:
    """Runs packed sequences through the model and returns their losses.

    Args:
        model: dense or sparse, any part of it trainable.
        batch: of `pack_training`, on the device of the model.
        checkpointing: keep only the inputs of each layer for the backward pass and run the layer a
            second time there.
    """
    language, dtype = model.language_model, model.dtype
    decoder = language.model
    und = decoder.embed_tokens(batch.und_ids)
    if batch.vit_patches is not None and batch.packing.vit_rows is not None:
        seen = model.vit_model(
            batch.vit_patches.to(dtype), batch.vit_positions, list(batch.vit_lengths)
        )
        seen = model.connector(seen) + model.vit_pos_embed(batch.vit_positions)
        und = und.index_copy(0, batch.packing.vit_rows, seen.to(und.dtype))
    gen = None
    if batch.latents is not None:
        gen = model.vae2llm(batch.latents.to(dtype)) + model.latent_pos_embed(
            batch.latent_positions
        )
        gen = gen + model.time_embedder(batch.times).index_select(0, batch.time_rows)
    packing = batch.packing.recording(dtype)
    routed: dict[tuple[str, int], tuple[Tensor, int]] = {}
    for index, layer in enumerate(decoder.layers):
        if checkpointing:
            und, gen, logits = checkpoint(_run_layer, layer, und, gen, packing, use_reentrant=False)
        else:
            und, gen, logits = _run_layer(layer, und, gen, packing)
        for component, values in logits.items():
            block: Any = layer.mlp if component == "und" else layer.mlp_moe_gen
            routed[component, index] = (values, block.top_k)

    text_loss = image_loss = balance = z_loss = torch.zeros((), device=und.device)
    if batch.text_tokens:
        hidden = decoder.norm(und.index_select(0, batch.label_rows))
        text_loss = F.cross_entropy(language.lm_head(hidden).float(), batch.labels, reduction="sum")
    if batch.image_tokens and gen is not None:
        predicted = model.llm2vae(
            decoder.norm_moe_gen(gen.index_select(0, batch.velocity_rows))
        ).float()
        image_loss = (predicted - batch.velocities).square().mean(-1).sum()
    loads: dict[tuple[str, int], Tensor] = {}
    alike: dict[tuple[torch.Size, int], list[tuple[str, int]]] = {}
    for key, (logits, top_k) in routed.items():
        alike.setdefault((logits.shape, top_k), []).append(key)
    for (_, top_k), keys in alike.items():
        logits = torch.stack([routed[key][0] for key in keys])  # [blocks, T, E]
        load = expert_load(logits, top_k)
        loads.update(zip(keys, load.unbind(), strict=True))
        balance = balance + balance_loss(logits, load).sum()
        z_loss = z_loss + logits.logsumexp(-1).square().mean(-1).sum()
    blocks = max(len(routed), 1)
    return TrainingOutput(
        text_loss_sum=text_loss,
        text_tokens=batch.text_tokens,
        image_loss_sum=image_loss,
        image_tokens=batch.image_tokens,
        balance_loss=balance / blocks,
        router_z_loss=z_loss / blocks,
        expert_load=loads,
    )


def expert_load(logits: Tensor, top_k: int) -> Tensor:
    """Counts the tokens of each expert, [..., E] int64, for router logits [..., T, E]; ties as in
    routing."""
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :top_k], True)
    return taken.sum(-2)


def balance_loss(logits: Tensor, load: Tensor) -> Tensor:
    """Returns the load-balance loss of blocks, [...], for logits [..., T, E] and load [..., E]; see
    `TrainingOutput`."""
    share = load / load.sum(-1, keepdim=True)
    return logits.shape[-1] * (share * logits.softmax(-1).mean(-2)).sum(-1)
