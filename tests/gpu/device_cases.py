# SPDX-License-Identifier: Apache-2.0
"""The cases of op_cases.py on a device, and what is compared there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from op_cases import FfnCase, assert_as_good_as_torch, ffn_case, torch_combine, torch_grouped_ffn
from registry import Skip
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

HALVES = (torch.bfloat16, torch.float16)
BAGEL = {"hidden_size": 3584, "width": 1184}


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of values, as parameters of a check."""
    return [dict(zip(values, one, strict=True)) for one in product(*values.values())]


def case_on(device: torch.device, **sizes: Any) -> FfnCase:
    """`ffn_case` with its random numbers drawn on the device."""
    with torch.device(device):
        return ffn_case(**sizes)


def poison(device: torch.device, *shapes: tuple[tuple[int, ...], torch.dtype]) -> None:
    """Leaves NaN in the memory that the next allocations of these shapes will get."""
    held = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape, dtype in shapes]
    held.append(torch.full((2**22,), torch.nan, device=device))
    del held


def needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a CUDA device")


def has_kernel(device: torch.device, op: str) -> bool:
    """Whether the library has a kernel of the op for the device."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    name = f"sparse_unified::{op}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def needs_kernel(device: torch.device, op: str) -> None:
    """Skips an op that the device may lack."""
    if not has_kernel(device, op):
        raise Skip(f"{op} has no kernel for {device.type}")


def needs_memory(device: torch.device, num_bytes: int) -> None:
    """Skips what does not fit into the free memory."""
    needs_cuda(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < num_bytes:
        raise Skip(f"needs {num_bytes / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


def is_kernel_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the expert kernels of the device take the dtype."""
    return device.type == "cpu" or dtype in HALVES


def refusal(call: Callable[[], object]) -> str:
    """The text of the error that a call must end with."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a call was taken that must be refused")


def assert_equal(name: str, out: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits; names the first element that differs."""
    assert out.shape == expected.shape, f"{name}: {list(out.shape)}, not {list(expected.shape)}"
    assert out.dtype == expected.dtype, f"{name}: {out.dtype}, not {expected.dtype}"
    same = (out == expected) | ((out != out) & (expected != expected))
    if not bool(same.all()):
        at = (~same).nonzero()[0].tolist()
        first = tuple(at)
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ, the first at {at}: "
            f"{out[first].item()}, not {expected[first].item()}"
        )


def assert_same(name: str, run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> None:
    for position, (out, other) in enumerate(zip(run(), expected, strict=True)):
        assert_equal(f"{name}, output {position}", out, other)


def assert_ffn(case: FfnCase) -> None:
    """The three forward ops of a case, their outputs poisoned, as exact as torch in its dtype."""
    wide = tuple(t.float() if t.is_floating_point() else t for t in case.arguments)
    ref_rows = reference.grouped_ffn(*wide)
    torch_rows = torch_grouped_ffn(*case.arguments)
    token_rows = torch_combine(torch_rows, case.weights, case.token_rows)
    ref_tokens = reference.combine(ref_rows, case.weights, case.token_rows)
    device, dtype = case.x.device, case.x.dtype
    shape = (tuple(ref_rows.shape), dtype)
    poison(device, shape, (tuple(case.x.shape), dtype))
    assert_as_good_as_torch(ops.grouped_ffn(*case.arguments), torch_rows, ref_rows)
    width = case.gate_proj.shape[0] // (case.expert_offsets.shape[0] - 1)
    hidden = ((ref_rows.shape[0], width), dtype)
    poison(device, shape, hidden, hidden)
    rows, gate_rows, up_rows = torch.ops.sparse_unified.grouped_ffn_train(*case.arguments)
    assert_as_good_as_torch(rows, torch_rows, ref_rows)
    assert not gate_rows.isnan().any(), "gate_rows has elements that nothing wrote"
    assert not up_rows.isnan().any(), "up_rows has elements that nothing wrote"
    poison(device, shape, (tuple(case.x.shape), dtype))
    assert_as_good_as_torch(ops.grouped_ffn_combine(*case.fused_arguments), token_rows, ref_tokens)


def ffn_calls(case: FfnCase) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    """The forward ops on the tensors of a case."""
    yield "grouped_ffn", lambda: (ops.grouped_ffn(*case.arguments),)
    yield "grouped_ffn_combine", lambda: (ops.grouped_ffn_combine(*case.fused_arguments),)
    yield (
        "grouped_ffn_train",
        lambda: tuple(torch.ops.sparse_unified.grouped_ffn_train(*case.arguments)),
    )
