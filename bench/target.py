# SPDX-License-Identifier: Apache-2.0
"""What is measured on: a device, its name and state, how calls are timed, and what it reaches."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_unified import ops

from .measure import Call, EventTimer, Roof, Timer, WallTimer, inputs, measure_interleaved

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
    """A device to measure on.

    Args:
        device: of all tensors.
        name: for people.
        slug: for the name of its file in bench/results.
        timer: of its calls.
    """

    device: torch.device
    name: str
    slug: str
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
            device=torch.device("cpu"), name=processor_name(), slug="cpu", timer=WallTimer()
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


def processor_name() -> str:
    """Model of the processor and the threads in use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def device_state(device: torch.device) -> dict[str, str]:
    """Asks nvidia-smi for the state of a CUDA device; its answers as they are.

    Returns:
        Field -> value; {"nvidia-smi": why} where it gives none.
    """
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={','.join(_STATE_FIELDS)}"]
    try:
        run = subprocess.run(
            [*query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    values = (value.strip() for value in run.stdout.split(","))
    return dict(zip(_STATE_FIELDS, values, strict=False))


# (m, n, k) of x [m, k] @ w [n, k].T: a large square, and the products of the dense BAGEL FFN.
_CUDA_GEMMS = {
    "square": (8192, 8192, 8192),
    "up": (4096, 18944, 3584),
    "down": (4096, 3584, 18944),
}
_CPU_GEMM = (2048, 2048, 2048)
_CPU_FFN = (1024, 896, 4736)  # T, D, I
_CPU_COPY_BYTES, _CUDA_COPY_BYTES = 2**28, 2**31
_CPU_SOURCE = (
    "the fastest of large matrix products by torch (MKL), by oneDNN and by our own kernel; below "
    "the peak of the processor"
)
_CUDA_SOURCE = "the fastest of large cuBLAS products"


def _product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Call:
    m, n, k = shape
    (x,), (w,) = (inputs((rows, k), dtype, 1, device=device) for rows in (m, n))
    return lambda _: x @ w.t()


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype here; bf16 needs AVX-512 or its like."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _cpu_products(dtype: torch.dtype) -> dict[str, tuple[Call, float]]:
    """Name -> product and FLOPs; the best comes close to the peak of the processor."""
    t, d, i = _CPU_FFN
    flops = 2.0 * _CPU_GEMM[0] * _CPU_GEMM[1] * _CPU_GEMM[2]
    found = {"torch": (_product(_CPU_GEMM, dtype, torch.device("cpu")), flops)}
    if onednn_takes(dtype):
        (x,), (w,) = (inputs(_CPU_GEMM[:2], dtype, 1) for _ in range(2))
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
        linear = torch.ops.mkldnn._linear_pointwise
        found["onednn"] = (lambda _: linear(x, packed, None, "none", [], ""), flops)
    (tokens,), (gate,), (up,) = (inputs((n, d), dtype, 1) for n in (t, i, i))
    (down,) = inputs((d, i), dtype, 1)
    kept = torch.arange(i // 64, dtype=torch.int32)
    ffn = (lambda _: ops.pruned_ffn(tokens, kept, gate, up, down, 64), 6.0 * t * d * i)
    return found | {"pruned_ffn": ffn}


def measure_roof(dtype: torch.dtype, target: Target, repeats: int | None = None) -> Roof:
    """Measures matrix products of random data in `dtype`, and a copy of a large array."""
    copy_bytes = _CUDA_COPY_BYTES if target.is_cuda else _CPU_COPY_BYTES
    with torch.inference_mode():
        if target.is_cuda:
            products = {
                name: (_product(shape, dtype, target.device), 2.0 * shape[0] * shape[1] * shape[2])
                for name, shape in _CUDA_GEMMS.items()
            }
        else:
            products = _cpu_products(dtype)
        (source,) = inputs((copy_bytes // 4,), torch.float32, 1, device=target.device)
        copy = torch.empty_like(source)
        calls = {name: call for name, (call, _) in products.items()}
        seconds = measure_interleaved(
            calls | {"copy": lambda _: copy.copy_(source)},
            repeats=repeats or (20 if target.is_cuda else 5),
            timer=target.timer,
        )
    return Roof(
        tflops=max(flops / min(seconds[name]) for name, (_, flops) in products.items()) / 1e12,
        gbps=2 * copy_bytes / min(seconds["copy"]) / 1e9,
        gemms={
            name: flops / statistics.median(seconds[name]) / 1e12
            for name, (_, flops) in products.items()
        },
        source=_CUDA_SOURCE if target.is_cuda else _CPU_SOURCE,
    )
