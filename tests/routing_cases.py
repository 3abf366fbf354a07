# SPDX-License-Identifier: Apache-2.0
"""A FFN whose neurons come in blocks that fire together, in shuffled order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockFfn(NamedTuple):
    """gate_proj, up_proj [I, D], down_proj [D, I], and the block of each neuron [I]."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    block: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj, self.up_proj, self.down_proj


def block_ffn(
    *, hidden: int = 64, width: int = 512, blocks: int = 16, spread: float = 0.3, seed: int = 0
) -> BlockFfn:
    """The gate rows of a block are a direction of its own plus `spread` times noise."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    block = (torch.arange(width) % blocks)[torch.randperm(width, generator=generator)]
    gate_proj = random(blocks, hidden)[block] + spread * random(width, hidden)
    return BlockFfn(
        gate_proj=2 * hidden**-0.5 * gate_proj,
        up_proj=hidden**-0.5 * random(width, hidden),
        down_proj=width**-0.5 * random(hidden, width),
        block=block,
    )


def unit_tokens(count: int, *, hidden: int = 64, seed: int = 1) -> Tensor:
    """Tokens [count, hidden] of unit mean square, with a common mean, as behind an RMS norm."""
    mean = torch.randn(hidden, generator=torch.Generator().manual_seed(7))
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)) + 0.3 * mean
    return x * x.square().mean(1, keepdim=True).rsqrt()
