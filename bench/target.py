# SPDX-License-Identifier: Apache-2.0
"""What is measured on: a device, its name and state, how calls are timed, and what it reaches."""

from __future__ import annotations

import ctypes
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sparse_unified import _library
from sparse_unified.ops.choices import processor_name

from .measure import EventTimer, Roof, Timer, inputs, measure_interleaved, wall_clock

_STATE_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "memory.used",
    "clocks_event_reasons.active",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to measure on, and how calls are timed there."""

    device: torch.device
    name: str  # for people
    slug: str  # for the name of its file in bench/results
    timer: Timer

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def state(self) -> dict[str, str]:
        """Clocks, power and reasons of a lowered clock, as nvidia-smi writes them; or none."""
        return device_state(self.device) if self.is_cuda else {}


def find_target(name: str) -> Target:
    """Returns the device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: the name is no device that this torch finds here.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"bench: device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if name == "cpu":
        return Target(
            device=torch.device("cpu"),
            name=f"{processor_name()}, {torch.get_num_threads()} threads",
            slug="cpu",
            timer=wall_clock,
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0)
    if index >= count:
        raise ValueError(
            f"bench: device must be one of the {count} that torch {torch.__version__} finds here, "
            f"got {name!r}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    model = torch.cuda.get_device_name(device)
    return Target(device=device, name=model, slug=slug(model), timer=EventTimer(device))


def slug(model: str) -> str:
    """Shortens the name of a GPU: "NVIDIA H200" -> "h200"."""
    words = re.sub(r"\b(nvidia|geforce|tesla|graphics|device)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "gpu"


def device_state(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of a CUDA device, by field; or {"nvidia-smi": why it says nothing}."""
    uuid = torch.cuda.get_device_properties(device).uuid
    fields = ",".join(_STATE_FIELDS)
    query = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    values = (value.strip() for value in run.stdout.split(","))
    return dict(zip(_STATE_FIELDS, values, strict=False))


# Levels of `sparse_unified_peak` in csrc/cpu/roof.cpp; the last multiplies bf16.
_LEVELS = ("baseline", "AVX2", "AVX-512", "AVX-512 bf16")
_PEAK_STEPS = 200_000  # a millisecond, which a busy machine grants now and then
_CPU_TRIAD_BYTES, _CUDA_TRIAD_BYTES = 2**27, 2**31
# (m, n, k) of x [m, k] @ w [n, k].T: a large square, and the products of the dense BAGEL FFN.
_CUDA_GEMMS = {
    "square": (8192, 8192, 8192),
    "up": (4096, 18944, 3584),
    "down": (4096, 3584, 18944),
}
# Operations a clock that the tensor cores of a multiprocessor do on 16 bits, by capability: the
# tables of NVIDIA's architecture white papers.
_TENSOR_OPS = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}


def measure_roof(dtype: torch.dtype, target: Target) -> Roof:
    """Finds what no arithmetic in `dtype` and no pass over memory on a device can exceed."""
    return (_cuda_roof if target.is_cuda else _cpu_roof)(dtype, target)


def _rate(run: Callable[[int], float], threads: int, rounds: int) -> float:
    """What threads that run at once do a second, in the best round; `run` tells what one did."""

    def timed(index: int) -> float:
        began = time.perf_counter()
        amount = run(index)
        return amount / (time.perf_counter() - began)

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(timed, range(threads))) for _ in range(rounds))


def _cpu_roof(dtype: torch.dtype, target: Target) -> Roof:
    """Loops of multiply-adds on registers, and a triad past the caches, on 1 and on all threads."""
    library = ctypes.CDLL(_library.module.__file__)  # whose calls run beside each other
    peak, triad = library.sparse_unified_peak, library.sparse_unified_triad
    peak.restype, peak.argtypes = ctypes.c_double, (ctypes.c_int, ctypes.c_int64)
    triad.restype, triad.argtypes = None, (*[ctypes.c_void_p] * 3, ctypes.c_int64)
    threads = torch.get_num_threads()

    def peak_loop(level: int, _: int) -> float:
        operations: float = peak(level, _PEAK_STEPS)
        return operations

    peaks = {
        name: {
            str(count): _rate(partial(peak_loop, level), count, 200) / 1e12
            for count in sorted({1, threads})
        }
        for level, name in enumerate(_LEVELS)
        if peak(level, 1) > 0
    }
    usable = {name: found[str(threads)] for name, found in peaks.items()}
    if dtype != torch.bfloat16:
        usable.pop(_LEVELS[3], None)
    elif torch.cpu._is_amx_tile_supported():  # for which there is no loop
        (x,) = inputs((4096, 4096), dtype, 1)
        seconds = measure_interleaved({"": lambda _: x @ x}, repeats=5)[""]
        usable["the fastest product by torch (AMX)"] = 2.0 * 4096**3 / min(seconds) / 1e12
    best = max(usable, key=usable.__getitem__)
    arrays = [torch.ones(_CPU_TRIAD_BYTES // 4) for _ in range(3)]
    part = len(arrays[0]) // threads // 4 * 4

    def stream(index: int) -> float:
        triad(*(array.data_ptr() + 4 * part * index for array in arrays), part)
        return 12.0 * part

    return Roof(
        tflops=usable[best],
        gbps=_rate(stream, threads, 20) / 1e9,
        source=f"multiply-adds on registers, {best}, {threads} threads",
        peaks=peaks,
    )


def _cuda_roof(dtype: torch.dtype, target: Target) -> Roof:
    """The arithmetic of all tensor cores at the highest clock, or of the fastest product."""
    facts = torch.cuda.get_device_properties(target.device)
    gemms = {}
    with torch.inference_mode():
        for name, (m, n, k) in _CUDA_GEMMS.items():
            (x,), (w,) = (inputs((r, k), dtype, 1, device=target.device) for r in (m, n))
            calls: dict[str, Any] = {name: lambda _, x=x, w=w: x @ w.t()}
            seconds = measure_interleaved(calls, repeats=20, timer=target.timer)[name]
            gemms[name] = 2.0 * m * n * k / statistics.median(seconds) / 1e12
        arrays = [torch.ones(_CUDA_TRIAD_BYTES // 4, device=target.device) for _ in range(3)]
        calls = {"triad": lambda _: torch.add(*arrays[:2], alpha=3, out=arrays[2])}
        seconds = measure_interleaved(calls, repeats=20, timer=target.timer)["triad"]
    clock = re.match(r"(\d+) MHz", target.state().get("clocks.max.sm", ""))
    per_clock = _TENSOR_OPS.get((facts.major, facts.minor))
    tflops, source = max(gemms.values()), "the fastest cuBLAS product"
    if clock is not None and per_clock is not None and dtype.itemsize == 2:
        tflops = facts.multi_processor_count * per_clock * int(clock[1]) / 1e6
        source = f"tensor cores of {facts.multi_processor_count} SMs at {clock[1]} MHz"
    gbps = 3 * _CUDA_TRIAD_BYTES / min(seconds) / 1e9
    return Roof(tflops=tflops, gbps=gbps, source=source, gemms=gemms)
