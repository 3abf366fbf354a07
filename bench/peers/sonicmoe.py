# SPDX-License-Identifier: Apache-2.0
"""SonicMoE on QuACK: CuTe DSL kernels for Hopper, whole layer, any router scores.

`moe_general_routing_inputs(x, scores fp32 [R], token of each score int32, ascending, expert of each
int32, w1 [2h, D, E], None, w2 [D, h, E], None, E, stream, activation, inference, concat_layout)`;
the last says that gate and up rows are not interleaved (sonic-moe 0.1.2.post1, `functional`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Peer, Setting, missing_package, needs_cuda, needs_half
from .stacked import StackedExperts


class SonicMoE(StackedExperts):
    """Our router before SonicMoE's function."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        y, _ = moe_general_routing_inputs(
            x,
            weights.reshape(-1),
            tokens.repeat_interleave(self.top_k),
            topk_idx.reshape(-1).int(),
            self.gate_up_proj.permute(1, 2, 0),
            None,
            self.down_proj.permute(1, 2, 0),
            None,
            self.num_experts,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
            concat_layout=True,
        )
        out: Tensor = y
        return out


def _unavailable(setting: Setting) -> str | None:
    if setting.case.expert_width % 16:
        return "needs an expert width that is a multiple of 16"
    return (
        needs_cuda(setting, (9, 0))
        or needs_half(setting)
        or missing_package("quack", "quack-kernels")
        or missing_package("sonicmoe", "sonic-moe")
    )


PEER = Peer(name="sonicmoe", unavailable=_unavailable, build=SonicMoE)
