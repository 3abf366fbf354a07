# SPDX-License-Identifier: Apache-2.0
"""The dense modules of a decoder layer: its FFN, and a query projection with fewer heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.gate_proj = nn.Linear(
            hidden_size, intermediate_size, bias=False, device=device, dtype=dtype
        )
        self.up_proj = nn.Linear(
            hidden_size, intermediate_size, bias=False, device=device, dtype=dtype
        )
        self.down_proj = nn.Linear(
            intermediate_size, hidden_size, bias=False, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


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
    heads: tuple[int, ...] | None = vars(query).get("key_heads")
    return tuple(range(num_key_heads)) if heads is None else heads
