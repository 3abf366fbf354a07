# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels at the edges of their tiles, in the emulator, where all new memory is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import assert_as_good_as_torch, layouts
from tiers import IS_DEEP
from torch import Tensor

from sparse_unified import ops
from sparse_unified.bench.tune import VARIABLE
from sparse_unified.ops import reference

KERNELS = torch.ops.sparse_unified
EMULATION = torch.ops.sparse_unified_emulation

# Seed, index of emulation/schedule.h's Order, then of its Copies.
SCHEDULES = [(1, 0, 0), (2, 1, 2), (3, 2, 1), (4, 3, 2)]
if IS_DEEP:
    SCHEDULES += [
        (5 + 3 * order + copies, order, copies) for order in range(4) for copies in range(3)
    ]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)

# Device, number of multiprocessors (few make a block compute several tiles), variant.
TILES = {
    "large": (80, 0, "all=128x256x32x4"),
    "medium": (80, 0, "all=128x128x32x3"),
    "small": (80, 0, "all=64x128x32x4"),
}
HOPPER = {
    "sm90a": (90, 3, "family=sm90a"),
    "sm90a-multicast": (90, 5, "family=sm90a,multicast=on"),
    "sm90a-fence": (90, 3, "family=sm90a,fence=producer,up=128x240x64x3,down=128x256x64x3"),
}
# Tokens, hidden size, expert width, rows of each expert: tails of 8 in every dimension.
CASES = {
    "ragged": (60, 72, 40, (0, 1, 37, 130, 0, 64, 0)),
    "every token on every expert": (5, 8, 8, (5, 5, 5)),
    "more experts than lanes": (9, 16, 8, (0, 1, 2, 3) * 10 + (0, 1)),
    "an expert width of BAGEL": (40, 72, 592, (3, 40)),
    "all rows on one expert": (300, 264, 136, (0, 300, 0)),
    "more tiles of rows than one band": (20, 136, 72, (3, 17 * 64 + 5)),
    "no rows": (4, 16, 16, (0, 0)),
}
# Widths are multiples of 16; odd and even numbers of tiles of 128 rows.
HOPPER_CASES = {
    "ragged": (60, 200, 144, (0, 1, 37, 130, 0, 64, 0)),
    "wider than a tile": (300, 264, 272, (0, 300, 0)),
    "every token on every expert": (5, 8, 16, (5, 5, 5)),
    "a long sum over one step of rows": (40, 520, 48, (64, 65)),
    "pairs of tiles": (50, 72, 144, (0, 300, 128, 0, 1, 129)),
    "more tiles of rows than one band": (30, 72, 144, (17 * 128 + 3,)),
    "no rows": (4, 16, 16, (0, 0)),
}
if not IS_DEEP:
    del CASES["more tiles of rows than one band"], HOPPER_CASES["more tiles of rows than one band"]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    """Begins on an A100; new memory is NaN."""
    EMULATION.set_device(80)
    EMULATION.set_schedule(1, 0, 0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> None:
    EMULATION.set_schedule(*request.param)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the device and kernels of a name in TILES or HOPPER."""

    def choose(name: str) -> None:
        device, multiprocessors, variant = (TILES | HOPPER)[name]
        EMULATION.set_device(device, multiprocessors)
        monkeypatch.setenv(VARIABLE, variant if device == 90 else f"family=sm80,{variant}")

    return choose


def draw(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def grouped(case: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of grouped_ffn; rows of the weights lie apart, with NaN between them."""
    num_tokens, hidden, width, group_rows = case
    neurons = width * len(group_rows)
    offsets = torch.tensor((0, *group_rows)).cumsum(0).int()
    scale = 2 * hidden**-0.5
    weights = [
        next(iter(layouts(draw(shape, factor * scale, dtype))))[1]
        for shape, factor in (
            ((neurons, hidden), 1),
            ((neurons, hidden), 1),
            ((hidden, neurons), 2),
        )
    ]
    row_token = torch.randint(num_tokens, (int(offsets[-1]),), dtype=torch.int32)
    return draw((num_tokens, hidden), 1, dtype), row_token, offsets, *weights


def torch_grouped_ffn(x: Tensor, row_token: Tensor, offsets: Tensor, *weights: Tensor) -> Tensor:
    """By torch in the dtype of x, one rounding an op."""
    rows = x[row_token.long()].split(offsets.diff().tolist())
    gate, up = (weight.chunk(len(rows)) for weight in weights[:2])
    down = weights[2].chunk(len(rows), dim=1)
    return torch.cat(
        [
            F.linear(F.silu(F.linear(own, g)) * F.linear(own, u), d)
            for own, g, u, d in zip(rows, gate, up, down, strict=True)
        ]
    )


def run(arguments: tuple[Tensor, ...], grad_y: Tensor) -> list[Tensor]:
    """y, then the gradients of the rows and of the three weights, by the kernels."""
    y, *activations = KERNELS.grouped_ffn_train(*arguments)
    return [y, *KERNELS.grouped_ffn_backward(grad_y, *arguments, *activations, True, True)]


def run_in_torch(arguments: tuple[Tensor, ...], grad_y: Tensor) -> list[Tensor]:
    x, row_token, offsets, *weights = arguments
    leaves = [x[row_token.long()], *weights]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    rows = torch.arange(len(row_token))
    y = torch_grouped_ffn(leaves[0], rows, offsets, *leaves[1:])
    y.backward(grad_y)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def wide(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.is_floating_point() else t for t in arguments)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", HALVES if IS_DEEP else HALVES[:1])
@pytest.mark.parametrize(
    ("kernels", "case"),
    [
        *((kernels, case) for kernels in TILES for case in CASES),
        *((kernels, case) for kernels in HOPPER for case in HOPPER_CASES),
    ],
)
def test_grouped_ffn_and_its_gradients(
    kernels: str, case: str, dtype: torch.dtype, use: Callable[[str], None]
) -> None:
    use(kernels)
    EMULATION.set_schedule(4, 3, 2)
    arguments = grouped((CASES if kernels in TILES else HOPPER_CASES)[case], dtype)
    grad_y = draw((len(arguments[1]), arguments[0].shape[1]), 1, dtype)
    ours = run(arguments, grad_y)
    for found, in_torch, exact in zip(
        ours,
        run_in_torch(arguments, grad_y),
        run_in_torch(wide(arguments), grad_y.float()),
        strict=True,
    ):
        assert_as_good_as_torch(found, in_torch, exact)


@pytest.mark.parametrize("kernels", [*TILES, *HOPPER])
def test_no_schedule_changes_a_bit(kernels: str, use: Callable[[str], None]) -> None:
    use(kernels)
    case = CASES["ragged"] if kernels in TILES else HOPPER_CASES["ragged"]
    arguments = grouped(case, torch.bfloat16)
    grad_y = draw((len(arguments[1]), arguments[0].shape[1]), 1, torch.bfloat16)
    expected = run(arguments, grad_y)
    for schedule in SCHEDULES:
        EMULATION.set_schedule(*schedule)
        assert equal(run(arguments, grad_y), expected), schedule
        assert torch.equal(KERNELS.grouped_ffn(*arguments), expected[0]), schedule


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_does_not_depend_on_its_place(dtype: torch.dtype, use: Callable[[str], None]) -> None:
    for kernels in (*TILES, "sm90a"):
        use(kernels)
        y = KERNELS.grouped_ffn(*grouped((1, 72, 48, (200,)), dtype))
        assert torch.equal(y, y[:1].expand_as(y)), kernels


@pytest.mark.parametrize("case", ["ragged", "no rows"])
def test_what_is_not_wanted_is_not_computed(case: str) -> None:
    arguments = grouped(CASES[case], torch.float16)
    grad_y = draw((len(arguments[1]), arguments[0].shape[1]), 1, torch.float16)
    _, *activations = KERNELS.grouped_ffn_train(*arguments)
    everything = KERNELS.grouped_ffn_backward(grad_y, *arguments, *activations, True, True)
    idle = [expert for expert, rows in enumerate(CASES[case][3]) if rows == 0]
    for grad, dim in zip(everything[1:], (0, 0, 1), strict=True):
        assert not grad.unflatten(dim, (len(CASES[case][3]), -1)).movedim(dim, 0)[idle].any()
    for needs in ((True, False), (False, True), (False, False)):
        found = KERNELS.grouped_ffn_backward(grad_y, *arguments, *activations, *needs)
        for grad, whole, needed in zip(found, everything, (needs[0], *[needs[1]] * 3), strict=True):
            assert torch.equal(grad, whole) if needed else grad.numel() == 0


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    arguments = grouped((16, 16, 16, (40,)), torch.bfloat16)
    expected = KERNELS.grouped_ffn(*arguments)
    stride = 2**29
    for index in (0, 3, 4, 5):
        near = arguments[index]
        path = tmp_path / str(index)
        path.touch()
        sparse = torch.from_file(str(path), shared=True, size=16 * stride, dtype=torch.bfloat16)
        far = sparse.view(16, stride)[:, : near.shape[1]]
        far.copy_(near)
        moved = (*arguments[:index], far, *arguments[index + 1 :])
        assert torch.equal(KERNELS.grouped_ffn(*moved), expected), index
        path.unlink()


@pytest.mark.parametrize("kernels", ["medium", "sm90a"])
@pytest.mark.parametrize(
    ("index", "at", "value"),
    [(1, 3, 60), (1, 3, -1), (2, -1, 233), (2, 2, 300)],
    ids=["a token beyond", "a negative token", "an offset beyond", "falling offsets"],
)
def test_an_index_outside_ends_the_kernel(
    index: int, at: int, value: int, kernels: str, use: Callable[[str], None]
) -> None:
    use(kernels)
    arguments = grouped((60, 72, 48, CASES["ragged"][3]), torch.bfloat16)
    arguments[index][at] = value
    with pytest.raises(RuntimeError, match="device_check"):
        KERNELS.grouped_ffn(*arguments)


PRUNED = {
    "an odd number of blocks, the last first": (70, 200, 64, 5, (4, 0, 3)),
    "whole tiles": (140, 136, 128, 3, (2, 0)),
    "one block": (3, 8, 64, 1, (0,)),
    "blocks that no box fits": (70, 40, 48, 6, (4, 0, 3, 1)),
}


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("device", [80, 90])
@pytest.mark.parametrize("case", PRUNED)
def test_pruned_ffn_reads_what_is_kept_alone(case: str, device: int) -> None:
    """What is not kept is NaN; and the list of one call is nothing to the next."""
    EMULATION.set_device(device, 3)
    num_tokens, hidden, block_size, num_blocks, kept = PRUNED[case]
    dtype = torch.bfloat16
    width = num_blocks * block_size
    scale = 2 * hidden**-0.5
    x = draw((num_tokens, hidden), 1, dtype)
    all_weights = (
        draw((width, hidden), scale, dtype),
        draw((width, hidden), scale, dtype),
        draw((hidden, width), 2 * scale, dtype),
    )
    for blocks in (kept, kept[::-1]):
        neurons = [block * block_size + i for block in blocks for i in range(block_size)]
        gate, up, down = (torch.full_like(weight, torch.nan) for weight in all_weights)
        gate[neurons], up[neurons] = all_weights[0][neurons], all_weights[1][neurons]
        down[:, neurons] = all_weights[2][:, neurons]
        rows = torch.arange(num_tokens, dtype=torch.int32)
        dense = (x, rows, torch.tensor([0, num_tokens]), gate[neurons], up[neurons])
        dense = (*dense, down[:, neurons])
        assert_as_good_as_torch(
            ops.pruned_ffn(x, torch.tensor(blocks, dtype=torch.int32), gate, up, down, block_size),
            torch_grouped_ffn(*dense),
            reference.grouped_ffn(*wide(dense)),
        )
    for wrong in (-1, num_blocks):
        blocks = torch.tensor((*kept[:-1], wrong), dtype=torch.int32)
        with pytest.raises(RuntimeError, match="device_check"):
            ops.pruned_ffn(x, blocks, *all_weights, block_size)


def integers(shape: tuple[int, ...], limit: int, dtype: torch.dtype) -> Tensor:
    """Sums of their products are exact in fp32."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def selection(logits: Tensor, top_k: int) -> Tensor:
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [1, 5, 16, 32, 33, 256] if IS_DEEP else [5, 33, 256])
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 37), (37, 264), (3, 520), (200, 33)])
def test_routing_and_its_gradients_are_exact(
    num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype
) -> None:
    """Small integers, with many ties, in every layout: equal to the last bit."""
    top_k = min(num_experts, 8)
    x, gate = integers((num_tokens, hidden_size), 4, dtype), integers((256, hidden_size), 1, dtype)
    gate = gate[:num_experts]
    exact = x.double() @ gate.double().T
    order = selection(exact, top_k)
    for (name, own_x), (_, own_gate) in zip(layouts(x), layouts(gate), strict=True):
        logits, topk_logits, topk_idx = ops.route_topk(own_x, own_gate, top_k)
        assert torch.equal(logits.double(), exact), name
        assert torch.equal(topk_idx.long(), order), name
        assert torch.equal(topk_logits, logits.gather(1, order)), name

    x, gate = x.sign(), gate.sign()
    grad_logits = integers((num_tokens, num_experts), 1, torch.float32)
    grad_topk = integers((num_tokens, top_k), 1, torch.float32)
    grad = grad_logits.scatter_add(1, order, grad_topk)
    x[torch.rand_like(x, dtype=torch.float32) > 16 / num_tokens] = 0
    gate[torch.rand_like(gate, dtype=torch.float32) > 16 / num_experts] = 0
    grads = KERNELS.route_topk_backward(grad_logits, grad_topk, order.int(), x, gate, True, True)
    assert torch.equal(grads[0], (grad @ gate.float()).to(dtype))
    assert torch.equal(grads[1], (grad.T @ x.float()).to(dtype))


# Both sides of every border between tiles, of that between one block and several, and tiles for
# two blocks and three.
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("num_experts", [1, 7, 32, 33, 256])
def test_sort_at_the_borders_of_its_tiles(num_experts: int) -> None:
    shapes = [(n, 1) for n in (31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 1536, 1537)]
    if IS_DEEP:
        shapes += [(8500, 8), (131073, 1)]
    for shape in (*shapes, (261, 8)):
        drawn = torch.randint(num_experts, shape, dtype=torch.int32)
        runs = (torch.arange(drawn.numel()) // 40 % num_experts).int().view(shape)
        for topk_idx in (drawn, drawn // 3 * 3, runs):
            found = ops.sort_by_expert(topk_idx, num_experts)
            assert equal(list(found), list(reference.sort_by_expert(topk_idx, num_experts)))


@pytest.mark.parametrize("bad", [-1, 5])
def test_rows_tokens_and_experts_outside_end_the_kernel(bad: int) -> None:
    idx = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    rows = torch.randn(4, 8)
    out_of_range = idx.clone()
    out_of_range[1, 0] = bad
    many = torch.zeros(800, 2, dtype=torch.int32)
    many[-1, -1] = bad
    calls = [
        lambda: ops.sort_by_expert(out_of_range, 5),
        lambda: ops.sort_by_expert(many, 5),
        lambda: ops.combine(rows, None, out_of_range),
        lambda: KERNELS.combine_backward(
            torch.randn(2, 8), rows, torch.ones(2, 2), out_of_range, True, False
        ),
        lambda: ops.permute(torch.randn(2, 8), out_of_range.flatten(), idx),
        lambda: KERNELS.route_topk_backward(
            torch.randn(2, 5),
            torch.randn(2, 2),
            out_of_range,
            torch.randn(2, 8),
            torch.randn(5, 8),
            True,
            True,
        ),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="device_check"):
            call()
