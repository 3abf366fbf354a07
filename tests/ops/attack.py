# SPDX-License-Identifier: Apache-2.0
"""Calls of the ops that nobody would write: arguments drawn and spoiled from a seed.

`run_seed` calls an op and holds it to its promise: a refusal in words, or what plain torch
computes, with the memory around every argument untouched.

Usage: attack.py FIRST COUNT, runs these seeds, telling each before it is run, so that whoever
reads knows which one ended the process; attack.py memory OP, runs an op where memory ends.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from awkward import LAYOUTS, lay_out
from torch import Tensor

from sparse_unified.checks.problems import (
    ARGUMENTS,
    OPS,
    Values,
    call,
    grouped_values,
    pruned_values,
)
from sparse_unified.ops import reference

# Bytes a process may take beyond what it has: what a huge shape asks for is refused, not swapped.
_MEMORY = 6 << 30
_SIZES = (0, 1, 2, 3, 7, 8, 16, 17, 33)
_HUGE = (1 << 31, 1 << 40, (1 << 62) - 1)
_INTS = (-(1 << 63), -(1 << 31), -1, 0, 1, 2, 3, 5, 7, 16, 17, 48, 256, 1 << 31, (1 << 63) - 1)
_OTHERS = (None, True, math.nan, math.inf, -1.0, 1e300, "x", [1.0])
_INDICES = (-(1 << 31), -1, 0, 1, 2, 3, 17, 255, 1 << 30, (1 << 31) - 2)
_NUMBERS = (math.nan, math.inf, -math.inf, 1.0, -2.0, 0.0, 0.5, 1e-40)
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_FLOAT_DTYPES, torch.float64, torch.int32, torch.int64, torch.int16, torch.uint8)
_DTYPES += (torch.bool, torch.complex64)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# What torch itself says where an argument is no tensor, is on no device of ours, or does not fit.
_TORCH = re.compile(
    r"sparse_unified::\w+\(\)|Could not run 'sparse_unified::|can't allocate memory"
    r"|There were no tensor arguments to this function|Overflow when unpacking long"
    r"|size calculation overflowed|Storage size calculation|Trying to create tensor with negative"
    r"|numel: integer multiplication overflow"
)
_OURS = re.compile(r"^(\w+): \w+ must .+, got .+", re.DOTALL)


# Drawing


def draw_legal(op: str, source: random.Random) -> Values:
    """Arguments of an op, by name, that must be answered."""
    tokens = 130 if op.startswith("grouped_ffn_combine") and source.random() < 0.2 else 0
    tokens = tokens or source.choice((0, 1, 2, 5, 9, 37))
    hidden = source.choice((0, 1, 3, 8, 16, 17, 40))
    dtype = source.choice(_FLOAT_DTYPES)
    if op.startswith("pruned_ffn"):
        blocks = source.randint(0, 4)
        kept = source.sample(range(blocks), source.randint(0, blocks))
        values = pruned_values(tokens, hidden, blocks, source.choice((16, 32, 48)), kept, dtype)
    else:
        experts = source.choice((1, 2, 3, 5))
        width, top_k = source.choice((0, 1, 3, 8, 16, 24)), source.randint(1, experts)
        values = grouped_values(tokens, hidden, experts, width, top_k, dtype)
    for name in ("needs_x", "needs_gate", "needs_weights", "needs_experts"):
        values[name] = source.random() < 0.8
    for name in {"combine": "weights", "ffn_importance": "token_weights"}.get(op, "").split():
        values[name] = source.choice((None, values[name]))
    return {name: values[name] for name in ARGUMENTS[op]}


def odd_layout(tensor: Tensor, source: random.Random) -> Tensor:
    """The same values where they lie otherwise: in rows, between bytes, or negated."""
    layout = source.choice((*LAYOUTS, "odd bytes", "negated"))
    if layout == "negated":
        return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor
    if layout == "odd bytes" and tensor.numel() > 0:
        memory = bytearray(tensor.nbytes + 1)
        moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=1, count=tensor.numel())
        return moved.copy_(tensor.reshape(-1)).view(tensor.shape)
    return lay_out(tensor, layout) if layout in LAYOUTS else tensor


def resized(tensor: Tensor, shape: list[int]) -> Tensor:
    """Its values again and again in another shape; one value where that is huge."""
    if math.prod(shape) > 1 << 61:  # torch cannot count its elements
        return tensor
    if tensor.numel() == 0 or math.prod(shape) > 1 << 20:
        return tensor.new_ones(1).as_strided(shape, [0] * len(shape))
    times = math.prod(shape) // tensor.numel() + 1
    return tensor.flatten().repeat(times)[: math.prod(shape)].view(shape)


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose storage was given back, as FSDP leaves parameters."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def is_final(value: Any) -> bool:
    """Torch itself cannot do more with a tensor that is huge, elsewhere, or freed."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return False
    is_meta = value.device.type == "meta"
    return is_meta or value.numel() > 1 << 20 or value.untyped_storage().nbytes() == 0


