# SPDX-License-Identifier: Apache-2.0
"""Cases for the ops that nobody would write: arguments described as JSON, changed from a seed.

A case is {"op": name, "arguments": [...]}. A tensor is {"shape", "dtype", "fill", "layout",
"device", "grad"}: `fill` is a list of values or the seed of normal ones, `layout` how the values
lie in memory. `run_case` calls the op and holds it to its promise: a refusal in words, or what
plain torch computes, with the memory around every argument untouched.

Usage: fuzz.py FIRST COUNT, runs the cases of these seeds, telling each before it is run, so
that whoever reads knows which one ended the process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import random
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import reference

Case = dict[str, Any]
Spec = dict[str, Any]

# Bytes a process may take beyond what it has: what a huge shape asks for is refused, not swapped.
_MEMORY = 6 << 30
_FLOATS = ("float32", "bfloat16", "float16")
_DTYPES = (*_FLOATS, "float64", "int32", "int64", "int16", "uint8", "bool", "complex64")
_LAYOUTS = (
    "contiguous",
    "padded",
    "shifted",
    "strided",
    "transposed",
    "odd bytes",
    "expanded rows",
    "expanded columns",
    "negated",
)
_SIZES = (0, 1, 2, 3, 7, 8, 16, 17, 33)
_HUGE = (1 << 31, 1 << 40, (1 << 62) - 1)
_INTS = (-(1 << 63), -(1 << 31), -1, 0, 1, 2, 3, 5, 7, 16, 17, 48, 256, 1 << 31, (1 << 63) - 1)
_INDICES = (-(1 << 31), -1, 0, 1, 2, 3, 17, 255, 1 << 30, (1 << 31) - 1)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}

# What a message of torch itself says where an argument is no tensor, is on no device of ours, or
# does not fit into memory.
_TORCH = re.compile(
    r"sparse_unified::\w+\(\)|Could not run 'sparse_unified::|can't allocate memory"
    r"|There were no tensor arguments to this function"
    r"|Overflow when unpacking long|size calculation overflowed|Storage size calculation"
    r"|numel: integer multiplication overflow|Trying to create tensor with negative dimension"
)
_OURS = re.compile(r"^(\w+): \w+ must .+, got .+", re.DOTALL)


def tensor(shape: list[int], dtype: str, fill: Any, layout: str = "contiguous") -> Spec:
    return {"shape": shape, "dtype": dtype, "fill": fill, "layout": layout}


# Building


def build(spec: Any) -> Any:
    """Makes an argument of its description; other values are arguments themselves."""
    if not isinstance(spec, dict):
        return spec
    dtype = getattr(torch, spec["dtype"])
    shape = spec["shape"]
    layout = spec["layout"] if max(shape, default=0) <= 1 << 20 else "contiguous"
    if spec.get("device") == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if math.prod(shape) > 1 << 20:  # one value seen again and again
        return torch.ones(1, dtype=dtype).as_strided(shape, [0] * len(shape))
    fill = spec["fill"]
    if isinstance(fill, list):
        values = torch.tensor(fill, dtype=torch.float64)
        values = values.repeat(math.prod(shape) // max(len(fill), 1) + 1)[: math.prod(shape)]
    else:
        source = torch.Generator().manual_seed(fill)
        values = torch.randn(math.prod(shape), generator=source, dtype=torch.float64)
    if not dtype.is_floating_point and not dtype.is_complex:
        values = values.nan_to_num(0, 2**31 - 1, -(2**31)).to(torch.int64)
    result = lay_out(values.to(dtype).reshape(shape), layout)
    return result.requires_grad_() if spec.get("grad") and dtype.is_floating_point else result


def lay_out(plain: Tensor, layout: str) -> Tensor:
    """Returns the same values where they lie otherwise; guards around them are ones."""
    rows, columns = (plain.shape[0], plain.shape[-1]) if plain.dim() == 2 else (0, 0)
    if layout == "odd bytes" and plain.numel() > 0:
        size = plain.numel() * plain.element_size()
        memory = bytearray(size + 2)
        moved = torch.frombuffer(memory, dtype=plain.dtype, offset=1, count=plain.numel())
        moved.copy_(plain.reshape(-1))
        return moved.view(plain.shape)
    if layout == "negated" and plain.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch._neg_view(-plain)
    if layout == "shifted":
        flat = plain.new_ones(plain.numel() + 3)
        flat[3:] = plain.reshape(-1)
        return flat[3:].view(plain.shape)
    if plain.dim() == 1 and layout == "strided":
        sparse = plain.new_ones(3 * plain.numel())
        sparse[::3] = plain
        return sparse[::3]
    if plain.dim() != 2 or layout in ("contiguous", "odd bytes", "negated"):
        return plain
    if layout == "padded":
        wide = plain.new_ones(rows, columns + 5)
        wide[:, :columns] = plain
        return wide[:, :columns]
    if layout == "strided":
        wide = plain.new_ones(2 * rows, 3 * columns)
        wide[::2, ::3] = plain
        return wide[::2, ::3]
    if layout == "expanded rows" and rows > 0:
        return plain[:1].expand(rows, columns)
    if layout == "expanded columns" and columns > 0:
        return plain[:, :1].expand(rows, columns)
    return plain.t().contiguous().t()


# Legal cases


def legal_case(op: str, source: random.Random) -> Case:
    """Describes a call that must be answered."""
    few = (0, 1, 2, 5, 9, 37)
    num_tokens = 130 if op == "grouped_ffn_combine" and source.random() < 0.2 else 0
    num_tokens = num_tokens or source.choice(few)
    hidden = source.choice((0, 1, 3, 8, 16, 17, 40))
    experts = source.choice((1, 2, 3, 5))
    top_k = source.randint(1, experts)
    width = source.choice((0, 1, 3, 8, 16, 24))
    dtype = source.choice(_FLOATS)
    seeds = itertools.count(source.randrange(1 << 20))

    def floats(*shape: int, dtype: str = dtype) -> Spec:
        return tensor(list(shape), dtype, next(seeds))

    def ints(values: list[int], *shape: int) -> Spec:
        return tensor(list(shape) or [len(values)], "int32", values)

    chosen = [e for _ in range(num_tokens) for e in source.sample(range(experts), top_k)]
    offsets, row_token, token_rows = sort_rows(chosen, experts, top_k)
    rows = len(chosen)
    x = floats(num_tokens, hidden)
    maps = [ints(row_token), ints(token_rows, num_tokens, top_k)]
    weights = [
        floats(experts * width, hidden),
        floats(experts * width, hidden),
        floats(hidden, experts * width),
    ]
    switches = [source.random() < 0.8, source.random() < 0.8]
    if op.startswith("pruned_ffn"):
        block = source.choice((16, 32, 48))
        blocks = source.randint(0, 4)
        kept = source.sample(range(blocks), source.randint(0, blocks))
        neurons, inner = block * blocks, len(kept) * block
        own = [floats(neurons, hidden), floats(neurons, hidden), floats(hidden, neurons)]
        arguments: list[Any] = [x, ints(kept), *own, block]
        if op == "pruned_ffn_backward":
            grads = [floats(num_tokens, inner), floats(num_tokens, inner)]
            arguments = [floats(num_tokens, hidden), *arguments[:-1], *grads, block, *switches]
        return {"op": op, "arguments": arguments}
    made: dict[str, Callable[[], list[Any]]] = {
        "route_topk": lambda: [x, floats(experts, hidden), top_k],
        "route_topk_backward": lambda: [
            floats(num_tokens, experts, dtype="float32"),
            floats(num_tokens, top_k, dtype="float32"),
            ints(chosen, num_tokens, top_k),
            x,
            floats(experts, hidden),
            *switches,
        ],
        "sort_by_expert": lambda: [ints(chosen, num_tokens, top_k), experts],
        "permute": lambda: [x, *maps],
        "combine": lambda: [
            floats(rows, hidden),
            source.choice((None, floats(num_tokens, top_k, dtype="float32"))),
            maps[1],
        ],
        "combine_backward": lambda: [
            floats(num_tokens, hidden),
            floats(rows, hidden),
            floats(num_tokens, top_k, dtype="float32"),
            maps[1],
            *switches,
        ],
        "grouped_ffn": lambda: [
            *[x, maps[0], ints(offsets), *weights],
            *source.choice(([], [None], [maps[1]])),
        ],
        "grouped_ffn_combine": lambda: [
            *[x, floats(num_tokens, top_k, dtype="float32"), *maps, ints(offsets), *weights]
        ],
        "grouped_ffn_backward": lambda: [
            *[floats(rows, hidden), x, maps[0], ints(offsets), *weights],
            *[floats(rows, width), floats(rows, width), *switches],
        ],
        "ffn_importance": lambda: [
            *[x, *weights[:2], source.choice((0.0, 0.25))],
            source.choice((None, tensor([num_tokens], "float32", [0.0, 0.5, 2.0]))),
        ],
    }
    made["grouped_ffn_train"] = made["grouped_ffn"]
    return {"op": op, "arguments": made[op]()}


def sort_rows(chosen: list[int], experts: int, top_k: int) -> tuple[list[int], ...]:
    """expert_offsets, row_token and token_rows of the experts of all tokens, one after another."""
    order = sorted(range(len(chosen)), key=lambda slot: chosen[slot])
    rows = [0] * len(chosen)
    for row, slot in enumerate(order):
        rows[slot] = row
    offsets = [sum(expert < bound for expert in chosen) for bound in range(experts + 1)]
    return offsets, [slot // top_k for slot in order], rows


OPS = (
    "route_topk",
    "route_topk_backward",
    "sort_by_expert",
    "permute",
    "combine",
    "combine_backward",
    "grouped_ffn",
    "grouped_ffn_train",
    "grouped_ffn_combine",
    "grouped_ffn_backward",
    "pruned_ffn",
    "pruned_ffn_train",
    "pruned_ffn_backward",
    "ffn_importance",
)


# Changes


def draw_case(seed: int) -> Case:
    """Describes the case of a seed: a legal one in some memory layout, or one that was changed."""
    source = random.Random(seed)
    case = legal_case(OPS[seed % len(OPS)], source)
    arguments = case["arguments"]
    for spec in arguments:
        if isinstance(spec, dict) and source.random() < 0.3:
            spec["layout"] = source.choice(_LAYOUTS)
        if isinstance(spec, dict) and source.random() < 0.05:
            spec["grad"] = True
    # Indices that lie expanded are other indices.
    case["legal"] = all(
        spec["dtype"] != "int32" or not spec["layout"].startswith("expanded")
        for spec in arguments
        if isinstance(spec, dict)
    )
    for _ in range(source.choice((0, 1, 1, 1, 2, 3))):
        case["legal"] = False
        at = source.randrange(len(arguments))
        if isinstance(arguments[at], dict):
            change_tensor(arguments[at], source)
            if source.random() < 0.03:
                arguments[at] = source.choice((None, 3, "x", [1.0], True))
        else:
            arguments[at] = source.choice(
                (*_INTS, None, True, math.nan, math.inf, -1.0, 1e300, "x")
            )
    if source.random() < 0.03:  # all of them, so that shapes alone are asked about
        for spec in arguments:
            if isinstance(spec, dict):
                spec["device"] = "meta"
    return case


def change_tensor(spec: Spec, source: random.Random) -> None:
    """Changes dtype, shape, values or place of one argument."""
    kind = source.randrange(8)
    shape, fill = spec["shape"], spec["fill"]
    if kind == 0:
        spec["dtype"] = source.choice(_DTYPES)
    elif kind == 1 and shape:
        at = source.randrange(len(shape))
        shape[at] = source.choice((max(shape[at] - 1, 0), shape[at] + 1, *_SIZES))
    elif kind == 2:
        spec["shape"] = source.choice(([], shape[:1], [*shape, 1], [1, *shape], shape[::-1], [0]))
    elif kind == 3 and shape and source.random() < 0.5:
        shape[source.randrange(len(shape))] = source.choice(_HUGE)
    elif kind == 4 and source.random() < 0.3:
        spec["device"] = "meta"
    elif isinstance(fill, list):
        for _ in range(source.choice((1, 1, 2, 5)) if fill else 0):
            at = source.randrange(len(fill))
            fill[at] = source.choice((*_INDICES, fill[at] + 1, fill[at] - 1, fill[at - 1]))
        if source.random() < 0.2:
            source.shuffle(fill)
    else:
        count = min(math.prod(shape), 7)
        spec["fill"] = [source.choice((math.nan, math.inf, -math.inf, 1.0, -2.0, 0.0, 0.5, 1e-40))
                        for _ in range(count)]  # fmt: skip


# Running


def expected(op: str, arguments: list[Any]) -> tuple[Tensor, ...]:
    """What plain torch computes, in fp32."""
    kept = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    if op.startswith("pruned_ffn"):
        return pruned(op, *kept)
    if op == "grouped_ffn_combine":
        x, weights, row_token, token_rows, offsets, *projections = kept
        y = grouped("grouped_ffn", x, row_token, offsets, *projections)[0]
        return (reference.combine(y, weights, token_rows),)
    if op.startswith("grouped_ffn"):
        return grouped(op, *kept)
    if op == "route_topk_backward":
        grad_logits, grad_topk, idx, x, gate, needs_x, needs_gate = kept
        grad = grad_logits.clone()
        for k in range(idx.shape[1]):
            grad.scatter_add_(1, idx[:, k : k + 1].long(), grad_topk[:, k : k + 1])
        return (grad @ gate)[: None if needs_x else 0], (grad.t() @ x)[: None if needs_gate else 0]
    if op == "combine_backward":
        grad_out, y, weights, token_rows, needs_y, needs_weights = kept
        grad_y = torch.zeros_like(y)
        flat = token_rows.reshape(-1).long()
        spread = weights.reshape(-1, 1) * grad_out.repeat_interleave(token_rows.shape[1], 0)
        grad_y[flat] = spread
        dots = (y[token_rows.long()] * grad_out[:, None]).sum(-1)
        return grad_y[: None if needs_y else 0], dots[: None if needs_weights else 0]
    if op == "permute":
        return (reference.permute(*kept[:2]),)
    if op in ("route_topk", "sort_by_expert"):
        kept[-1] = int(kept[-1])  # True is 1 to an op
    result = getattr(reference, op)(*kept)
    return result if isinstance(result, tuple) else (result,)


def ffn(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """y of some rows, and their activations of gate and up."""
    g, u = rows @ gate.t(), rows @ up.t()
    return (F.silu(g) * u) @ down.t(), g, u


def ffn_gradients(
    grad: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, g: Tensor, u: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of rows and weights, from that of y and the activations."""
    sigmoid = torch.sigmoid(g)
    grad_hidden = grad @ down
    grad_g = grad_hidden * u * sigmoid * (1 + g * (1 - sigmoid))
    grad_u = grad_hidden * F.silu(g)
    weights = grad_g.t() @ rows, grad_u.t() @ rows, grad.t() @ (F.silu(g) * u)
    return grad_g @ gate + grad_u @ up, *weights


