# SPDX-License-Identifier: Apache-2.0
"""What a device reaches at most, measured before anything else: matrix products and a copy."""

from __future__ import annotations

import statistics

import torch

from .harness import Roof, inputs, measure_interleaved
from .target import Target
from .timing import Call

# (m, n, k) of x [m, k] @ w [n, k].T: a large square, and the products of the dense BAGEL FFN.
_CPU_GEMMS = {"square": (2048, 2048, 2048)}
_CUDA_GEMMS = {
    "square": (8192, 8192, 8192),
    "up": (4096, 18944, 3584),
    "down": (4096, 3584, 18944),
}
_CPU_COPY_BYTES, _CUDA_COPY_BYTES = 2**28, 2**31


def measure_roof(dtype: torch.dtype, target: Target, repeats: int | None = None) -> Roof:
    """Measures library matrix products of random data in `dtype`, and a copy of a large array."""
    gemms = _CUDA_GEMMS if target.is_cuda else _CPU_GEMMS
    copy_bytes = _CUDA_COPY_BYTES if target.is_cuda else _CPU_COPY_BYTES
    repeats = repeats or (20 if target.is_cuda else 5)
    calls: dict[str, Call] = {}
    with torch.inference_mode():
        for name, (m, n, k) in gemms.items():
            (x,), (w,) = (inputs((rows, k), dtype, 1, device=target.device) for rows in (m, n))
            calls[name] = lambda _, x=x, w=w: x @ w.t()  # type: ignore[misc]
        (source,) = inputs((copy_bytes // 4,), torch.float32, 1, device=target.device)
        copy = torch.empty_like(source)
        calls["copy"] = lambda _: copy.copy_(source)
        seconds = measure_interleaved(calls, repeats=repeats, timer=target.timer)
    flops = {name: 2 * m * n * k for name, (m, n, k) in gemms.items()}
    return Roof(
        tflops=max(flops[name] / min(seconds[name]) for name in gemms) / 1e12,
        gbps=2 * copy_bytes / min(seconds["copy"]) / 1e9,
        gemms={name: flops[name] / statistics.median(seconds[name]) / 1e12 for name in gemms},
    )
