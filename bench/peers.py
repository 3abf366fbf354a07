# SPDX-License-Identifier: Apache-2.0
"""Who computes the sparse FFN: ours, the dense FFN in five ways, a loop, and grouped products.

Each is a `Peer`, which builds itself from the same weights, or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.engines.transformers import register
from sparse_unified.nn import SparseMoE

from .cases import Case
from .measure import NotMeasured, first_line, name_of

# Blocks of the width that pruned_ffn takes, the best first.
_BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is to be computed, and where."""

    case: Case
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One sparse FFN: expert e is rows, and in the third columns, [e * h, (e + 1) * h).

    Args:
        gate: router [E, D].
        gate_proj, up_proj: [I, D].
        down_proj: [D, I].
    """

    gate: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor


def draw_weights(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Weights:
    """Normal weights; tokens of unit variance get logits and outputs of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.mul_(std).to(dtype)

    d, i = case.hidden_size, case.intermediate_size
    return Weights(
        gate=normal(case.num_experts, d, d**-0.5),
        gate_proj=normal(i, d, d**-0.5),
        up_proj=normal(i, d, d**-0.5),
        down_proj=normal(d, i, 0.5 * (case.top_k * case.expert_width) ** -0.5),
    )


class Provider(nn.Module):
    """One implementation, built for a case: x [T, D] -> y [T, D].

    Router parameters are named `...gate.weight`; all others belong to experts.

    Raises:
        NotMeasured: it cannot run in this setting.
    """

    has_router = True

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        case = setting.case
        self.num_experts, self.top_k = case.num_experts, case.top_k
        self.gate = nn.Linear(case.hidden_size, case.num_experts, bias=False, device="meta")
        self.gate.weight = nn.Parameter(weights.gate.clone())

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What forward uses: weights [T, K] fp32 and experts [T, K]; the result is judged by it."""
        topk_logits, topk_idx = torch.topk(self.gate(x), self.top_k, dim=-1)
        return 1 + topk_logits.float(), topk_idx


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An implementation, before it is built.

    Args:
        build: makes it; may raise anything, which is then the reason why it was not measured.
        formula: of `work`, what it computes.
        trains: it has a backward pass.
        synchronises: it reads sizes back to the host, so no graph can hold it.
    """

    build: Callable[[Setting, Weights], Provider]
    formula: str = "sparse_ffn"
    trains: bool = True
    synchronises: bool = False


# Dense


class TorchFfn(nn.Module):
    """SwiGLU by torch's own products alone: `nn.SwiGLU` may run our kernels."""

    def __init__(self, hidden_size: int, width: int, **options: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False, **options)
        self.up_proj = nn.Linear(hidden_size, width, bias=False, **options)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class PrunedFfn(nn.Module):
    """pruned_ffn on the weights of `dense`; some of its blocks are kept, drawn at random."""

    def __init__(self, dense: TorchFfn, block_size: int, num_kept: int) -> None:
        super().__init__()
        self.dense, self.block_size = dense, block_size
        num_blocks = dense.gate_proj.weight.shape[0] // block_size
        drawn = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self.kept_blocks = drawn[:num_kept].sort().values.int().to(dense.gate_proj.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        ffn = self.dense
        weights = (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
        return ops.pruned_ffn(x, self.kept_blocks, *weights, self.block_size)


def _torch_ffn(weights: Weights, rows: slice) -> TorchFfn:
    """A dense FFN of some of the neurons, in memory of its own."""
    ffn = TorchFfn(weights.gate_proj.shape[1], 1, device="meta")
    parts = (weights.gate_proj[rows], weights.up_proj[rows], weights.down_proj[:, rows])
    for layer, part in zip((ffn.gate_proj, ffn.up_proj, ffn.down_proj), parts, strict=True):
        layer.weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
    return ffn


class Dense(Provider):
    """The first `num_experts` experts as one dense FFN: each weighs 1 for every token."""

    has_router = False

    def __init__(
        self, setting: Setting, weights: Weights, *, half: bool = False, compiled: bool = False
    ) -> None:
        super().__init__(setting, weights)
        self.num_experts = self.top_k if half else self.num_experts
        self.ffn: Any = _torch_ffn(weights, slice(self.num_experts * setting.case.expert_width))
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
        if width % _BLOCK_SIZES[-1]:
            raise NotMeasured(f"needs a width that is a multiple of {_BLOCK_SIZES[-1]}")
        size = next(size for size in _BLOCK_SIZES if width % size == 0)
        self.ffn = PrunedFfn(self.ffn, size, width // size)


class DenseOneDnn(Dense):
    """The dense FFN by oneDNN on packed weights; torch's own products may be MKL's, which takes
    its AVX2 path on AMD processors."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        if setting.device.type != "cpu":
            raise NotMeasured("needs the CPU")
        # It multiplies bf16 where the processor has AVX-512 or its like.
        is_taken = setting.dtype == torch.float32 or (
            setting.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if not (torch.backends.mkldnn.is_available() and is_taken):
            raise NotMeasured(f"oneDNN takes no {name_of(setting.dtype)} on this processor")
        super().__init__(setting, weights)
        pack, ffn = torch.ops.mkldnn._reorder_linear_weight, self.ffn
        self.packed = [
            pack(layer.weight.detach(), setting.case.tokens)
            for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        ]

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate, up = (linear(x, weight, None, "none", [], "") for weight in self.packed[:2])
        y: Tensor = linear(F.silu(gate) * up, self.packed[2], None, "none", [], "")
        return y


# Sparse


class ExpertLoop(Provider):
    """The official style: a module per expert, a Python loop, one `index_add` per expert."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__(setting, weights)
        width = setting.case.expert_width
        self.experts = nn.ModuleList(
            _torch_ffn(weights, slice(e * width, (e + 1) * width)) for e in range(self.num_experts)
        )

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


class GroupedMm(Provider):
    """The pipeline that torch alone allows: sort, gather, `grouped_mm`, SwiGLU, `grouped_mm`, sum.

    Experts are `gate_up_proj` [E, 2h, D] and `down_proj` [E, D, h]. Nothing is read back to the
    host. `grouped_mm` takes the end of each group as int32 on the device and rows that start at
    multiples of 16 bytes (torch 2.10, its documentation).
    """

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__(setting, weights)
        hidden_size = setting.case.hidden_size
        gate, up = (
            w.view(self.num_experts, -1, hidden_size) for w in (weights.gate_proj, weights.up_proj)
        )
        down = weights.down_proj.view(hidden_size, self.num_experts, -1).transpose(0, 1)
        self.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1))
        self.down_proj = nn.Parameter(down.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.routing(x))

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        """The experts: x [T, D], weights [T, K] fp32, topk_idx [T, K] int64 -> y [T, D]."""
        experts, slot_of_row = torch.sort(topk_idx.reshape(-1), stable=True)  # [R]
        ids = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(experts, ids, right=True, out_int32=True)  # [E]
        rows = x[slot_of_row // self.top_k]  # [R, D]
        up_proj, down_proj = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        gate, up = F.grouped_mm(rows, up_proj, offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, down_proj, offs=ends)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=x.device)
        of_token = out[row_of_slot].view(x.shape[0], self.top_k, -1)  # [T, K, D]
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), of_token).squeeze(1)