def wanted(found: Sequence[Tensor], needs_x: bool, needs_weights: bool) -> tuple[Tensor, ...]:
    """Leaves out what was not asked for, as the backward ops do."""
    return (
        found[0][: None if needs_x else 0],
        *(grad[: None if needs_weights else 0] for grad in found[1:]),
    )


def grouped(op: str, *arguments: Any) -> tuple[Tensor, ...]:
    is_backward = op.endswith("backward")
    x, row_token, offsets, *weights = arguments[is_backward:][:6]
    width = weights[0].shape[0] // (offsets.shape[0] - 1)
    rows = x[row_token.long()]
    found = [torch.zeros_like(tensor) for tensor in (rows, *weights)]
    outputs: list[tuple[Tensor, ...]] = []
    for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        own, part = slice(e * width, (e + 1) * width), slice(start, stop)
        experts = weights[0][own], weights[1][own], weights[2][:, own]
        if is_backward:
            active = arguments[7][part], arguments[8][part]
            grads = ffn_gradients(arguments[0][part], rows[part], *experts, *active)
            found[0][part], found[1][own], found[2][own], found[3][:, own] = grads
        else:
            outputs.append(ffn(rows[part], *experts))
    if is_backward:
        return wanted(found, *arguments[-2:])
    joined = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return tuple(joined[: 1 if op == "grouped_ffn" else 3])