def expanded(tensor: Tensor) -> Tensor:
    """Its first row, or column where the rows are empty, again and again."""
    return tensor[:1].expand_as(tensor) if tensor.numel() else tensor


def spoil(value: Any, source: random.Random) -> Any:
    """Changes type, dtype, shape, values, place or memory of one argument."""
    if not isinstance(value, Tensor) or source.random() < 0.03:
        return source.choice((*_INTS, *_OTHERS))
    shape, kind = list(value.shape), source.randrange(9)
    if kind == 0:
        return value.to(source.choice(_DTYPES))
    if kind == 1 and shape:
        at = source.randrange(len(shape))
        shape[at] = source.choice((max(shape[at] - 1, 0), shape[at] + 1, *_SIZES))
        return resized(value, shape)
    if kind == 2:
        shapes = ([], shape[:1], [*shape, 1], [1, *shape], shape[::-1], [0])
        return resized(value, source.choice(shapes))
    if kind == 3 and shape:
        shape[source.randrange(len(shape))] = source.choice(_HUGE)
        return resized(value, shape) if source.random() < 0.5 else expanded(value)
    if kind == 4:
        return freed(value) if source.random() < 0.7 else value.to("meta")
    changed = value.contiguous().clone()
    flat = changed.flatten()
    for _ in range(source.choice((1, 1, 2, 5)) if len(flat) else 0):
        at = source.randrange(len(flat))
        numbers: tuple[float, ...] = _NUMBERS if value.is_floating_point() else (0, 1)
        if value.dtype == torch.int32:
            numbers = (*_INDICES, *(max(int(flat[at]) + step, 0) for step in (-1, 1)))
        flat[at] = source.choice(numbers)
    if source.random() < 0.2:
        flat = flat[torch.randperm(len(flat))]
    return flat.view(changed.shape)


def draw_call(seed: int) -> tuple[str, Values, bool]:
    """Op, arguments, and whether they are legal: in some layouts, or spoiled."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    op = list(OPS)[seed % len(OPS)]
    values = draw_legal(op, source)
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    for name in tensors:
        if source.random() < 0.3:
            values[name] = odd_layout(values[name], source)
        if source.random() < 0.05 and values[name].is_floating_point():
            values[name] = values[name].detach().requires_grad_()
    spoiled = source.choice((0, 1, 1, 1, 2, 3))
    with torch.no_grad():
        for _ in range(spoiled):
            name = source.choice(list(values))
            if not is_final(values[name]):
                values[name] = spoil(values[name], source)
    if source.random() < 0.03:  # all of them, so that shapes alone are asked about
        values |= {n: v.to("meta") for n, v in values.items() if isinstance(v, Tensor)}
    return op, values, spoiled == 0


# Judging


def combined_ffn(
    x: Tensor, weights: Tensor, row_token: Tensor, token_rows: Tensor, *rest: Any
) -> Tensor:
    *experts, weight_offset = rest
    rows = reference.grouped_ffn(x, row_token, *experts)
    return reference.combine(rows, weights, token_rows, weight_offset)


# What plain torch computes of values in fp32: the first outputs. The others, backward ops, are to
# do the same on copies of their arguments; `checks_*.py` compare them with fp64.
EXPECTED: dict[str, Callable[..., Any]] = {
    "route_topk": lambda x, gate, top_k: reference.route_topk(x, gate, int(top_k)),
    "sort_by_expert": lambda topk_idx, count: reference.sort_by_expert(topk_idx, int(count)),
    "permute": lambda x, row_token, _: reference.permute(x, row_token),
    "combine": reference.combine,
    "ffn_importance": reference.ffn_importance,
    "grouped_ffn": reference.grouped_ffn,
    "grouped_ffn_combine": combined_ffn,
    "grouped_ffn_combine_train": combined_ffn,
    "pruned_ffn": reference.pruned_ffn,
    "pruned_ffn_train": reference.pruned_ffn,
}


def judge(op: str, values: Values, found: tuple[Tensor, ...]) -> None:
    """Compares an answer with that of plain torch, wherever that one is finite.

    Raises:
        AssertionError: they differ.
    """
    plain = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
    tensors = {n: v for n, v in plain.items() if isinstance(v, Tensor)}
    if op in EXPECTED:
        wide = {n: v.float() for n, v in tensors.items() if v.is_floating_point()}
        answer = EXPECTED[op](*(plain | wide).values())
    else:
        answer = call(op, plain | {n: v.contiguous().clone() for n, v in tensors.items()})
    wanted = answer if isinstance(answer, tuple) else (answer,)
    if op == "ffn_importance" and plain["x"].dtype != torch.float32:
        wanted = wanted[:2]  # what fires is a matter of the last bit
    if op == "route_topk":  # and so is the order of logits that are nearly equal
        order = torch.sort(found[0], dim=-1, descending=True, stable=True).indices
        idx = order[:, : int(plain["top_k"])]
        wanted = (wanted[0], found[0].gather(1, idx), idx)
    tolerance = max(_TOLERANCE.get(v.dtype, 0.0) for v in tensors.values())
    for ours, theirs in zip(found, wanted, strict=False):
        assert ours.shape == theirs.shape, f"{ours.shape} for {theirs.shape}"
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours.long(), theirs.long())
            continue
        finite = theirs.isfinite()
        there = theirs[finite].float()
        if there.numel() > 0 and there.abs().max() < 1e4:
            error = (ours[finite].float() - there).abs().max()
            assert error <= tolerance * (1 + there.abs().max()), f"off by {error:.3g}"


def check_refusal(op: str, error: Exception, says: str = "") -> None:
    """A refusal is one of ours, which names op, argument and value, or one of torch's own."""
    text = str(error)
    assert isinstance(error, (RuntimeError, ValueError, TypeError, MemoryError)), repr(error)
    ours = _OURS.match(text)
    assert (ours and ours[1] == op) or _TORCH.search(text), f"{type(error).__name__}: {text[:500]}"
    assert says in text, text[:500]
    assert len(text) < 20_000, text[:500]


