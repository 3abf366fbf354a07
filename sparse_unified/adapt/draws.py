# SPDX-License-Identifier: Apache-2.0
"""All randomness of a training run, as functions of the seed and of where in the run it is used.

Nothing is carried from step to step, so a run that resumes draws what an uninterrupted one draws,
and so does one on any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch

_ORDER, _SEQUENCE = 0, 1


def generator_for(seed: int, *place: int) -> torch.Generator:
    """Returns a CPU generator whose seed is a hash of all the numbers."""
    text = " ".join(map(str, (seed, *place)))
    return _generator(hashlib.sha256(text.encode()).digest())


def sequence_generators(seed: int, step: int, places: Iterable[int]) -> Iterator[torch.Generator]:
    """Yields what the sequences at places of the batch of a step draw from: for each place
    `generator_for(seed, _SEQUENCE, step, place)`."""
    common = hashlib.sha256(f"{seed} {_SEQUENCE} {step} ".encode())
    for place in places:
        own = common.copy()
        own.update(str(place).encode())
        yield _generator(own.digest())


def _generator(digest: bytes) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class DataOrder:
    """The order in which a run sees its data: a new permutation every epoch.

    Args:
        length: of the data; at least 1.
        seed: of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        """Returns the index of the datum at a position of the run, counted from 0."""
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch:
            generator = generator_for(self._seed, _ORDER, epoch)
            self._order = torch.randperm(self._length, generator=generator).tolist()
            self._epoch = epoch
        return self._order[place]
