# SPDX-License-Identifier: Apache-2.0
"""route_topk, sort_by_expert, permute, combine: exactly where that is possible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import (
    ARGUMENTS,
    DTYPES,
    ROUTINGS,
    assert_all_equal,
    assert_as_good_as_torch,
    assert_equal,
    assert_gradients,
    call,
    cycle,
    doubles,
    draw_routing,
    each_thread_count,
    grid,
    grouped_values,
    layouts,
    poison,
    torch_combine,
)
from registry import CPU, CUDA, check
from torch import Tensor

from sparse_unified import ops
from sparse_unified.ops import composed, reference

TOKENS = (0, 1, 37, 4096)
EXPERTS = ((16, 8), (32, 16), (5, 2), (12, 12), (1, 1), (33, 7))


def few(num_tokens: int = 0, **_: object) -> bool:
    return num_tokens < 1000


@check(
    *cycle(grid(num_tokens=TOKENS, experts=EXPERTS), dtype=DTYPES, hidden_size=(96, 300, 41, 130)),
    *cycle(grid(hidden_size=(3584, 8, 1), dtype=DTYPES), num_tokens=(37,), experts=EXPERTS),
    # More experts than are compared each with each.
    *grid(num_tokens=(37,), experts=((100, 9), (256, 8)), dtype=DTYPES, hidden_size=(96,)),
    small=few,
)
def route_of_exact_logits(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    experts: tuple[int, int],
    hidden_size: int,
) -> None:
    """Integers: sums are exact in every order, ties included."""
    num_experts, top_k = experts
    with torch.device(device):
        x = torch.randint(-3, 4, (num_tokens, hidden_size)).to(dtype)
        gate = torch.randint(-2, 3, (num_experts, hidden_size)).to(dtype)
    shapes = ((num_tokens, num_experts), (num_tokens, top_k))
    poison(device, *((shape, torch.float32) for shape in shapes))
    expected = reference.route_topk(x, gate, top_k)
    assert_all_equal("route_topk", ops.route_topk(x, gate, top_k), expected)


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


@check(
    *cycle(grid(routing=ROUTINGS, num_tokens=TOKENS), experts=EXPERTS),
    *cycle(grid(experts=(*EXPERTS, (256, 3), (3, 0))), routing=ROUTINGS, num_tokens=(300, 37)),
    # Both sides of the borders between tiles of the kernels, and between one block and several.
    *cycle(
        grid(experts=((7, 1), (33, 1), (256, 1)), num_tokens=(31, 33, 511, 513, 1023, 1025, 1537)),
        routing=("random", "gaps"),
    ),
    *grid(routing=("random", "repeated"), num_tokens=(1000, 70_000), experts=((16, 8), (200, 3))),
    small=lambda num_tokens, **_: num_tokens < 2000,
)
def sort_is_the_stable_one(
    device: torch.device, routing: str, num_tokens: int, experts: tuple[int, int]
) -> None:
    num_experts, top_k = experts
    with torch.device(device):
        topk_idx = draw_routing(routing, num_tokens, num_experts, top_k)
    expected = reference.sort_by_expert(topk_idx, num_experts)
    found = ops.sort_by_expert(topk_idx, num_experts)
    assert_all_equal("sort_by_expert", found, expected)
    # The invariants of routing, without the reference: every row once, of its own token.
    rows = found[2].reshape(-1).long()
    assert_equal("rows", rows.sort().values, torch.arange(len(rows), device=device))
    tokens = torch.arange(len(rows), device=device).int() // max(top_k, 1)
    assert_equal("row_token", found[1][rows], tokens)


@check(
    *cycle(
        grid(num_tokens=TOKENS, hidden_size=(1, 8, 67, 1000, 3584)),
        dtype=DTYPES,
        top_k=(8, 4, 1, 7),
    ),
    small=few,
)
def permute_and_combine(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, top_k: int
) -> None:
    v = grouped_values(num_tokens, hidden_size, 16, 0, top_k, dtype, device=device)
    x, y, token_rows = v["x"], v["y"], v["token_rows"]
    poison(device, (tuple(y.shape), dtype))
    assert_equal("permute", call("permute", v), reference.permute(x, v["row_token"]))
    poison(device, (tuple(x.shape), dtype))
    for weights, offset in ((v["weights"], v["weight_offset"]), (v["weights"], 0.0), (None, 2.0)):
        out = ops.combine(y, weights, token_rows, offset)
        exact = reference.combine(y.float(), weights, token_rows, offset)
        whole = None if weights is None else weights + offset
        assert_as_good_as_torch(out, torch_combine(y, whole, token_rows), exact)
        # One rounding of an fp32 sum, and the offset added in fp32.
        assert_equal("rounded once", out, ops.combine(y.float(), whole, token_rows).to(dtype))
    # Every row once: the sum over the rows of a token is K times the token, exact for integers.
    whole = (4 * x).round()
    back = ops.combine(call("permute", v | {"x": whole}), None, token_rows)
    assert_equal("combine of permute", back, (top_k * whole.float()).to(dtype))


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


@check(*grid(dtype=DTYPES, num_tokens=(1, 53, 300, 1000)), small=few)
def gradients_of_route_topk(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    """Against fp64, both at once and each argument alone."""
    v = grouped_values(num_tokens, 72, 17, 0, 5, device=device)
    tensors = [(4 * v["x"]).round().to(dtype), (4 * v["gate"]).round().to(dtype)]
    grads = v["grad_logits"], v["grad_topk_logits"]
    wide = doubles(*tensors)
    exact = torch.autograd.grad(
        reference.route_topk(*wide, 5)[:2], wide, [grad.double() for grad in grads]
    )
    for trained in ((0, 1), (0,), (1,)):
        leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
        logits, topk_logits, topk_idx = ops.route_topk(*leaves, 5)
        assert not topk_idx.requires_grad
        own = torch.autograd.grad((logits, topk_logits), [leaves[i] for i in trained], grads)
        assert_gradients(own, [exact[i] for i in trained], dtype)


@check(*grid(dtype=DTYPES, num_tokens=(1, 41, 300, 1000)), small=few)
def gradient_of_permute(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    v = grouped_values(num_tokens, 72, 5, 0, 3, dtype, device=device)
    x, row_token, grad = v["x"].requires_grad_(), v["row_token"], v["y"]
    (wide,) = doubles(x)
    own = torch.autograd.grad(ops.permute(x, row_token, v["token_rows"]), x, grad)
    exact = torch.autograd.grad(reference.permute(wide, row_token), wide, grad.double())
    assert_gradients(own, exact, dtype)


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
