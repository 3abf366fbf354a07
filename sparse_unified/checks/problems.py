# SPDX-License-Identifier: Apache-2.0
"""Arguments of every op, drawn by name; what torch computes of them; comparisons that name bits.

T tokens, D hidden size, E experts, h expert width, K top_k, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified import ops
from sparse_unified.checks import CPU, EVERYWHERE, note_error
from sparse_unified.ops import reference

KERNELS = torch.ops.sparse_unified
# Which of the ops on the left is differentiable.
OPS = {
    "route_topk": True,
    "route_topk_backward": False,
    "sort_by_expert": False,
    "permute": True,
    "combine": False,
    "grouped_ffn": False,
    "grouped_ffn_combine": True,
    "grouped_ffn_combine_train": True,
    "grouped_ffn_combine_backward": False,
    "pruned_ffn": True,
    "pruned_ffn_train": True,
    "pruned_ffn_backward": False,
    "ffn_importance": False,
}
ARGUMENTS = {op: [a.name for a in getattr(KERNELS, op).default._schema.arguments] for op in OPS}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
ROUTINGS = ("random", "repeated", "first", "last", "one", "gaps")
FLOATS = ("x", "gate_proj", "up_proj", "down_proj")
Values = dict[str, Any]
Device = torch.device | str


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of values, as parameters of a check."""
    return [dict(zip(values, one, strict=True)) for one in product(*values.values())]


def cycle(first: Sequence[dict[str, Any]], **values: Sequence[Any]) -> list[dict[str, Any]]:
    """Each of the first with the next of the values: every value often enough."""
    return [
        one | {name: found[i % len(found)] for name, found in values.items()}
        for i, one in enumerate(first)
    ]


def with_kernel(dtype: torch.dtype, **_: Any) -> tuple[str, ...]:
    """Backends with expert kernels for a dtype: those of CUDA take 16 bits."""
    return EVERYWHERE if dtype in HALVES else (CPU,)


# Arguments


def call(op: str, values: Values) -> Any:
    """An op on its arguments among the values."""
    return getattr(KERNELS, op)(*(values[name] for name in ARGUMENTS[op]))


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


def grouped_values(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_experts: int = 5,
    width: int = 24,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    routing: str = "random",
    device: Device = "cpu",
) -> Values:
    """Arguments of all ops but pruned_ffn, by name; FFNs have outputs of about unit size."""
    t, d, e, k, rows = num_tokens, hidden_size, num_experts, top_k, num_tokens * top_k
    scale = max(d, 1) ** -0.5
    randn = partial(torch.randn, device=device)
    with torch.device(device):
        topk_idx = draw_routing(routing, t, e, k)
    expert_offsets, row_token, token_rows = reference.sort_by_expert(topk_idx, e)
    return {
        "x": randn(t, d).to(dtype),
        "gate": (randn(e, d) * scale).to(dtype),
        "y": randn(rows, d).to(dtype),
        "weights": randn(t, k) * k**-0.5,
        "weight_offset": k**-0.5 if k else 0.0,
        "gate_proj": (randn(e * width, d) * scale).to(dtype),
        "up_proj": (randn(e * width, d) * scale).to(dtype),
        "down_proj": (randn(d, e * width) * 0.5 * max(width, 1) ** -0.5).to(dtype),
        "gate_rows": randn(rows, width).to(dtype),
        "up_rows": randn(rows, width).to(dtype),
        "grad_y": randn(t, d).to(dtype),
        "grad_logits": randn(t, e),
        "grad_topk_logits": randn(t, k),
        "token_weights": randn(t).abs(),
        "threshold": 0.1,
        "top_k": k,
        "topk_idx": topk_idx,
        "num_experts": e,
        "expert_offsets": expert_offsets,
        "row_token": row_token,
        "token_rows": token_rows,
    } | dict.fromkeys(("needs_x", "needs_gate", "needs_weights", "needs_experts"), True)