def memory_of(values: Values) -> list[bytes]:
    """All bytes behind the arguments, those between their rows included."""
    tensors = [v for v in values.values() if isinstance(v, Tensor) and v.device.type == "cpu"]
    stores = [t.untyped_storage() for t in tensors]
    return [ctypes.string_at(s.data_ptr(), s.nbytes()) if s.nbytes() else b"" for s in stores]


def attack(op: str, values: Values, is_legal: bool) -> str:
    """Calls an op and returns what became of it: "answered" or "refused".

    Raises:
        AssertionError: the answer is wrong, a legal call was refused, a refusal says too little, or
            memory changed.
    """
    before = memory_of(values)
    answer: Any = None
    raised: Exception | None = None
    try:
        answer = call(op, values)
    except Exception as error:
        raised = error
    assert memory_of(values) == before, "the call changed an argument"
    if raised is not None:
        check_refusal(op, raised)
        assert not is_legal, f"refused a legal call: {raised}"
        return "refused"
    found = answer if isinstance(answer, tuple) else (answer,)
    if all(t.device.type != "meta" for t in found):
        with torch.no_grad():
            judge(op, values, found)
    return "answered"


def run_seed(seed: int) -> str:
    return attack(*draw_call(seed))


def within_memory(run: Callable[[], None], extra: int) -> None:
    """Runs in a process that may take so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def run_seeds(first: int, count: int) -> None:
    """Adds their outcomes up, in a process that may not take much more memory."""
    outcomes: Counter[str] = Counter()

    def run() -> None:
        for seed in range(first, first + count):
            sys.stdout.write(f"{seed}\n")
            sys.stdout.flush()
            outcomes[run_seed(seed)] += 1

    within_memory(run, _MEMORY)
    sys.stdout.write(f"{json.dumps(outcomes)}\n")


def exhaust_memory(op: str) -> None:
    """Adds up what becomes of an op with 0, 1, ... 39 MB of memory left, in a process each."""
    values = grouped_values(600, 64, 2, 2048, 1)
    if op.startswith("pruned"):
        values = pruned_values(600, 64, 32, 128, range(32))
    outcomes: Counter[str] = Counter()
    for megabytes in range(40):
        if not (pid := os.fork()):
            try:
                within_memory(lambda: call(op, values), megabytes << 20)
            except RuntimeError as error:
                check_refusal(op, error, says=" bytes")
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outcomes[{0: "answered", 3: "refused"}[status]] += 1
    sys.stdout.write(f"{json.dumps(outcomes)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "memory":
        exhaust_memory(sys.argv[2])
    else:
        run_seeds(int(sys.argv[1]), int(sys.argv[2]))
