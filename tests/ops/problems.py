# SPDX-License-Identifier: Apache-2.0
"""Inputs of the ops, what torch computes of them, the tolerance, and comparisons that name bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from registry import CPU, EVERYWHERE, Skip
from torch import Tensor

from sparse_unified import ops

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
ROUTINGS = ("random", "repeated", "first", "last", "one", "gaps")
FLOATS = ("x", "gate_proj", "up_proj", "down_proj")


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of values, as parameters of a check."""
    return [dict(zip(values, one, strict=True)) for one in product(*values.values())]


def cycle(first: Sequence[dict[str, Any]], **values: Sequence[Any]) -> list[dict[str, Any]]:
    """Each of the first with the next of the values: every value often enough, not all pairs."""
    return [
        one | {name: found[i % len(found)] for name, found in values.items()}
        for i, one in enumerate(first)
    ]


def with_kernel(dtype: torch.dtype, **_: Any) -> tuple[str, ...]:
    """Backends with expert kernels for a dtype: those of CUDA take 16 bits."""
    return EVERYWHERE if dtype in HALVES else (CPU,)


# Routing


def draw_routing(kind: str, num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """topk_idx [T, K] int32: distinct random experts a token, or an extreme."""
    shape = (num_tokens, top_k)
    if kind == "random":
        return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].int().contiguous()
    if kind == "repeated":  # the ops allow an expert twice in a token
        return torch.randint(num_experts, shape, dtype=torch.int32)
    if kind == "gaps":  # every second expert is empty
        return 2 * torch.randint((num_experts + 1) // 2, shape, dtype=torch.int32)
    expert = {"first": 0, "last": num_experts - 1, "one": num_experts // 2}[kind]
    return torch.full(shape, expert, dtype=torch.int32)


def torch_combine(y: Tensor, weights: Tensor | None, token_rows: Tensor) -> Tensor:
    """What torch computes in the dtype of y."""
    rows = y[token_rows.long()]
    if weights is not None:
        rows = rows * weights.to(y.dtype).unsqueeze(-1)
    return rows.sum(1)


# FFNs


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnCase:
    """Arguments of grouped_ffn with outputs of about unit size, and combine's weights."""

    x: Tensor  # [T, D]
    weights: Tensor  # [T, K] fp32
    expert_offsets: Tensor
    row_token: Tensor
    token_rows: Tensor
    gate_proj: Tensor  # [E * h, D]
    up_proj: Tensor  # [E * h, D]
    down_proj: Tensor  # [D, E * h]

    @property
    def experts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """As grouped_ffn takes them, without token_rows."""
        return (self.x, self.row_token, self.expert_offsets, *self.experts)

    @property
    def fused_arguments(self) -> tuple[Tensor, ...]:
        """As grouped_ffn_combine takes them."""
        maps = (self.row_token, self.token_rows, self.expert_offsets)
        return (self.x, self.weights, *maps, *self.experts)


def ffn_case(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_experts: int = 5,
    width: int = 24,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    routing: str = "random",
    device: torch.device | str = "cpu",
) -> FfnCase:
    """Draws a case on a device."""
    with torch.device(device):
        topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
        expert_offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, num_experts)
        neurons = num_experts * width
        scale = max(hidden_size, 1) ** -0.5
        return FfnCase(
            x=torch.randn(num_tokens, hidden_size).to(dtype),
            weights=(1 + torch.randn(num_tokens, top_k)) * top_k**-0.5,
            expert_offsets=expert_offsets,
            row_token=row_token,
            token_rows=token_rows,
            gate_proj=(torch.randn(neurons, hidden_size) * scale).to(dtype),
            up_proj=(torch.randn(neurons, hidden_size) * scale).to(dtype),
            down_proj=(torch.randn(hidden_size, neurons) * 0.5 * max(width, 1) ** -0.5).to(dtype),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A FFN op on drawn tensors. All functions take x and the three projections.

    Args:
        tensors: x, gate_proj, up_proj, down_proj by name.
        call: the op, -> y; takes `recompute` too.
        train, backward: the ops behind it: -> (y, gate_rows, up_rows), and its gradients of
            (grad_y, tensors, gate_rows, up_rows, needs_x, needs_weights).
        in_torch: by torch in the dtype of the tensors, one rounding an op; with fp32 or fp64
            tensors, the reference.
        token_of_row: of each row of y.
        idle: neurons that no row uses, bool [I].
    """

    op: str
    tensors: dict[str, Tensor]
    call: Callable[..., Tensor]
    train: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    in_torch: Callable[..., Tensor]
    token_of_row: Tensor
    idle: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.tensors.values())

    def y(self, **changed: Tensor) -> Tensor:
        """The op, with some of the tensors replaced."""
        return self.call(*(self.tensors | changed).values())

    def exact(self) -> Tensor:
        """In fp32."""
        return self.in_torch(*(tensor.float() for tensor in self.leaves))

    def trained(self, *names: str) -> Problem:
        """Lets some of the tensors, or all, ask for gradients."""
        for name in names or FLOATS:
            self.tensors[name].requires_grad_()
        return self


def _torch_grouped(maps: Sequence[Tensor], x: Tensor, *weights: Tensor) -> Tensor:
    row_token, expert_offsets = maps
    num_experts = expert_offsets.shape[0] - 1
    rows = x[row_token.long()].split(expert_offsets.diff().tolist())
    gate, up, down = (w.chunk(num_experts, dim=d) for w, d in zip(weights, (0, 0, 1), strict=True))
    if gate[0].numel() == 0:
        return x.new_zeros(len(row_token), x.shape[1])
    return torch.cat(
        [
            F.linear(F.silu(F.linear(own, g)) * F.linear(own, u), d)
            for own, g, u, d in zip(rows, gate, up, down, strict=True)
        ]
    )


def problem_of(case: FfnCase) -> Problem:
    """grouped_ffn on a case."""
    maps = (case.row_token, case.expert_offsets)

    def call(x: Tensor, *weights: Tensor, recompute: bool = False) -> Tensor:
        return ops.grouped_ffn(x, *maps, *weights, case.token_rows, recompute=recompute)

    def backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return torch.ops.sparse_unified.grouped_ffn_backward(grad, x, *maps, *others)

    num_experts = len(case.expert_offsets) - 1
    width = len(case.gate_proj) // num_experts
    return Problem(
        op="grouped_ffn",
        tensors={name: getattr(case, name) for name in FLOATS},
        call=call,
        train=lambda x, *weights: torch.ops.sparse_unified.grouped_ffn_train(x, *maps, *weights),
        backward=backward,
        in_torch=partial(_torch_grouped, maps),
        token_of_row=case.row_token.long(),
        idle=(case.expert_offsets.diff() == 0).repeat_interleave(width),
    )


def _torch_pruned(own: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate[own])) * F.linear(x, up[own]), down[:, own])


def pruned_problem(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_blocks: int = 7,
    block_size: int = 16,
    kept: Sequence[int] = (5, 1, 2, 6),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """pruned_ffn on drawn tensors with outputs of about unit size."""
    width = num_blocks * block_size
    scale, kept_width = max(hidden_size, 1) ** -0.5, max(len(kept) * block_size, 1)
    with torch.device(device):
        blocks = torch.tensor(list(kept), dtype=torch.int32)
        own = (blocks.long()[:, None] * block_size + torch.arange(block_size)).reshape(-1)
        idle = torch.ones(width, dtype=torch.bool).index_fill(0, own, False)
        tensors = {
            "x": torch.randn(num_tokens, hidden_size).to(dtype),
            "gate_proj": (torch.randn(width, hidden_size) * scale).to(dtype),
            "up_proj": (torch.randn(width, hidden_size) * scale).to(dtype),
            "down_proj": (torch.randn(hidden_size, width) * kept_width**-0.5).to(dtype),
        }
        token_of_row = torch.arange(num_tokens)

    def call(x: Tensor, *weights: Tensor, recompute: bool = False) -> Tensor:
        return ops.pruned_ffn(x, blocks, *weights, block_size, recompute=recompute)

    def backward(
        grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        gate_rows, up_rows, *needs = rest
        return torch.ops.sparse_unified.pruned_ffn_backward(
            grad, x, blocks, gate, up, down, gate_rows, up_rows, block_size, *needs
        )

    return Problem(
        op="pruned_ffn",
        tensors=tensors,
        call=call,
        train=lambda x, *w: torch.ops.sparse_unified.pruned_ffn_train(x, blocks, *w, block_size),
        backward=backward,
        in_torch=partial(_torch_pruned, own),
        token_of_row=token_of_row,
        idle=idle,
    )


def both_problems(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int = 72
) -> Iterator[Problem]:
    """grouped_ffn and pruned_ffn with several tiles of rows, experts without rows, lost blocks."""
    yield problem_of(
        ffn_case(num_tokens, hidden_size, 5, 56, 2, dtype, routing="gaps", device=device)
    )
    kept = (11, 1, 2, 3, 8, 0)
    yield pruned_problem(num_tokens, hidden_size, 12, 64, kept, dtype, device)


# Comparing


def poison(device: torch.device, *shapes: tuple[tuple[int, ...], torch.dtype]) -> None:
    """Leaves NaN in the memory that the next allocations of these shapes will get."""
    held = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape, dtype in shapes]
    held.append(torch.full((2**22,), torch.nan, device=device))
    del held


def assert_equal(name: str, out: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits; names the first element that differs."""
    assert out.shape == expected.shape, f"{name}: {list(out.shape)}, not {list(expected.shape)}"
    assert out.dtype == expected.dtype, f"{name}: {out.dtype}, not {expected.dtype}"
    same = (out == expected) | ((out != out) & (expected != expected))
    if not bool(same.all()):
        first = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ, the first at {first}: "
            f"{out[first].item()}, not {expected[first].item()}"
        )


def assert_all_equal(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for position, (out, other) in enumerate(zip(found, expected, strict=True)):
        assert_equal(f"{name}, output {position}", out, other)


def assert_as_good_as_torch(out: Tensor, torch_out: Tensor, ref32: Tensor) -> None:
    """max|out - ref32| <= 2 * max|torch_same_dtype - ref32| + 1e-5, at a realistic output size."""
    assert out.shape == ref32.shape
    assert out.dtype == torch_out.dtype
    if ref32.numel() == 0:
        return
    ref = ref32.float()
    size = ref.abs().max().item()
    few = ref.numel() < 1024  # their size, and who rounds worst, is a matter of chance
    assert few or size > 0.2, "outputs so small would hide a mistake in the tolerance"
    error = (out.float() - ref).abs().max().item()
    allowed = 2 * (torch_out.float() - ref).abs().max().item() + 1e-5
    if few:
        allowed += torch.finfo(out.dtype).eps * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients(own: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Relative error below what a few dozen roundings of the dtype make of it."""
    tolerance = 16 * torch.finfo(dtype).eps
    for position, (gradient, expected) in enumerate(zip(own, exact, strict=True)):
        assert gradient.shape == expected.shape
        assert gradient.dtype == dtype
        error = (gradient.double() - expected).norm()
        allowed = tolerance * expected.norm()
        assert error <= allowed, f"gradient {position} is off by {error:.3g}, allowed {allowed:.3g}"


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def refusal(call: Callable[[], object]) -> str:
    """The text of the error that a call must end with."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a call was taken that must be refused")


def each_thread_count() -> Iterator[int]:
    """Sets 1, 2 and 3 threads in turn, and what there were at the end."""
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def needs_memory(device: torch.device, num_bytes: int) -> None:
    """Skips what does not fit into the free memory of a GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < num_bytes:
        raise Skip(f"needs {num_bytes / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields matrices of equal value and other layouts: padded, misaligned, strided, transposed."""
    rows, columns = tensor.shape
    padded = tensor.new_full((rows, columns + 5), torch.nan)
    padded[:, :columns] = tensor
    yield "padded rows", padded[:, :columns]
    shifted = tensor.new_full((rows, columns + 5), torch.nan)
    shifted[:, 1 : columns + 1] = tensor
    yield "misaligned columns", shifted[:, 1 : columns + 1]
    flat = tensor.new_empty(rows * columns + 1)
    flat[1:] = tensor.reshape(-1)
    yield "misaligned start", flat[1:].view(rows, columns)
    every_second = tensor.new_full((rows, 2 * columns), torch.nan)
    every_second[:, ::2] = tensor
    yield "strided columns", every_second[:, ::2]
    every_third = tensor.new_full((3 * rows, columns), torch.nan)
    every_third[::3] = tensor
    yield "strided rows", every_third[::3]
    yield "transposed", tensor.t().contiguous().t()
