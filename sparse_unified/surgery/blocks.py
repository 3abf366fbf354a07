# SPDX-License-Identifier: Apache-2.0
"""Builds what takes the place of a dense FFN: a sparse block, a narrower FFN, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import list_some
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn import SparseMoE, SwiGLU
from sparse_unified.surgery.find import Target
from sparse_unified.surgery.weights import DenseWeights, offload_like, projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
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
        for router in (block.gate, block.gate_shared, block.gate_img):
            if router is not None:
                torch.nn.init.zeros_(router.weight)
        for name in keys.PROJECTIONS:
            trained = projection(self.target.ffn, name).weight.requires_grad
            getattr(block, name).requires_grad_(trained)
        return block.train(self.target.ffn.training)


def permuted_block(
    plan: Plan, neuron_index: Tensor, start_routers_: Callable[[SparseMoE], object]
) -> SparseMoE:
    """Returns the block with the dense weights in expert order, bit for bit.

    Args:
        neuron_index: [I] int64, position in expert order -> dense neuron.
        start_routers_: sets the routers, which are zero, while all weights are in memory.
    """
    device = plan.weights.gate_proj.device
    block = plan.empty_block(device)
    neuron_index = neuron_index.to(device)
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        fused = getattr(block, name).data
        torch.index_select(getattr(plan.weights, name), dim, neuron_index, out=fused)
    start_routers_(block)
    offload_like(block, plan.target.ffn)
    return block


class TupleSwiGLU(SwiGLU):
    """A dense FFN with the return convention of SparseUnifiedModel, (y, None)."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        packed_text_indexes: Tensor | None = None,
        packed_vit_token_indexes: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """x [..., D] -> ([..., D], None); the indices are not looked at."""
        return super().forward(x), None


def narrow_ffn(ffn: nn.Module, weights: DenseWeights, kept: Tensor, *, returns_tuple: bool) -> Any:
    """Returns a dense FFN of some of the neurons, bit for bit.

    Args:
        ffn: the FFN it takes the place of. weights: its weights.
        kept: [kept] int64, ascending neuron indices.
    """
    gate_proj = weights.gate_proj
    kind = TupleSwiGLU if returns_tuple else SwiGLU
    narrow = kind(gate_proj.shape[1], len(kept), device="meta", dtype=gate_proj.dtype)
    narrow.to_empty(device=gate_proj.device)
    kept = kept.to(gate_proj.device)
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(narrow, name).weight
        torch.index_select(getattr(weights, name), dim, kept, out=weight.data)
        weight.requires_grad_(projection(ffn, name).weight.requires_grad)
    offload_like(narrow, ffn)
    return narrow.train(ffn.training)


def narrow_block(block: SparseMoE, kept: Tensor, layout: ExpertLayout) -> SparseMoE:
    """Returns a sparse FFN of some of the neurons of another, with its routers, bit for bit.

    Args:
        kept: [kept] int64, ascending positions in expert order. layout: of the result.
    """
    narrow = SparseMoE(
        block.hidden_size,
        layout.intermediate_size,
        layout.num_experts,
        block.top_k,
        layout.num_shared_experts,
        shared_intermediate_size=layout.shared_intermediate_size,
        gate_img=block.gate_img is not None,
        return_router_logits=block.return_router_logits,
        strict=block.strict,
        device="meta",
        dtype=block.gate_proj.dtype,
    ).to_empty(device=block.gate_proj.device)
    kept = kept.to(block.gate_proj.device)
    old = dict(block.named_parameters())
    for name, weight in narrow.named_parameters():
        if name in keys.PROJECTIONS:
            dim = 1 if name == "down_proj" else 0
            torch.index_select(old[name].data, dim, kept, out=weight.data)
        else:
            weight.data.copy_(old[name].data)
        weight.requires_grad_(old[name].requires_grad)
    return narrow.train(block.training)


def check_keys(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Returns a phrase for each tensor that is missing, extra or misshapen in the file."""
    prefix = keys.ffn_prefix(plan.target.component, plan.target.layer)
    wanted = {
        prefix + key: list(view.shape)
        for key, view in plan.empty_block("meta").official_views().items()
    }
    found = {
        key: list(spec.shape) for key, spec in checkpoint.specs.items() if key.startswith(prefix)
    }
    return [
        *(f"missing {key} {wanted[key]}" for key in wanted if key not in found),
        *(f"extra {key} {found[key]}" for key in found if key not in wanted),
        *(
            f"misshapen {key} {found[key]}, not {wanted[key]}"
            for key in wanted
            if key in found and found[key] != wanted[key]
        ),
    ]


def loaded_block(plan: Plan, checkpoint: Checkpoint) -> SparseMoE:
    """Returns the block with the weights of a file, read one official tensor at a time."""
    gate_proj = plan.weights.gate_proj
    block = plan.empty_block(gate_proj.device)
    prefix = keys.ffn_prefix(plan.target.component, plan.target.layer)
    for key, view in block.official_views().items():
        view.copy_(checkpoint.read(prefix + key).to(gate_proj.dtype))
    offload_like(block, plan.target.ffn)
    return block


def refuse(where: str, problems: list[str]) -> None:
    """Raises one ValueError that lists what is wrong with the tensors of a file."""
    if problems:
        raise ValueError(
            f"{where}: sparse FFNs must be those of the model, got {list_some(problems)}"
        )
