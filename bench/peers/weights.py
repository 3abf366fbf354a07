# SPDX-License-Identifier: Apache-2.0
"""The weights that all peers are built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One sparse FFN: expert e is rows, and in the third columns, [e * h, (e + 1) * h).

    Args:
        gate: router [E, D].
        gate_proj, up_proj: [I, D].
        down_proj: [D, I].
    """

    gate: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def stacked(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """Copies in the layout most peers want: gate and up [E, 2h, D], down [E, D, h]."""
        gate, up = (w.view(num_experts, -1, w.shape[1]) for w in (self.gate_proj, self.up_proj))
        down = self.down_proj.view(self.down_proj.shape[0], num_experts, -1).transpose(0, 1)
        return torch.cat((gate, up), dim=1), down.contiguous()


def draw_weights(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Weights:
    """Normal weights; tokens of unit variance get logits and outputs of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.mul_(std).to(dtype)

    d, i = case.hidden_size, case.intermediate_size
    return Weights(
        gate=normal(case.num_experts, d, d**-0.5),
        gate_proj=normal(i, d, d**-0.5),
        up_proj=normal(i, d, d**-0.5),
        down_proj=normal(d, i, 0.5 * (case.top_k * case.expert_width) ** -0.5),
    )
