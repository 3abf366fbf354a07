# SPDX-License-Identifier: Apache-2.0
"""vLLM's fused experts: a Triton kernel, forward only.

`fused_experts(hidden_states, w1 [E, 2h, D], w2 [E, D, h], topk_weights fp32, topk_ids)`
(vllm, `model_executor/layers/fused_moe/fused_moe.py`).
"""

from __future__ import annotations

from torch import Tensor

from .protocol import Peer, Setting, missing_package, needs_cuda, needs_half
from .stacked import StackedExperts

_MODULE = "vllm.model_executor.layers.fused_moe.fused_moe"


class VllmExperts(StackedExperts):
    """Our router before vLLM's function."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        y: Tensor = fused_experts(
            hidden_states=x,
            w1=self.gate_up_proj,
            w2=self.down_proj,
            topk_weights=weights,
            topk_ids=topk_idx.int(),
        )
        return y


def _unavailable(setting: Setting) -> str | None:
    return needs_cuda(setting) or needs_half(setting) or missing_package(_MODULE, "vllm")


PEER = Peer(name="vllm", unavailable=_unavailable, build=VllmExperts, trains=False)