def pruned_values(
    num_tokens: int = 37,
    hidden_size: int = 40,
    num_blocks: int = 7,
    block_size: int = 16,
    kept: Sequence[int] = (5, 1, 2, 6),
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Values:
    """Arguments of pruned_ffn and its backward, likewise."""
    t, d, width, inner = num_tokens, hidden_size, num_blocks * block_size, len(kept) * block_size
    scale = max(d, 1) ** -0.5
    randn = partial(torch.randn, device=device)
    return {
        "x": randn(t, d).to(dtype),
        "gate_proj": (randn(width, d) * scale).to(dtype),
        "up_proj": (randn(width, d) * scale).to(dtype),
        "down_proj": (randn(d, width) * max(inner, 1) ** -0.5).to(dtype),
        "gate_rows": randn(t, inner).to(dtype),
        "up_rows": randn(t, inner).to(dtype),
        "grad_y": randn(t, d).to(dtype),
        "kept_blocks": torch.tensor(list(kept), dtype=torch.int32, device=device),
        "block_size": block_size,
        "needs_x": True,
        "needs_weights": True,
    }


# FFNs


@dataclass(frozen=True, slots=True)
class Problem:
    """An FFN on drawn values. Functions of tensors take those of `floats`."""

    op: str
    values: Values

    @property
    def floats(self) -> tuple[str, ...]:
        """What a gradient may be asked of, in the order of the op's backward."""
        return ("x", "weights", *FLOATS[1:]) if self.op == "grouped_ffn_combine" else FLOATS

    @property
    def leaves(self) -> list[Tensor]:
        return [self.values[name] for name in self.floats]

    @property
    def rows(self) -> Problem:
        """grouped_ffn alone, on the same values."""
        return Problem("grouped_ffn", self.values)

    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Tokens and neurons of each group of rows."""
        v = self.values
        device = v["x"].device
        if self.op.startswith("pruned"):
            block = torch.arange(v["block_size"], device=device)
            neurons = v["kept_blocks"].long()[:, None] * v["block_size"] + block
            return [(torch.arange(len(v["x"]), device=device), neurons.flatten())]
        tokens = v["row_token"].long().split(v["expert_offsets"].diff().tolist())
        neurons = torch.arange(len(v["gate_proj"]), device=device).tensor_split(len(tokens))
        return list(zip(tokens, neurons, strict=True))

    def call(self, op: str = "", **changed: Any) -> Any:
        """The op, or another one, with some values replaced."""
        return call(op or self.op, self.values | changed)

    def run(self, *leaves: Tensor, recompute: bool = False) -> Tensor:
        """The public function of the op."""
        values = self.values | dict(zip(self.floats, leaves, strict=True))
        arguments = (values[name] for name in ARGUMENTS[self.op])
        y: Tensor = getattr(ops, self.op)(*arguments, recompute=recompute)
        return y

    def in_torch(self, *leaves: Tensor) -> Tensor:
        """By torch in the dtype of the tensors, one rounding an op; the reference in fp32."""
        x, *weights, gate, up, down = leaves
        rows = torch.cat(
            [
                F.linear(F.silu(F.linear(x[t], gate[n])) * F.linear(x[t], up[n]), down[:, n])
                for t, n in self.groups()
            ]
        )
        if not weights:
            return rows
        offset = self.values["weight_offset"]
        return torch_combine(rows, weights[0] + offset, self.values["token_rows"])

    def exact(self) -> Tensor:
        """In fp32."""
        return self.in_torch(*(tensor.float() for tensor in self.leaves))

    def gradients(
        self, grad: Tensor, recompute: bool = False, wanted: Sequence[str] = ()
    ) -> tuple[Tensor, ...]:
        """Of some of the tensors, all by default, which alone ask for one."""
        wanted = wanted or self.floats
        leaves = {n: self.values[n].detach().requires_grad_(n in wanted) for n in self.floats}
        y = self.run(*leaves.values(), recompute=recompute)
        return torch.autograd.grad(y, [leaves[name] for name in wanted], grad)

    def exact_gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """In fp64."""
        wide = doubles(*self.leaves)
        return torch.autograd.grad(self.in_torch(*wide), wide, grad.double())

    def idle(self) -> Tensor:
        """Neurons that no row uses, bool [I]."""
        gate = self.values["gate_proj"]
        idle = torch.ones(len(gate), dtype=torch.bool, device=gate.device)
        for tokens, neurons in self.groups():
            idle[neurons] &= len(tokens) == 0
        return idle


def grouped_problem(*sizes: Any, **named: Any) -> Problem:
    return Problem("grouped_ffn_combine", grouped_values(*sizes, **named))


def pruned_problem(*sizes: Any, **named: Any) -> Problem:
    return Problem("pruned_ffn", pruned_values(*sizes, **named))


def of_experts(values: Values, layout: str) -> Values:
    """The same weights with a dimension of experts, laid out in some way."""
    count = values["num_experts"]
    gate, up = (values[name].unflatten(0, (count, -1)) for name in ("gate_proj", "up_proj"))
    down = values["down_proj"].unflatten(1, (count, -1)).transpose(0, 1)
    if layout == "halves":  # as transformers keeps them
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
        down = down.contiguous()
    elif layout == "apart":
        gate, up = (F.pad(weight, (0, 8, 0, 3), value=torch.nan) for weight in (gate, up))
        gate, up = gate[:, :-3, :-8], up[:, :-3, :-8]
        down = F.pad(down, (0, 16, 0, 5), value=torch.nan)[:, :-5, :-16]
    elif layout == "uneven":  # the two differ in how far experts lie apart
        gate = F.pad(gate, (0, 0, 0, 1), value=torch.nan)[:, :-1]
    return values | {"gate_proj": gate, "up_proj": up, "down_proj": down}


def torch_combine(y: Tensor, weights: Tensor | None, token_rows: Tensor) -> Tensor:
    """What torch computes in the dtype of y."""
    rows = y[token_rows.long()]
    if weights is not None:
        rows = rows * weights.to(y.dtype).unsqueeze(-1)
    return rows.sum(1)


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
    note_error(error / max(size, 1e-30))
    allowed = 2 * (torch_out.float() - ref).abs().max().item() + 1e-5
    if few:
        allowed += torch.finfo(out.dtype).eps * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients(
    own: Sequence[Tensor],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    leaves: Sequence[Tensor] | None = None,
) -> None:
    """Relative error below what a few dozen roundings of the dtype make of it.

    Gradients have that dtype, or those of the leaves.
    """
    dtypes = [dtype] * len(own) if leaves is None else [leaf.dtype for leaf in leaves]
    for position, (gradient, expected) in enumerate(zip(own, exact, strict=True)):
        assert gradient.shape == expected.shape
        assert gradient.dtype == dtypes[position]
        assert_near(f"gradient {position}", gradient, expected, dtype, 16)


def assert_near(
    name: str, out: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 4
) -> None:
    """Relative error below some roundings of the dtype; the tensors may be on two devices."""
    wide = exact.double().to(out.device)
    error, size = (out.double() - wide).norm(), wide.norm()
    note_error((error / size.clamp_min(1e-30)).item())
    allowed = roundings * torch.finfo(dtype).eps * size
    assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]
