# SPDX-License-Identifier: Apache-2.0
"""The dense modules of a decoder layer: its FFN, and a query projection with fewer heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified import _library
from sparse_unified.nn.expert_state import SCALES_OF_4_BITS, is_int8, unpack
from sparse_unified.ops.backend import CPU_REFUSAL

# Fewer tokens leave most of the kernel's vectors empty.
_KERNEL_TOKENS = 8
# More tokens are worth a copy of an int8 weight in bf16.
_INT8_TOKENS = 32
_KERNEL_DTYPES = [
    getattr(torch, kernel.split(" (")[0])
    for kernel in _library.module.build_info()["cpu_ffn_kernels"].split(", ")
    if kernel != "none" and CPU_REFUSAL is None
]
_BLOCK_SIZES = (128, 112, 96, 80, 64, 48, 32, 16)


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling a linear layer means multiplying by its weight, no more."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def _apply_packed(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer with a packed weight gives. torchao would unpack 4 bits through many times the
    bytes of the result, and on the CPU all of an int8 weight for a single token, too."""
    is_bare, weight = _is_bare(layer), cast(Any, layer.weight)
    if is_bare and hasattr(weight, SCALES_OF_4_BITS):
        return F.linear(x, unpack(weight))
    if (
        is_bare
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and 0 < x.numel() <= _INT8_TOKENS * x.shape[-1]
        and not (torch.is_grad_enabled() and x.requires_grad)
        and is_int8(weight)
    ):
        scale = weight.scale.flatten().to(x.dtype)
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        rows: Tensor = torch._weight_int8pack_mm(tokens, weight.qdata, scale)
        return rows.view(*x.shape[:-1], weight.shape[0])
    y: Tensor = layer(x)
    return y


class SwiGLU(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)), no bias.

    Args:
        hidden_size: D.
        intermediate_size: I.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]; on the CPU without gradients by the kernel of `pruned_ffn`."""
        block_size = self._kernel_block_size(x)
        if block_size == 0:
            if type(self.gate_proj.weight).dequantize is not Tensor.dequantize:
                hidden = F.silu(_apply_packed(self.gate_proj, x)) * _apply_packed(self.up_proj, x)
                return _apply_packed(self.down_proj, hidden)
            y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return y
        gate, up, down = (layer.weight for layer in (self.gate_proj, self.up_proj, self.down_proj))
        num_blocks = self.up_proj.out_features // block_size
        all_blocks = torch.arange(num_blocks, dtype=torch.int32, device=x.device)
        rows: Tensor = torch.ops.sparse_unified.pruned_ffn(
            x.flatten(0, -2), all_blocks, gate, up, down, block_size
        )
        return rows.view(x.shape)

    def _kernel_block_size(self, x: Tensor) -> int:
        """The blocks that the kernel takes the width in, or 0 where torch's products serve:

        where they are faster (docs/performance.md), or somebody has changed one of the layers.
        """
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if (
            x.device.type != "cpu"
            or x.dtype not in _KERNEL_DTYPES
            or x.numel() < _KERNEL_TOKENS * x.shape[-1]
            or torch.is_autocast_enabled("cpu")
            or not all(
                _is_bare(layer)
                and type(layer.weight) is nn.Parameter
                and layer.weight.dtype == x.dtype
                and layer.weight.device.type == "cpu"
                for layer in layers
            )
            or (
                torch.is_grad_enabled()
                and (x.requires_grad or any(layer.weight.requires_grad for layer in layers))
            )
        ):
            return 0
        width = self.up_proj.out_features
        return next((size for size in _BLOCK_SIZES if width % size == 0), 0)


class QueryProjection(nn.Linear):
    """A linear layer to the queries that says which key heads they read.

    Args:
        key_heads: the key head that each group of query heads reads, ascending; a group has
            out_features / len(key_heads) channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        key_heads: Sequence[int],
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.key_heads = tuple(key_heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, key_heads={self.key_heads}"


def key_heads_read(query: nn.Module, num_key_heads: int) -> tuple[int, ...]:
    """Returns the key head that each group of a query projection reads; a plain one reads all."""
    # Not getattr: to a module that lacks it, torch makes an error with a text each time.
    query = query._modules.get("base_layer") or query  # which peft has wrapped
    heads: tuple[int, ...] | None = vars(query).get("key_heads")
    return tuple(range(num_key_heads)) if heads is None else heads
