# SPDX-License-Identifier: Apache-2.0
"""route_topk, sort_by_expert, permute, combine: exactly where that is possible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from awkward import each_thread_count, layouts
from torch import Tensor

from sparse_unified import ops
from sparse_unified.checks import CPU, CUDA, check
from sparse_unified.checks.kernels import few
from sparse_unified.checks.problems import (
    ARGUMENTS,
    DTYPES,
    assert_all_equal,
    assert_equal,
    call,
    cycle,
    grid,
    grouped_values,
)
from sparse_unified.ops import composed, reference


@check(*grid(dtype=DTYPES, num_tokens=(1, 37, 4096)), small=few)
def route_of_random_logits(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """The choice is the sorted one of the logits returned, which are close to exact; a token is
    routed the same in any company."""
    with torch.device(device):
        x = torch.randn(num_tokens, 1792).to(dtype)
        gate = (torch.randn(16, 1792) * 1792**-0.5).to(dtype)
    logits, topk_logits, topk_idx = found = ops.route_topk(x, gate, 8)
    error = (logits.double() - x.double() @ gate.double().t()).abs().max().item()
    assert error < 2e-5, f"logits are off by {error:.2g}"
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :8]
    assert_all_equal("choice", [topk_idx, topk_logits], [order.int(), logits.gather(1, order)])
    for tokens in (slice(0, 1), slice(3, 20)):
        alone = ops.route_topk(x[tokens], gate, 8)
        assert_all_equal("in other company", alone, [part[tokens] for part in found])


@check(*grid(dtype=DTYPES, num_experts=(4, 16, 33, 100)))
def route_of_extreme_logits(device: torch.device, dtype: torch.dtype, num_experts: int) -> None:
    """NaN first, infinities in order, zeros of both signs alike, ties to the lowest index."""
    most = torch.finfo(dtype).max
    values = (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, most, -most)
    with torch.device(device):
        wanted = torch.tensor(values)[torch.randint(len(values), (24, num_experts))]
        wanted[:4] = torch.tensor([0.0, -1.0, torch.nan, -torch.inf])[:, None]
        one = torch.ones(1, 1).to(dtype)
    for logits in wanted:  # a product with 0 would make NaN of inf: one hidden value of 1
        gate = logits[:, None].to(dtype)
        found = ops.route_topk(one, gate, num_experts // 2)
        keys = [(v == v, 0.0 if v != v else -v, e) for e, v in enumerate(gate[:, 0].tolist())]
        chosen = [key[2] for key in sorted(keys)[: num_experts // 2]]
        assert found[2][0].tolist() == chosen, f"{logits.tolist()}: {found[2].tolist()}"
        expected = reference.route_topk(one, gate, num_experts // 2)
        assert_all_equal(str(logits.tolist()), found, expected)


@check(*grid(dtype=DTYPES, hidden_size=(896, 897)), on=(CPU,))
def permute_of_more_than_the_caches_hold(
    device: torch.device, dtype: torch.dtype, hidden_size: int
) -> None:
    """16 MB and more: rows of whole cache lines go past the caches, others cannot."""
    v = grouped_values(1201, hidden_size, 16, 0, 8, dtype)
    for name, view in layouts(v["x"]):
        y = call("permute", v | {"x": view})
        assert y.nbytes > 2**24
        assert_equal(name, y, reference.permute(v["x"], v["row_token"]))


@check(*grid(dtype=DTYPES))
def routing_ops_take_any_layout_and_repeat(device: torch.device, dtype: torch.dtype) -> None:
    """Bit for bit, on any number of threads."""
    v = grouped_values(301, 130, 16, 0, 8, dtype, device=device)
    for name in ("x", "gate"):  # integers: sums are exact in every order
        v[name] = (4 * v[name]).round()

    def run(op: str, **changed: Tensor) -> list[Tensor]:
        found = call(op, v | changed)
        return [found] if isinstance(found, Tensor) else list(found)

    for op in ("permute", "route_topk", "combine", "sort_by_expert"):
        expected = run(op)
        for _ in each_thread_count():
            assert_all_equal(f"{op} again", run(op), expected)
        for name in ARGUMENTS[op]:
            if isinstance(v[name], Tensor):
                for layout, view in layouts(v[name]):
                    assert_all_equal(f"{op}, {name}: {layout}", run(op, **{name: view}), expected)
    one = v["x"][:1].expand(301, 130)
    expanded = call("permute", v | {"x": one})
    assert_equal("one token expanded", expanded, one[v["row_token"].long()])


# Gradients


# Importance


@check(
    *cycle(grid(num_tokens=(1, 37, 300), width=(1, 15, 50, 1100), is_weighted=(False, True)),
           dtype=DTYPES),
    *grid(num_tokens=(4096,), width=(40,), is_weighted=(False, True), dtype=DTYPES),
    {"num_tokens": 20, "width": 4096 + 50, "is_weighted": True, "dtype": torch.float32},
    on=(CPU, CUDA),
    small=few,
)  # fmt: skip
def importance_is_as_exact_as_torch(
    device: torch.device, dtype: torch.dtype, num_tokens: int, width: int, is_weighted: bool
) -> None:
    """Of kernel and composed ops alike; tokens of weight 0 count for nothing, even if NaN, and a
    token fires unless it is near the threshold."""
    v = grouped_values(num_tokens, 40, 1, width, 1, dtype, device=device)
    given, threshold = [v[name] for name in ("x", "gate_proj", "up_proj")], 0.1
    weight = v["token_weights"] * (torch.rand(num_tokens, device=device) > 0.3) + 1e-3
    weight = weight if is_weighted else torch.ones_like(weight)
    hidden = F.silu(F.linear(given[0], given[1])) * F.linear(given[0], given[2])
    wide = [tensor.double() for tensor in given]
    *exact, exact_fired = reference.ffn_importance(*wide, threshold, weight)
    if is_weighted:
        given[0] = torch.cat((given[0], torch.full_like(given[0][:1], torch.nan)))
        weight = torch.cat((weight, torch.zeros_like(weight[:1])))
    own_weights = weight if is_weighted else None
    sums_in_torch = [(part * weight[:num_tokens, None]).sum(0) for part in
                     (hidden.float().abs(), hidden.float().square())]  # fmt: skip
    total = weight.sum()
    size = (F.silu(wide[0] @ wide[1].t()) * (wide[0] @ wide[2].t())).abs()
    near = (size - threshold).abs() <= 4 * torch.finfo(dtype).eps * (1 + size)
    allowed_fired = (near * weight[:num_tokens, None]).sum(0) + 1e-5 * total
    for run in (ops.ffn_importance, composed.ffn_importance):
        *sums, num_fired = run(*given, threshold, own_weights)
        for own, torch_own, ref in zip(sums, sums_in_torch, exact, strict=True):
            assert own.dtype == torch.float32
            error = (own - ref).abs().max() / total
            torch_error = (torch_own - ref).abs().max() / total
            # Of few values, which of the two rounds worse is a matter of chance.
            chance = torch.finfo(dtype).eps * ref.max() / total if len(ref) < 1024 else 0
            assert error <= 2 * torch_error + 1e-6 + chance, f"off by {error:.2g}"
        assert ((num_fired - exact_fired).abs() <= allowed_fired).all()


@check(*grid(dtype=DTYPES, hidden_size=(17, 33, 38)), on=(CPU, CUDA))
def importance_reads_no_token_but_its_own(
    device: torch.device, dtype: torch.dtype, hidden_size: int
) -> None:
    """A NaN of a token of weight 0 stays out, also where rows end within a tile of a processor."""
    v = grouped_values(37, hidden_size, 1, 32, 1, dtype, device=device)
    weights = torch.ones(37, device=device)
    v["x"][20], weights[20] = torch.nan, 0
    sums = ops.ffn_importance(v["x"], v["gate_proj"], v["up_proj"], 0.1, weights)
    assert all(sum_.isfinite().all() for sum_ in sums)


@check(on=(CPU, CUDA))
def importance_counts_what_is_above_the_threshold(device: torch.device) -> None:
    """silu passes a gate of 32 on whole: h is exactly 32 * 0.5. Parts and threads round alike."""
    x, gate, up = (torch.full((1, 1), value, device=device) for value in (1.0, 32.0, 0.5))
    assert ops.ffn_importance(x, gate, up, 16.0)[2].item() == 0
    assert ops.ffn_importance(x, gate, up, 15.999)[2].item() == 1
    v = grouped_values(1024, 48, 1, 600, 1, device=device)
    x, gate, up = (v[name] for name in ("x", "gate_proj", "up_proj"))
    whole = ops.ffn_importance(x, gate, up, 0.1)
    for _ in each_thread_count():
        again = ops.ffn_importance(x, gate, up, 0.1)
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
        parts = [ops.ffn_importance(part, gate, up, 0.1) for part in x.split(512)]
        for own, first, second in zip(again, *parts, strict=True):
            torch.testing.assert_close(first + second, own, rtol=1e-6, atol=1e-6)
