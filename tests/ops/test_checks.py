# SPDX-License-Identifier: Apache-2.0
"""Every property of the ops on the CPU, or on emulated CUDA kernels, and on a GPU where one is."""

from __future__ import annotations

from itertools import product

import checks  # noqa: F401  (registers what no user runs)
import pytest
import torch
from tiers import IS_DEEP

from sparse_unified.checks import CPU, CUDA, EMULATED, Skip, all_checks, backend_of

BACKEND = backend_of(torch.device("cpu"))
# Index of emulation/schedule.h's Order, then of its Copies, after a seed.
SCHEDULES = {
    "forward-lazy": (1, 0, 0),
    "reverse-random": (2, 1, 2),
    "random-eager": (3, 2, 1),
    "priorities-random": (4, 3, 2),
}
Place = tuple[int, str]  # compute capability and schedule of the emulator


def cases() -> list[tuple[str, str | Place]]:
    """Checks, and where: "cpu", "cuda", or a place in the emulator.

    There each check runs on the portable kernels and on those for Hopper, under one schedule each;
    in a deep run under all of them.
    """
    if BACKEND == CPU:
        on_cuda = all_checks(CUDA) if torch.cuda.is_available() else {}
        return [*product(all_checks(CPU), ["cpu"]), *product(on_cuda, ["cuda"])]
    schedules = list(SCHEDULES)
    if IS_DEEP:
        return list(product(all_checks(EMULATED), product((80, 90), schedules)))
    return [
        (name, (capability, schedules[(position + capability // 10) % len(schedules)]))
        for position, name in enumerate(all_checks(EMULATED))
        for capability in (80, 90)
    ]


def label(value: str | Place) -> str:
    return value if isinstance(value, str) else f"sm{value[0]}-{value[1]}"


@pytest.mark.filterwarnings("ignore:Input:UserWarning")  # gradcheck asks for double precision
@pytest.mark.parametrize(("name", "place"), cases(), ids=label)
def test_property(name: str, place: str | Place) -> None:
    device = "cuda" if place == "cuda" else "cpu"
    if not isinstance(place, str):
        torch.ops.sparse_unified_emulation.set_device(place[0])
        torch.ops.sparse_unified_emulation.set_schedule(*SCHEDULES[place[1]])
    try:
        all_checks()[name](torch.device(device))
    except Skip as reason:
        pytest.skip(str(reason))
