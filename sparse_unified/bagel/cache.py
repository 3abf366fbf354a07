# SPDX-License-Identifier: Apache-2.0
"""What a sequence remembers: keys and values of every layer, and the next rotary position."""

from __future__ import annotations

import torch
from torch import Tensor


class Context:
    """Keys and values of one sequence, [num_kv_heads, length, head_dim] per layer.

    Tensors are replaced and never written to, so a fork costs nothing and shares them.
    """

    __slots__ = ("keys", "length", "position", "values")

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.length = 0
        self.position = 0

    def fork(self) -> Context:
        """Returns a context with the same past and a future of its own."""
        copy = Context(len(self.keys))
        copy.keys, copy.values = list(self.keys), list(self.values)
        copy.length, copy.position = self.length, self.position
        return copy

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the past of a layer followed by `key` and `value` [num_kv_heads, n, head_dim]."""
        past_key, past_value = self.keys[layer], self.values[layer]
        if past_key is None or past_value is None:
            return key, value
        return torch.cat([past_key, key], dim=1), torch.cat([past_value, value], dim=1)

    def advance(self, num_tokens: int, num_positions: int) -> None:
        """Counts tokens whose keys and values every layer has taken up."""
        self.length += num_tokens
        self.position += num_positions

    def same_past(self, other: Context) -> bool:
        """Tells whether both are forks of one context that nothing was added to."""
        return (
            self.length == other.length
            and self.position == other.position
            and all(mine is theirs for mine, theirs in zip(self.keys, other.keys, strict=True))
        )
