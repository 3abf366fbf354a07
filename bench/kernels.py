# SPDX-License-Identifier: Apache-2.0
"""Time inside grouped_ffn: each of its CUDA kernels, as torch's profiler records them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .cases import Case

# The products of the forward pass, in the order of their launches, and their FLOPs over R * D * h.
PHASES = {"up": 4, "down": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel of one op: `phase` says which product it is, `tflops` how fast, or neither."""

    case: str
    dtype: str
    name: str
    median_us: float
    phase: str | None = None
    tflops: float | None = None


def label_phases(names: Sequence[str], medians: Sequence[float]) -> dict[str, str]:
    """Kernel -> product: the two longest are the products, the one launched first is `up`."""
    longest = sorted(range(len(names)), key=lambda i: -medians[i])[: len(PHASES)]
    return {names[i]: phase for i, phase in zip(sorted(longest), PHASES, strict=False)}


def summarize(
    launches: Sequence[tuple[str, float]], case: Case, dtype: torch.dtype
) -> list[Kernel]:
    """Sums up (kernel, microseconds) in launch order, of any number of calls."""
    durations: dict[str, list[float]] = {}
    for name, duration in launches:
        durations.setdefault(name, []).append(duration)
    names = list(durations)
    medians = [statistics.median(durations[name]) for name in names]
    phases = label_phases(names, medians)
    product = case.rows * case.hidden_size * case.expert_width
    kernels = []
    for name, median in zip(names, medians, strict=True):
        phase = phases.get(name)
        rate = PHASES[phase] * product / median / 1e6 if phase else None
        kernels.append(
            Kernel(
                case=case.name,
                dtype=str(dtype).removeprefix("torch."),
                name=name[:200],
                median_us=median,
                phase=phase,
                tflops=rate,
            )
        )
    return kernels


def profile(
    call: Callable[[], object], case: Case, dtype: torch.dtype, repeats: int = 20
) -> list[Kernel]:
    """Profiles a call of grouped_ffn on the current CUDA device.

    Raises:
        RuntimeError: the profiler recorded no kernel.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = [
        event
        for event in recorded.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    events.sort(key=lambda event: event.time_range.start)
    launches = [
        (event.name, event.time_range.end - event.time_range.start)
        for event in events
        if "memcpy" not in event.name.lower() and "memset" not in event.name.lower()
    ]
    if not launches:
        raise RuntimeError("the profiler recorded no kernel")
    return summarize(launches, case, dtype)
