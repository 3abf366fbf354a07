# SPDX-License-Identifier: Apache-2.0
"""Which kernels take a sparse FFN, and why none does."""

from __future__ import annotations

import functools
import os
import re

import torch

from sparse_unified import _library
from sparse_unified.ops import choices

CPU = "cpu"
CUDA = "cuda"
GROUPED_MM = "cuda, grouped_mm"
SCALED_MM = "cuda, scaled_grouped_mm"

# Which kernels csrc/cuda/grouped_ffn_config.h takes; "family=grouped_mm" is for this file.
OVERRIDE = "SPARSE_UNIFIED_GROUPED_FFN"

# What the CUDA kernels take: csrc/cuda/grouped_ffn.cu refuses the same, kMaxCudaExperts is of
# csrc/include/sparse_unified/route_topk.h; tests/ops/test_emulated.py compares.
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_MULTIPLE = 8
_CUDA_MAX_EXPERTS = 256
# What torch's scaled_grouped_mm takes, see ATen/native/cuda/GroupedBlas.cpp: 16 bytes of fp8.
_FP8_CAPABILITIES = (9, 10)
_FP8_MULTIPLE = 16
# Why the CPU runs no kernel of ours, or None.
CPU_REFUSAL = choices.refusal(torch.device(CPU))


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code of one of the architectures runs on a device.

    Args:
        architectures: sm_80 (runs on its major version from its minor version on), sm_90a (on
            exactly its own) or compute_80 (translated, for all newer ones).
        capability: of the device, as (major, minor).
    """
    for kind, major, minor, exact in re.findall(
        r"\b(sm|compute)_(\d+)(\d)([a-z]?)\b", " ".join(architectures)
    ):
        own = (int(major), int(minor))
        newer = own <= capability and (kind == "compute" or own[0] == capability[0])
        if own == capability if exact else newer:
            return True
    return False


def architectures() -> tuple[str, ...]:
    """What the library has code for, sm_80 say; nothing without CUDA."""
    codes: str = _library.module.build_info()["cuda_architectures"]
    return () if codes == "none" else tuple(codes.split())


@torch.compiler.assume_constant_result  # the compiler could not trace it
def device_refusal(device: torch.device) -> str | None:
    """Says why this library runs no CUDA kernel on a device of type "cuda", or None."""
    return _device_refusal(device)


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    facts = _library.module.build_info()
    codes, toolkit, driver = (
        facts[f"cuda_{name}"] for name in ("architectures", "toolkit", "driver")
    )
    if codes == "none":
        return "this build has no CUDA kernels, because it was made without nvcc"
    if torch.version.hip:
        return "the CUDA kernels do not run on ROCm"
    # A driver runs code of all toolkits of its major version; compressed code needs 12.4.
    newest = int(toolkit.split(".")[0])
    least = (newest, 4 if newest == 12 else 0)
    if driver == "none" or tuple(map(int, driver.split("."))) < least:
        return (
            f"CUDA kernels of toolkit {toolkit} need a driver for CUDA {least[0]}.{least[1]} or "
            f"newer, got one for {driver}"
        )
    major, minor = _capability(device)
    if not runs_on(tuple(codes.split()), (major, minor)):
        return f"the CUDA kernels have code for {codes}, got compute capability {major}.{minor}"
    return choices.refusal(device)


def prefers_grouped_mm(
    device: torch.device, sizes: tuple[int, ...] = (), num_rows: int | None = None
) -> bool:
    """Whether bf16 experts on a device of type "cuda" run on torch's grouped_mm.

    By default where it multiplies on `tcgen05` (10.x), which our kernels do not reach; elsewhere
    where `tune` found it faster, and nowhere where `doctor` found it wrong. A family in
    SPARSE_UNIFIED_GROUPED_FFN decides instead.

    Args:
        sizes: hidden size, number and width of the experts.
        num_rows: R, to ask for what was tuned for about as many.
    """
    prefers, tuned = _grouped_mm_choices(device, sizes)
    if num_rows is not None:
        for rows, trains, is_preferred in tuned:
            if trains == torch.is_grad_enabled() and rows <= 2 * num_rows and num_rows < 2 * rows:
                prefers = is_preferred
    return prefers


@torch.compiler.assume_constant_result
def _grouped_mm_choices(
    device: torch.device, sizes: tuple[int, ...]
) -> tuple[bool, tuple[tuple[int, bool, bool], ...]]:
    """Whether by default; and what was tuned: number of rows, with gradients, whether."""
    return _cached_choices(device, sizes, os.environ.get(OVERRIDE, ""))


@functools.cache
def _cached_choices(
    device: torch.device, sizes: tuple[int, ...], override: str
) -> tuple[bool, tuple[tuple[int, bool, bool], ...]]:
    if named := _family_of(override):
        return named == choices.GROUPED_MM, ()
    if choices.GROUPED_MM in choices.refused(device):
        return False, ()
    tuned = tuple(
        (rows, direction == 2, _family_of(text) == choices.GROUPED_MM)
        for rows, direction, text in choices.tuned(device, sizes)
    )
    return is_grouped_mm_first(device), tuned


def _family_of(override: str) -> str:
    """The family that an override names, or nothing."""
    named: list[str] = re.findall(r"\bfamily=(\w+)", override)
    return named[-1] if named else ""


def has_grouped_mm(device: torch.device) -> bool:
    """Whether torch's grouped_mm runs bf16 on a device of type "cuda" without waiting for it."""
    return _capability(device)[0] in (9, 10)


