# SPDX-License-Identifier: Apache-2.0
"""A bounded random sample of what a FFN is given, one that parts of a pass add up to.

Every token draws a number from its sample's name and its place there; those with the lowest numbers
are kept. So the tokens are the same in every layer, and do not depend on what came first.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_DRAWS = 2**62


class KeptInputs:
    """The inputs of one FFN that are kept so far.

    Args:
        count: how many tokens at most.
        hidden_size: D.
    """

    def __init__(self, count: int, hidden_size: int) -> None:
        self.count = count
        self.inputs, self.draws = no_inputs(hidden_size if count else 0)
        self._generator = torch.Generator()

    def begin(self, sample: str) -> None:
        """Says that what comes belongs to another sample."""
        digest = hashlib.sha256(sample.encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)

    def add(self, x: Tensor) -> None:
        """Sees tokens x [T, D], of any dtype and device."""
        if not self.count:
            return
        draws = torch.randint(_DRAWS, (len(x),), generator=self._generator)
        full = len(self.draws) == self.count
        near = (draws < self.draws[-1]).nonzero()[:, 0] if full else torch.arange(len(x))
        if len(near):
            new = x[near.to(x.device)].detach().to("cpu", torch.bfloat16)
            self.inputs, self.draws = keep_lowest(
                torch.cat([self.inputs, new]), torch.cat([self.draws, draws[near]]), self.count
            )


def no_inputs(hidden_size: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the inputs [0, D] and draws [0] of an FFN of which none are kept."""
    inputs = torch.empty(0, hidden_size, dtype=torch.bfloat16)
    return inputs, torch.empty(0, dtype=torch.int64)


def keep_lowest(inputs: Tensor, draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the inputs [n, D] of the `count` lowest draws [n], and these, ascending."""
    draws, order = draws.sort(stable=True)
    return inputs[order[:count]].clone(), draws[:count].clone()