def pruned(op: str, *arguments: Any) -> tuple[Tensor, ...]:
    is_backward = op.endswith("backward")
    x, kept, *weights = arguments[is_backward:][:5]
    block = arguments[8] if is_backward else arguments[5]
    own = (kept.long()[:, None] * block + torch.arange(block)).reshape(-1)
    experts = weights[0][own], weights[1][own], weights[2][:, own]
    if not is_backward:
        return ffn(x, *experts)[: 1 if op == "pruned_ffn" else 3]
    grad_x, grad_gate, grad_up, grad_down = ffn_gradients(
        arguments[0], x, *experts, arguments[6], arguments[7]
    )
    found = [grad_x, *(torch.zeros_like(weight) for weight in weights)]
    found[1][own], found[2][own], found[3][:, own] = grad_gate, grad_up, grad_down
    return wanted(found, *arguments[-2:])


def memory_of(arguments: list[Any]) -> list[bytes]:
    """All bytes behind the arguments, those between their rows included."""
    stores = [
        a.untyped_storage() for a in arguments if isinstance(a, Tensor) and a.device.type == "cpu"
    ]
    return [ctypes.string_at(s.data_ptr(), s.nbytes()) if s.nbytes() else b"" for s in stores]


def run_case(case: Case) -> str:
    """Runs a case and returns what became of it: "answered", "refused" or "not made".

    Raises:
        AssertionError: the answer is wrong, a legal case was refused, a refusal says too little, or
            memory changed.
    """
    op = case["op"]
    try:
        arguments = [build(spec) for spec in case["arguments"]]
    except (RuntimeError, MemoryError):
        return "not made"  # torch has no such tensor
    before = memory_of(arguments)
    raised: Exception | None = None
    answer: Any = None
    try:
        answer = getattr(torch.ops.sparse_unified, op)(*arguments)
    except Exception as error:
        raised = error
    assert memory_of(arguments) == before, "the call changed an argument"
    if raised is not None:
        check_refusal(op, raised)
        assert not case["legal"], f"refused a legal call: {raised}"
        return "refused"
    found = answer if isinstance(answer, tuple) else (answer,)
    with torch.no_grad():
        if any(t.device.type == "meta" for t in found):
            return "answered"
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        try:
            wanted = expected(op, plain)
        except RuntimeError as error:
            # Plain torch may need more memory than there is where an op needs none.
            if "can't allocate memory" not in str(error):
                raise
            return "answered"
        if op == "ffn_importance" and plain[0].dtype != torch.float32:
            # What fires at a threshold is a matter of the last bit.
            found, wanted = found[:2], wanted[:2]
        if op == "route_topk":  # and so is the order of logits that are nearly equal
            order = torch.sort(found[0], dim=-1, descending=True, stable=True).indices
            idx = order[:, : int(plain[2])]
            wanted = (wanted[0], found[0].gather(1, idx), idx)
        used = [a.dtype for a in plain if isinstance(a, Tensor) and a.dtype in _TOLERANCE]
        compare(found, wanted, max((_TOLERANCE[dtype] for dtype in used), default=0.0))
    return "answered"


