# SPDX-License-Identifier: Apache-2.0
"""Peers from other packages. None is a dependency; what is not installed is listed as such."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.engines.transformers import register

from .base import (
    Peer,
    Setting,
    StackedExperts,
    Weights,
    missing_package,
    needs_cuda,
    needs_dtype,
)

# transformers' batched_mm gathers the weights of every row; more than this is no way to run a FFN.
_MOST_GATHERED_BYTES = 2**33
_VLLM_MODULE = "vllm.model_executor.layers.fused_moe.fused_moe"


class TransformersExperts(StackedExperts):
    """The expert functions of transformers 5, `grouped_mm` and `batched_mm`, and ours among them:
    functions of a module with these weights and flags, tokens, experts and weights."""

    def __init__(self, setting: Setting, weights: Weights, name: str) -> None:
        super().__init__(setting, weights)
        from transformers.integrations import moe

        register()
        self.function: Any = moe.ALL_EXPERTS_FUNCTIONS[name]
        type(self)._apply_gate = moe._default_apply_gate
        self.act_fn = nn.SiLU()
        self.has_gate, self.has_bias, self.has_post_expert_norm = True, False, False
        self.is_transposed, self.is_concatenated = False, True
        self._is_expert_parallel = False

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        y: Tensor = self.function(self, x, topk_idx, weights.to(x.dtype))
        return y


def _no_transformers(setting: Setting, name: str) -> str | None:
    why = missing_package("transformers.integrations.moe", "transformers")
    if why is not None:
        return why
    from transformers.integrations import moe

    register()
    if name not in moe.ALL_EXPERTS_FUNCTIONS:
        return f"this transformers has no {name} experts"
    if name == "batched_mm":
        case = setting.case
        gathered = 3 * case.rows * case.expert_width * case.hidden_size * setting.dtype.itemsize
        if gathered > _MOST_GATHERED_BYTES:
            return f"would gather {gathered / 2**30:,.0f} GiB of weights"
    return None


class VllmExperts(StackedExperts):
    """vLLM's fused experts, Triton, forward only: `fused_experts(hidden_states, w1 [E, 2h, D],
    w2 [E, D, h], topk_weights fp32, topk_ids)`."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        y: Tensor = fused_experts(
            hidden_states=x,
            w1=self.gate_up_proj,
            w2=self.down_proj,
            topk_weights=weights,
            topk_ids=topk_idx.int(),
        )
        return y


def aligned_layout(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor]:
    """Places R = T * K slots in rows where every expert starts at a multiple of `alignment`.

    Returns:
        row of each slot [R] int64; expert of each row [M] int32, -1 behind the last expert. M is
        bounded without asking the device: R rows and a tile less one for each expert.
    """
    flat = topk_idx.reshape(-1)
    device = flat.device
    experts, slot_of_rank = torch.sort(flat, stable=True)
    ids = torch.arange(num_experts, device=device)
    ends = torch.searchsorted(experts, ids, right=True)  # [E], of ranks
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    padded_ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
    shift = F.pad(padded_ends, (1, 0))[:-1] - (ends - counts)  # from rank to row, by expert
    row_of_rank = torch.arange(len(flat), device=device) + shift[experts]
    row_of_slot = torch.empty_like(row_of_rank)
    row_of_slot[slot_of_rank] = row_of_rank
    bound = -(-(len(flat) + num_experts * (alignment - 1)) // alignment) * alignment
    owner = torch.searchsorted(padded_ends, torch.arange(bound, device=device), right=True)
    return row_of_slot, torch.where(owner < num_experts, owner, -1).int()


class DeepGemm(StackedExperts):
    """DeepGEMM's grouped bf16 products between torch's gather, SwiGLU and combine.

    `m_grouped_bf16_gemm_nt_contiguous(a [M, k], b [E, n, k], d [M, n], layout int32 [M])`: row m
    belongs to expert layout[m], or to none where it is negative, and every expert starts at a
    multiple of `get_mk_alignment_for_contiguous_layout()` (sgl-deep-gemm 0.1.5).
    """

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        import deep_gemm

        alignment = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
        row_of_slot, owner = aligned_layout(topk_idx, self.num_experts, alignment)
        num_rows, (_, double_width, hidden_size) = len(owner), self.gate_up_proj.shape
        rows = x.new_empty(num_rows, hidden_size)
        rows[row_of_slot] = x.repeat_interleave(self.top_k, dim=0)
        gate_up = x.new_empty(num_rows, double_width)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, self.gate_up_proj, gate_up, owner)
        gate, up = gate_up.chunk(2, dim=-1)
        out = x.new_empty(num_rows, hidden_size)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(F.silu(gate) * up, self.down_proj, out, owner)
        of_token = out[row_of_slot].view(x.shape[0], self.top_k, hidden_size)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), of_token).squeeze(1)


class SonicMoE(StackedExperts):
    """SonicMoE on QuACK, CuTe DSL for Hopper: `moe_general_routing_inputs(x, scores fp32 [R],
    ascending tokens int32, experts int32, w1 [2h, D, E], None, w2 [D, h, E], None, E, stream,
    activation, inference, concat_layout)`; the last says that gate and up rows are not interleaved
    (sonic-moe 0.1.2.post1, `functional`)."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        y, _ = moe_general_routing_inputs(
            x,
            weights.reshape(-1),
            tokens.repeat_interleave(self.top_k),
            topk_idx.reshape(-1).int(),
            self.gate_up_proj.permute(1, 2, 0),
            None,
            self.down_proj.permute(1, 2, 0),
            None,
            self.num_experts,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
            concat_layout=True,
        )
        out: Tensor = y
        return out


def _no_sonic(setting: Setting) -> str | None:
    if setting.case.expert_width % 16:
        return "needs an expert width that is a multiple of 16"
    return (
        needs_cuda(setting, (9, 0))
        or needs_dtype(setting)
        or missing_package("quack", "quack-kernels")
        or missing_package("sonicmoe", "sonic-moe")
    )


def _transformers(name: str) -> Peer:
    return Peer(
        name=f"transformers_{name}",
        build=partial(TransformersExperts, name=name),
        unavailable=partial(_no_transformers, name=name),
    )


PEERS = (
    _transformers("grouped_mm"),
    _transformers("batched_mm"),
    _transformers("sparse_unified"),
    Peer(
        name="vllm",
        build=VllmExperts,
        unavailable=lambda setting: (
            needs_cuda(setting) or needs_dtype(setting) or missing_package(_VLLM_MODULE, "vllm")
        ),
        trains=False,
    ),
    Peer(
        name="deepgemm",
        build=DeepGemm,
        unavailable=lambda setting: (
            needs_cuda(setting, (9, 0))
            or needs_dtype(setting, torch.bfloat16)
            or missing_package("deep_gemm", "sgl-deep-gemm")
        ),
        trains=False,
    ),
    Peer(name="sonicmoe", build=SonicMoE, unavailable=_no_sonic),
)