def is_grouped_mm_first(device: torch.device) -> bool:
    """Whether it does so on `tcgen05`, which our kernels do not reach."""
    return _capability(device)[0] == 10


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cuda_refusal(
    *, dtype: torch.dtype, hidden_size: int, widths: tuple[int, ...], num_experts: int
) -> str | None:
    """Says why the CUDA kernels take no FFN of these sizes on any device, or None.

    Args:
        dtype: of activations and weights.
        hidden_size: D.
        widths: neurons of an expert and of all that offset its columns in down_proj.
        num_experts: E.
    """
    if dtype not in _CUDA_DTYPES:
        return (
            f"the CUDA kernels take bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
        )
    for name, sizes in (("hidden size", (hidden_size,)), ("expert width", widths)):
        for size in sizes:
            if size % _CUDA_MULTIPLE:
                return (
                    f"the CUDA kernels take a {name} that is a multiple of {_CUDA_MULTIPLE}, "
                    f"got {size}"
                )
    if num_experts > _CUDA_MAX_EXPERTS:
        return f"the CUDA kernels take up to {_CUDA_MAX_EXPERTS} experts, got {num_experts}"
    return None


@torch.compiler.assume_constant_result
def fp8_device_refusal(device: torch.device) -> str | None:
    """Says why experts are not multiplied in fp8 on a device, or None."""
    if device.type != CUDA:
        got = f"device type {device.type!r}"
    elif why := device_refusal(device):  # which route, sort and sum
        return why
    elif _capability(device)[0] in _FP8_CAPABILITIES:
        return None
    else:
        got = "{}.{}".format(*_capability(device))
    return f"fp8 products (scaled_grouped_mm) need compute capability 9.x or 10.x, got {got}"


def fp8_refusal(dtype: torch.dtype, *sizes: int) -> str | None:
    """Says why experts of a dtype and of these sizes (D, widths) are not multiplied in fp8."""
    if dtype != torch.bfloat16:
        return f"fp8 products take weights of bfloat16, got {str(dtype).removeprefix('torch.')}"
    odd = [size for size in sizes if size % _FP8_MULTIPLE]
    rule = f"sizes that are multiples of {_FP8_MULTIPLE}"
    return f"fp8 products take {rule}, got {odd[0]}" if odd else None


def choose(
    device: torch.device,
    *,
    dtype: torch.dtype,
    hidden_size: int,
    widths: tuple[int, ...],
    num_experts: int,
    num_rows: int | None = None,
    fp8: bool = False,
) -> str:
    """Names what runs a sparse FFN.

    "cpu" or "cuda" for our kernels, "cuda, grouped_mm" for torch's products between our sort and
    our combine, "cuda, scaled_grouped_mm" for those in fp8, or "torch: <why no kernel does>".

    Args: as `cuda_refusal`; the device of the weights; R, without which what `tune` found for some
    numbers of rows is not asked; whether the weights are multiplied in fp8.
    """
    if fp8:
        why = fp8_device_refusal(device) or fp8_refusal(dtype, hidden_size, *widths)
        return SCALED_MM if why is None else f"torch: {why}"
    if device.type == CPU:
        return CPU if CPU_REFUSAL is None else f"torch: {CPU_REFUSAL}"
    if device.type != CUDA:
        return f"torch: this build has no kernel for device type {device.type!r}"
    why = device_refusal(device) or cuda_refusal(
        dtype=dtype, hidden_size=hidden_size, widths=widths, num_experts=num_experts
    )
    if why is not None:
        return f"torch: {why}"
    # NOTE: of another dtype, grouped_mm is a loop that waits for the sizes of the groups.
    sizes = (hidden_size, num_experts, widths[0])
    is_torchs = dtype == torch.bfloat16 and prefers_grouped_mm(device, sizes, num_rows)
    return GROUPED_MM if is_torchs else CUDA