class TransformersExperts(GroupedMm):
    """The expert functions of transformers 5, `grouped_mm` and ours among them: functions of a
    module with these weights and flags, tokens, experts and weights."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_transposed, is_concatenated, _is_expert_parallel = False, True, False
    _apply_gate: Any = None  # of the class, where those who call it look

    def __init__(self, setting: Setting, weights: Weights, name: str) -> None:
        super().__init__(setting, weights)
        try:  # importing it is the only proof, and may raise anything
            from transformers.integrations import moe

            register()
        except Exception as error:
            reason = f"transformers 5 cannot be imported: {first_line(error)}"
            raise NotMeasured(reason) from error
        self.function: Any = moe.ALL_EXPERTS_FUNCTIONS[name]
        type(self)._apply_gate = moe._default_apply_gate
        self.act_fn = nn.SiLU()

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        y: Tensor = self.function(self, x, topk_idx, weights.to(x.dtype))
        return y


class Ours(Provider):
    """`SparseMoE` on the kernels of the device, or else on composed torch ops if not `strict`."""

    def __init__(self, setting: Setting, weights: Weights, *, strict: bool = True) -> None:
        super().__init__(setting, weights)
        case = setting.case
        self.block = SparseMoE(
            case.hidden_size,
            case.intermediate_size,
            case.num_experts,
            case.top_k,
            gate_shared=False,
            return_router_logits=False,
            strict=strict,
            device="meta",
            dtype=setting.dtype,
        )
        self.block.gate = self.gate
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self.block, name, nn.Parameter(getattr(weights, name).clone()))

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, topk_logits, topk_idx = ops.route_topk(x, self.gate.weight, self.top_k)
        return 1 + topk_logits, topk_idx

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


PEERS = {
    "dense": Peer(build=Dense, formula="dense_ffn"),
    "dense_half": Peer(build=partial(Dense, half=True), formula="half_ffn"),
    "dense_compile": Peer(build=partial(Dense, compiled=True), formula="dense_ffn"),
    "dense_onednn": Peer(build=DenseOneDnn, formula="dense_ffn", trains=False),
    "dense_ours": Peer(build=DenseOurs, formula="dense_ffn"),
    "expert_loop": Peer(build=ExpertLoop, synchronises=True),
    "grouped_mm": Peer(build=GroupedMm),
    "transformers_grouped_mm": Peer(build=partial(TransformersExperts, name="grouped_mm")),
    "transformers_sparse_unified": Peer(build=partial(TransformersExperts, name="sparse_unified")),
    "sparse_unified": Peer(build=Ours),
}
