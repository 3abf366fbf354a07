# SPDX-License-Identifier: Apache-2.0
"""Peers that need only torch: the dense FFN in five ways, two pipelines, and our block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.nn import SparseMoE, SwiGLU

from ..measure import name_of
from ..target import onednn_takes
from .base import Peer, Provider, Setting, StackedExperts, Weights

# Blocks of the width that pruned_ffn takes, the best first.
_BLOCK_SIZES = (128, 64, 32, 16)


def _swiglu(weights: Weights, rows: slice) -> SwiGLU:
    """A dense FFN of some of the neurons, in memory of its own."""
    ffn = SwiGLU(weights.gate_proj.shape[1], 1, device="meta")
    for name, part in (
        ("gate_proj", weights.gate_proj[rows]),
        ("up_proj", weights.up_proj[rows]),
        ("down_proj", weights.down_proj[:, rows]),
    ):
        weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
        getattr(ffn, name).weight = weight
    return ffn


class Dense(Provider):
    """The first `num_experts` experts as one dense FFN: each weighs 1 for every token."""

    def __init__(
        self, setting: Setting, weights: Weights, *, half: bool = False, compiled: bool = False
    ) -> None:
        super().__init__()
        case = setting.case
        self.num_experts = case.top_k if half else case.num_experts
        self.ffn = _swiglu(weights, slice(self.num_experts * case.expert_width))
        if compiled:
            # Other sizes of the same function count against a limit of the compiler.
            torch.compiler.reset()
            self.ffn.compile(fullgraph=True, dynamic=False)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_idx = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
        return torch.ones_like(topk_idx, dtype=torch.float32), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(x)
        return y


class DenseOurs(Dense):
    """The dense FFN by our own kernel: pruned_ffn with all blocks kept."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__(setting, weights)
        width = setting.case.intermediate_size
        self.block_size = next(size for size in _BLOCK_SIZES if width % size == 0)
        self.kept = torch.arange(width // self.block_size, dtype=torch.int32, device=setting.device)

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.ffn
        weights = (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
        return ops.pruned_ffn(x, self.kept, *weights, self.block_size)


class DenseOneDnn(Dense):
    """The dense FFN by oneDNN on packed weights; torch's own products may be MKL's, which takes
    its AVX2 path on AMD processors."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__(setting, weights)
        pack = torch.ops.mkldnn._reorder_linear_weight
        ffn = self.ffn
        self.packed = [
            pack(layer.weight.detach(), setting.case.tokens)
            for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        ]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (partial(_onednn_linear, weight=weight) for weight in self.packed)
        return down(F.silu(gate(x)) * up(x))


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


class ExpertLoop(Provider):
    """The official style: a module per expert, a Python loop, one `index_add` per expert."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.top_k = case.top_k
        self.gate = nn.Linear(case.hidden_size, case.num_experts, bias=False, device="meta")
        self.gate.weight = nn.Parameter(weights.gate.clone())
        width = case.expert_width
        self.experts = nn.ModuleList(
            _swiglu(weights, slice(e * width, (e + 1) * width)) for e in range(case.num_experts)
        )

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_logits, topk_idx = torch.topk(self.gate(x), self.top_k, dim=-1)
        return 1 + topk_logits.float(), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)  # [T, E]
        chosen = torch.topk(logits, self.top_k, dim=-1).indices
        weights = logits.gather(1, chosen)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)  # [E, K, T]
        y = torch.zeros_like(x)
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            rows = self.experts[expert](x[token])
            y = y.index_add(0, token, rows + rows * weights[token, slot, None])
        return y


def find_grouped_mm() -> Callable[..., Tensor] | None:
    """The public function, or the private one of older releases."""
    found: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
    return found or getattr(torch, "_grouped_mm", None)


class GroupedMm(StackedExperts):
    """The pipeline that torch alone allows: sort, gather, `grouped_mm`, SwiGLU, `grouped_mm`, sum.

    Nothing is read back to the host. `grouped_mm` takes the end of each group as int32 on the
    device and rows that start at multiples of 16 bytes (torch 2.10, its documentation).
    """

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        grouped_mm = find_grouped_mm()
        assert grouped_mm is not None
        experts, slot_of_row = torch.sort(topk_idx.reshape(-1), stable=True)  # [R]
        ids = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(experts, ids, right=True, out_int32=True)  # [E]
        rows = x[slot_of_row // self.top_k]  # [R, D]
        gate, up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=x.device)
        of_token = out[row_of_slot].view(x.shape[0], self.top_k, -1)  # [T, K, D]
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), of_token).squeeze(1)


class Ours(Provider):
    """`SparseMoE` on the kernels of the device; composed torch ops are not what is measured."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.block = SparseMoE(
            case.hidden_size,
            case.intermediate_size,
            case.num_experts,
            case.top_k,
            return_router_logits=False,
            strict=True,
            device="meta",
            dtype=setting.dtype,
        )
        self.block.gate.weight = nn.Parameter(weights.gate.clone())
        self.block.gate_shared.weight = nn.Parameter(torch.zeros_like(weights.gate[:1]))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self.block, name, nn.Parameter(getattr(weights, name).clone()))

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, topk_logits, topk_idx = ops.route_topk(x, self.block.gate.weight, self.block.top_k)
        return 1 + topk_logits, topk_idx

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def _no_grouped_mm(setting: Setting) -> str | None:
    if find_grouped_mm() is None:
        return f"torch {torch.__version__} has no grouped_mm"
    per_row = 16 // setting.dtype.itemsize
    if setting.case.hidden_size % per_row or setting.case.expert_width % per_row:
        return f"needs hidden size and expert width to be multiples of {per_row}"
    return None


def _no_onednn(setting: Setting) -> str | None:
    if setting.device.type != "cpu":
        return "needs the CPU"
    if onednn_takes(setting.dtype):
        return None
    return f"oneDNN takes no {name_of(setting.dtype)} on this processor"


def _no_blocks(setting: Setting) -> str | None:
    if setting.case.intermediate_size % _BLOCK_SIZES[-1]:
        return f"needs a width that is a multiple of {_BLOCK_SIZES[-1]}"
    return None


def _no_kernels(setting: Setting) -> str | None:
    """Asks a block of one expert, and of no size to speak of, what would run it on CUDA."""
    if setting.device.type == "cpu":
        return None
    case = setting.case
    probe = SparseMoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        device=setting.device,
        dtype=setting.dtype,
    )
    backend = probe.active_backend
    return backend if backend.startswith("torch") else None


PEERS = (
    Peer(name="dense", build=Dense, formula="dense_ffn"),
    Peer(name="dense_half", build=partial(Dense, half=True), formula="half_ffn"),
    Peer(name="dense_compile", build=partial(Dense, compiled=True), formula="dense_ffn"),
    Peer(
        name="dense_onednn",
        build=DenseOneDnn,
        unavailable=_no_onednn,
        formula="dense_ffn",
        trains=False,
    ),
    Peer(name="dense_ours", build=DenseOurs, unavailable=_no_blocks, formula="dense_ffn"),
    Peer(name="expert_loop", build=ExpertLoop, synchronises=True),
    Peer(name="grouped_mm", build=GroupedMm, unavailable=_no_grouped_mm),
)
OURS = Peer(name="sparse_unified", build=Ours, unavailable=_no_kernels)
