# SPDX-License-Identifier: Apache-2.0
"""What `apply_moe_` shall do: how many experts, how many active, in which FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.partition import select_layers

# More layers than any model has; a selection is parsed against it before the model is known.
_MAX_LAYERS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Sparse FFNs of one component; the defaults are those of the released 16to8 checkpoint.

    Args:
        num_experts: E, routed experts of a layer; must divide what the shared expert leaves.
        top_k: K, experts per token, from 1 to E.
        num_shared_experts: S; the shared expert is S * (I // (E + S)) neurons wide.
        component: "gen" (`mlp_moe_gen`) or "und" (`mlp`).
        layers: "middle" (all but the first and the last), "all", "a-b" (both ends included),
            comma-separated parts of these, or a sequence of indices.

    Raises:
        ValueError: a count is out of range, or component or layers are none of the above.
        TypeError: layers are neither a string nor a sequence.
    """

    num_experts: int = 16
    top_k: int = 8
    num_shared_experts: int = 0
    component: str = "gen"
    layers: str | Sequence[int] = "middle"

    def __post_init__(self) -> None:
        for name, least in (("num_experts", 1), ("top_k", 1), ("num_shared_experts", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"MoEConfig: {name} must be an integer of at least {least}, got {value!r}"
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"MoEConfig: top_k must be at most num_experts = {self.num_experts}, "
                f"got {self.top_k}"
            )
        if self.component not in FFN_NAMES:
            raise ValueError(
                f"MoEConfig: component must be one of {', '.join(FFN_NAMES)}, "
                f"got {self.component!r}"
            )
        if not isinstance(self.layers, str):
            try:
                object.__setattr__(self, "layers", tuple(self.layers))
            except TypeError as error:
                raise TypeError(
                    "MoEConfig: layers must be a string or a sequence of integers, "
                    f"got {self.layers!r}"
                ) from error
        if self.layers not in ("middle", "all"):
            select_layers(self.layers, _MAX_LAYERS)
