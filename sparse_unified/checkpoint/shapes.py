# SPDX-License-Identifier: Apache-2.0
"""What a layer of a model has left of one component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparse_unified.experts import ExpertLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer has left of one component. Heads have their numbers in the dense checkpoint.

    Attributes:
        ffn: neurons of a dense FFN, the layout of a sparse one, 0 where it is skipped.
        kv_heads: KV heads of the layer; () where the component skips the attention.
        query_groups: the KV head that each group of the component's query heads reads, ascending.
    """

    ffn: int | ExpertLayout
    kv_heads: tuple[int, ...]
    query_groups: tuple[int, ...]

    @property
    def width(self) -> int:
        """Neurons of the FFN, of all experts together where it is sparse."""
        return self.ffn if isinstance(self.ffn, int) else self.ffn.intermediate_size

    @property
    def has_attention(self) -> bool:
        """Whether the component's tokens run through the attention."""
        return bool(self.query_groups)

    @property
    def query_places(self) -> tuple[int, ...]:
        """The place among `kv_heads` of the KV head that each group of query heads reads."""
        return tuple(map(self.kv_heads.index, self.query_groups))


# Component -> layer -> its shape.
LayerShapes = Mapping[str, Mapping[int, LayerShape]]