def check_refusal(op: str, error: Exception) -> None:
    text = str(error)
    if isinstance(error, MemoryError):
        return
    assert isinstance(error, (RuntimeError, ValueError, TypeError)), repr(error)
    ours = _OURS.match(text)
    assert (ours and ours[1] in (op, "sparse_unified")) or _TORCH.search(text), (
        f"{type(error).__name__}: {text[:500]}"
    )
    assert len(text) < 20_000, text[:500]


def compare(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    """The same shapes, and close wherever plain torch has a finite value."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert list(ours.shape) == list(theirs.shape), f"{ours.shape} for {theirs.shape}"
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours.long(), theirs.long())
            continue
        finite = theirs.isfinite()
        values = theirs[finite]
        if values.numel() == 0 or values.abs().max() > 1e4:
            continue
        allowed = tolerance * (1 + values.abs().max())
        error = (ours[finite].float() - values).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def main(first: int, count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY,) * 2)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        sys.stdout.write(f"{seed}\n")
        sys.stdout.flush()
        try:
            outcomes[run_case(draw_case(seed))] += 1
        except Exception as error:
            sys.stdout.write(f"{json.dumps(draw_case(seed))}\n{type(error).__name__}: {error}\n")
            sys.exit(1)
    sys.stdout.write(f"{json.dumps(outcomes)}\n")


if __name__ == "__main__":
    assert ops.route_topk
    main(int(sys.argv[1]), int(sys.argv[2]))
