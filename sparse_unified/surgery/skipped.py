# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a FFN that is skipped, where a layer cannot do without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SkippedFFN(nn.Module):
    """Zeros where a layer that always adds its FFN is not to run it.

    Args:
        like: a tensor that tells dtype and device.
        returns_tuple: return (zeros, None) as SparseUnifiedModel does.
    """

    def __init__(self, like: Tensor, *, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.register_buffer("like", like.new_empty(0), persistent=False)

    def forward(self, x: Tensor, **_: Tensor | None) -> Tensor | tuple[Tensor, None]:
        """x [..., D] -> zeros like x."""
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.returns_tuple else zeros
