# SPDX-License-Identifier: Apache-2.0
"""ScatterMoE: Triton, tiles that straddle experts instead of padding.

`flatten_sort_count(index, num_experts)`, then `parallel_linear(x, weights [E, in, out], k, sorted
experts, sorted slots, ends)`; `gates` [T, K] makes the second product sum the rows of a token
(scattermoe 0.3.0, `parallel_experts.py`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .protocol import Peer, Setting, missing_package, needs_cuda
from .stacked import StackedExperts


class ScatterMoE(StackedExperts):
    """Our router before two scattered products; SwiGLU is torch's."""

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        from scattermoe import flatten_sort_count, parallel_linear

        order = flatten_sort_count(topk_idx, num_experts=self.num_experts)
        gate_up = parallel_linear(
            x, self.gate_up_proj.permute(0, 2, 1), self.top_k, *order, grouped_out=True
        )
        gate, up = gate_up.chunk(2, dim=-1)
        y: Tensor = parallel_linear(
            F.silu(gate) * up,
            self.down_proj.permute(0, 2, 1),
            1,
            *order,
            grouped_in=True,
            gates=weights.to(x.dtype),
        )
        return y


def _unavailable(setting: Setting) -> str | None:
    return needs_cuda(setting) or missing_package("scattermoe", "scattermoe")


# Its histogram is bincount, which reads the largest index back.
PEER = Peer(name="scattermoe", unavailable=_unavailable, build=ScatterMoE, waits=True)
