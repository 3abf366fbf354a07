# SPDX-License-Identifier: Apache-2.0
"""Liger-Kernel's fused MoE: Triton, gather and SwiGLU fused, one read-back to the host.

`LigerFusedMoEFunction.apply(x, gate_up_proj [E, 2h, D], down_proj [E, D, h], index int32, weights)`
(liger-kernel 0.8.5, `ops/fused_moe.py`).
"""

from __future__ import annotations

from torch import Tensor

from .protocol import Peer, Setting, missing_package, needs_cuda
from .stacked import StackedExperts


class Liger(StackedExperts):
    """Our router before Liger's function."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        y: Tensor = LigerFusedMoEFunction.apply(
            x, self.gate_up_proj, self.down_proj, topk_idx.int(), weights.to(x.dtype)
        )
        return y


def _unavailable(setting: Setting) -> str | None:
    return needs_cuda(setting) or missing_package("liger_kernel.ops.fused_moe", "liger-kernel")


PEER = Peer(name="liger", unavailable=_unavailable, build=Liger, waits=True)
