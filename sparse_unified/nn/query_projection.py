# SPDX-License-Identifier: Apache-2.0
"""The query projection of an attention whose query heads read some of the key heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


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
