# SPDX-License-Identifier: Apache-2.0
"""Which kernels take a sparse FFN, and why none does."""

from __future__ import annotations

import functools

import torch

CPU = "cpu"
CUDA = "cuda"

# What the CUDA kernels take: csrc/cuda/grouped_ffn.cu refuses the same, kMaxCudaExperts is of
# csrc/include/sparse_unified/route_topk.h; tests/ops/test_emulated.py compares.
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_MULTIPLE = 8
_CUDA_MAX_EXPERTS = 256
_CUDA_LEAST_CAPABILITY = (8, 0)


@functools.cache
def has_cuda_kernels() -> bool:
    """Whether this build of the library holds CUDA kernels."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key("sparse_unified::grouped_ffn", "CUDA")
    )


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
    for name, size in (("hidden size", hidden_size), *(("expert width", w) for w in widths)):
        if size % _CUDA_MULTIPLE:
            return (
                f"the CUDA kernels take a {name} that is a multiple of {_CUDA_MULTIPLE}, got {size}"
            )
    if num_experts > _CUDA_MAX_EXPERTS:
        return f"the CUDA kernels take up to {_CUDA_MAX_EXPERTS} experts, got {num_experts}"
    return None


def choose(
    device: torch.device,
    *,
    dtype: torch.dtype,
    hidden_size: int,
    widths: tuple[int, ...],
    num_experts: int,
) -> str:
    """Names what runs a sparse FFN: "cpu" or "cuda" for our kernels, or "torch: <why none does>".

    Args: as `cuda_refusal`, and the device of the weights.
    """
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        return f"torch: this build has no kernel for device type {device.type!r}"
    if not has_cuda_kernels():
        return "torch: this build has no CUDA kernels, because it was made without nvcc"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CUDA_LEAST_CAPABILITY:
        return (
            "torch: the CUDA kernels need compute capability 8.0, got "
            f"{capability[0]}.{capability[1]}"
        )
    why = cuda_refusal(dtype=dtype, hidden_size=hidden_size, widths=widths, num_experts=num_experts)
    return CUDA if why is None else f"torch: {why}"
