# SPDX-License-Identifier: Apache-2.0
"""The expert functions of transformers 5: `grouped_mm` and `batched_mm`.

They are functions of a module with `gate_up_proj` [E, 2h, D], `down_proj` [E, D, h] and a few flags
(`transformers.integrations.moe`), tokens, experts and weights of each token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .protocol import Peer, Setting, missing_package
from .stacked import StackedExperts
from .weights import Weights

# batched_mm gathers the weights of every row; more than this is no way to run an FFN.
_MOST_GATHERED_BYTES = 2**33


class TransformersExperts(StackedExperts):
    """Our router before one of transformers' functions."""

    def __init__(self, setting: Setting, weights: Weights, name: str) -> None:
        super().__init__(setting, weights)
        from transformers.integrations import moe

        self.function: Any = getattr(moe, f"{name}_experts_forward")
        self.act_fn = F.silu
        self.has_gate, self.has_bias, self.has_post_expert_norm = True, False, False
        self.is_transposed, self.is_concatenated = False, True
        self._is_expert_parallel = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        y: Tensor = self.function(self, x, topk_idx, weights.to(x.dtype))
        return y


def _unavailable(name: str, setting: Setting) -> str | None:
    why = missing_package("transformers.integrations.moe", "transformers")
    if why is not None:
        return why
    from transformers.integrations import moe

    if not hasattr(moe, f"{name}_experts_forward"):
        return f"this transformers has no {name} experts"
    if name == "batched_mm":
        case = setting.case
        gathered = 3 * case.rows * case.expert_width * case.hidden_size * setting.dtype.itemsize
        if gathered > _MOST_GATHERED_BYTES:
            return f"would gather {gathered / 2**30:,.0f} GiB of weights"
    return None


def _peer(name: str) -> Peer:
    return Peer(
        name=f"transformers_{name}",
        unavailable=functools.partial(_unavailable, name),
        build=functools.partial(TransformersExperts, name=name),
    )


PEERS = (_peer("grouped_mm"), _peer("batched_mm"))
