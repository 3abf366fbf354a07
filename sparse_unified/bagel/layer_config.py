# SPDX-License-Identifier: Apache-2.0
"""What single layers of the decoder are made of, where they differ from the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# More than any model has, few enough for products of three to be counted in 64 bits.
_MOST = 1 << 20


def require_counts(config: Any, *, or_zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless every field typed int is from 1 (0 for `or_zero`) to 2^20."""
    for known in fields(config):
        value, least = getattr(config, known.name), 0 if known.name in or_zero else 1
        if known.type != "int" or (type(value) is int and least <= value <= _MOST):
            continue
        limit = f"at most {_MOST}" if type(value) is int and value > _MOST else f"at least {least}"
        raise ValueError(
            f"{type(config).__name__}: {known.name} must be an integer of {limit}, "
            f"got {value!r:.120}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """One sparse FFN: E routed experts of `expert_width` neurons, `top_k` of them active."""

    num_experts: int
    top_k: int
    expert_width: int
    num_shared_experts: int = 0
    shared_width: int = 0

    def __post_init__(self) -> None:
        require_counts(self, or_zero=("num_shared_experts", "shared_width"))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"ExpertConfig: top_k must be at most num_experts = {self.num_experts}, "
                f"got {self.top_k}"
            )

    @property
    def intermediate_size(self) -> int:
        """Neurons of the block, shared ones included."""
        return self.shared_width + self.num_experts * self.expert_width


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedLayer:
    """What one decoder layer still holds for one component, whose tokens pass by what is gone.

    Args:
        intermediate_size: neurons of the FFN; 0 where it is skipped.
        num_attention_heads: query heads; 0 where the attention is skipped.
        num_key_value_heads: key heads of the layer, the same for both components where both have
            an attention; 0 where the attention is skipped.
        key_heads: the key head that each group of query heads reads; None where they read all.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    key_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_counts(self, or_zero=self.__slots__)
        if (self.num_attention_heads == 0) != (self.num_key_value_heads == 0):
            raise ValueError(
                "PrunedLayer: num_attention_heads and num_key_value_heads must both be 0 or "
                f"neither, got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        heads = range(self.num_key_value_heads) if self.key_heads is None else self.key_heads
        groups = len(heads)
        if not set(heads) <= set(range(self.num_key_value_heads)) or len(set(heads)) < groups:
            raise ValueError(
                "PrunedLayer: key_heads must be different key heads below "
                f"{self.num_key_value_heads}, got {list(heads)}"
            )
        if self.num_attention_heads % max(1, groups):
            raise ValueError(
                f"PrunedLayer: num_attention_heads must be a multiple of the {groups} key heads "
                f"they read, got {self.num_attention_heads}"
            )
