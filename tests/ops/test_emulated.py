# SPDX-License-Identifier: Apache-2.0
"""What only emulated kernels can tell: every configuration, the edges of tiles, every schedule.

All new memory is NaN there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from awkward import lay_out
from tiers import IS_DEEP
from torch import Tensor

from sparse_unified.bench.suites import VARIABLE, find_variants
from sparse_unified.checks.problems import (
    HALVES,
    Problem,
    assert_all_equal,
    assert_as_good_as_torch,
    call,
    grouped_problem,
    grouped_values,
    of_experts,
    pruned_problem,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import backend, reference

EMULATION = torch.ops.sparse_unified_emulation
DTYPES = HALVES if IS_DEEP else HALVES[:1]
# Seed, index of emulation/schedule.h's Order, then of its Copies.
SCHEDULES = [(1, 0, 0), (2, 1, 2), (3, 2, 1), (4, 3, 2)]
if IS_DEEP:
    SCHEDULES += [
        (5 + 3 * order + copies, order, copies) for order in range(4) for copies in range(3)
    ]
# Number of multiprocessors (few make a block compute several tiles), variant.
SM80 = {
    "large": (0, "family=sm80,all=128x256x32x4"),
    "medium": (0, "family=sm80,all=128x128x32x3"),
    "small": (0, "family=sm80,all=64x128x32x4"),
}
SM90A = {
    "sm90a": (3, "family=sm90a"),
    "sm90a-multicast": (5, "family=sm90a,multicast=on,grad_multicast=on"),
    "sm90a-fence": (3, "family=sm90a,fence=producer,up=128x240x64x3,down=128x256x64x3"),
}
# Hidden size, expert width, rows of each expert: tails of 8 in every dimension.
CASES = {
    "ragged": (72, 40, (0, 1, 37, 130, 0, 64, 0)),
    "every token on every expert": (8, 8, (5, 5, 5)),
    "more experts than lanes": (16, 8, (0, 1, 2, 3) * 10 + (0, 1)),
    "an expert width of BAGEL": (72, 592, (3, 40)),
    "all rows on one expert": (264, 136, (0, 300, 0)),
    "more tiles of rows than one band": (136, 72, (3, 17 * 64 + 5)),
    "no rows": (16, 16, (0, 0)),
}
# Widths are multiples of 16; odd and even numbers of tiles of 128 rows; a last tile of neurons of
# each width from 64 to 256 columns, 32 apart.
HOPPER_CASES = {
    "ragged": (200, 144, (0, 1, 37, 130, 0, 64, 0)),
    "wider than a tile": (264, 272, (0, 300, 0)),
    "every token on every expert": (8, 16, (5, 5, 5)),
    "a long sum over one step of rows": (520, 48, (64, 65)),
    "pairs of tiles": (72, 368, (0, 300, 128, 0, 1, 129)),
    "a last tile of three boxes": (72, 592, (3, 130)),
    "a last tile of six boxes": (72, 448, (0, 40, 1)),
    "a last tile of seven boxes": (72, 208, (0, 40, 1)),
    "two whole tiles": (72, 512, (40, 1)),
    "more tiles of rows than one band": (72, 144, (17 * 128 + 3,)),
    "no rows": (16, 16, (0, 0)),
}
if not IS_DEEP:
    del CASES["more tiles of rows than one band"], HOPPER_CASES["more tiles of rows than one band"]


@pytest.fixture(autouse=True)
def _emulator() -> None:
    EMULATION.set_device(90)
    EMULATION.set_schedule(4, 3, 2)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses kernels by a name in SM80 or SM90A, or by variant; "" leaves the choice to them."""

    def choose(name: str) -> None:
        multiprocessors, variant = (SM80 | SM90A).get(name, (0, name))
        EMULATION.set_device(80 if name in SM80 else 90, multiprocessors)
        monkeypatch.setenv(VARIABLE, variant) if variant else monkeypatch.delenv(VARIABLE)

    return choose


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Names of the kernels that would run; while they are recorded, none does."""
    launches: list[str] = []
    EMULATION.record_launches(True)
    try:
        yield launches
    finally:
        launches += EMULATION.recorded_launches().splitlines()
        EMULATION.record_launches(False)


def problem_of(
    case: tuple[int, int, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """Given numbers of rows, of a token each; rows of the weights lie apart, NaN between them."""
    hidden_size, width, rows = case
    problem = grouped_problem(sum(rows), hidden_size, len(rows), width, 1, dtype)
    values = problem.values
    expert = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    topk_idx = expert[torch.randperm(len(expert))].int()[:, None]
    maps = reference.sort_by_expert(topk_idx, len(rows))
    values |= dict(zip(("expert_offsets", "row_token", "token_rows"), maps, strict=True))
    for name in ("gate_proj", "up_proj", "down_proj"):
        values[name] = lay_out(values[name] * 2, "padded rows")
    return problem


def results(problem: Problem) -> list[Tensor]:
    """y, then the gradients of what has one, by the kernels."""
    y, gate_rows, up_rows = problem.call(f"{problem.op}_train")
    kept = {"gate_rows": gate_rows, "up_rows": up_rows}
    return [y, *problem.call(f"{problem.op}_backward", **kept)]


def results_in_torch(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    leaves = [
        leaf.detach().to(torch.float32 if name == "weights" else dtype).requires_grad_()
        for name, leaf in zip(problem.floats, problem.leaves, strict=True)
    ]
    y = problem.in_torch(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.values["grad_y"].to(dtype))]


def assert_results(problem: Problem, dtype: torch.dtype, *, backward: bool = True) -> None:
    exact, in_torch = (results_in_torch(problem, d) for d in (torch.float32, dtype))
    found = results(problem) if backward else [problem.call()]
    for own, other, ref in zip(found, in_torch, exact, strict=backward):
        assert_as_good_as_torch(own, other, ref)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernels", "case"),
    [
        *((kernels, case) for kernels in SM80 for case in CASES),
        *((kernels, case) for kernels in SM90A for case in HOPPER_CASES),
    ],
)
def test_the_edges_of_tiles(
    kernels: str, case: str, dtype: torch.dtype, use: Callable[[str], None]
) -> None:
    use(kernels)
    assert_results(problem_of((CASES if kernels in SM80 else HOPPER_CASES)[case], dtype), dtype)


@pytest.mark.parametrize("layout", ["halves", "apart", "uneven"])
@pytest.mark.parametrize("kernels", SM90A)
def test_experts_may_lie_anywhere_on_hopper(
    kernels: str, layout: str, use: Callable[[str], None]
) -> None:
    """Weights with a dimension of experts give the bits of packed ones, gradients too."""
    problem = grouped_problem(300, 320, 3, 80, 2, torch.bfloat16, "gaps")
    other = Problem(problem.op, of_experts(problem.values, layout))
    use(kernels)
    with recorded() as launches:
        other.call()
    assert "up_sm90a" in launches[0]
    (own, *packed), (y, *gradients) = results(problem), results(other)
    assert torch.equal(y, own)
    values = of_experts(problem.values | dict(zip(problem.floats, packed, strict=True)), "")
    for name, gradient in zip(other.floats, gradients, strict=True):
        assert torch.equal(gradient, values[name]), name
    narrow = grouped_problem(300, 136, 3, 80, 2, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"hidden_size must be a multiple of 64 .*, got 136"):
        Problem(narrow.op, of_experts(narrow.values, "apart")).call()


def problems_of(variant: str, dtype: torch.dtype, *, backward: bool = False) -> list[Problem]:
    """Several tiles of rows and of neurons, an expert without rows, and those of blocks of 64 and
    32 that a configuration takes: for Hopper lists of blocks of 64, forward, in whole blocks."""
    kept = (7, 1, 2, 8)
    problems = [
        grouped_problem(150, 136, 3, 80, 2, dtype, "gaps"),
        pruned_problem(150, 136, 9, 64, kept, dtype),
        pruned_problem(150, 136, 9, 32, kept, dtype),
    ]
    return problems[: 3 if "sm90a" not in variant else 1 if backward or "x240x" in variant else 2]


def test_the_kernels_of_both_families_have_configurations() -> None:
    assert sum(variant.startswith("family=sm90a") for variant in find_variants("fwd")) == 10
    assert len(find_variants("fwd_bwd")) > 6


@pytest.mark.parametrize(
    ("direction", "variant"), [(d, v) for d in ("fwd", "fwd_bwd") for v in find_variants(d)]
)
def test_every_configuration_computes_the_same(
    direction: str, variant: str, use: Callable[[str], None]
) -> None:
    use(variant)
    backward = direction == "fwd_bwd"
    for dtype in DTYPES if backward else HALVES:
        for problem in problems_of(variant, dtype, backward=backward):
            assert_results(problem, dtype, backward=backward)


@pytest.mark.parametrize("kernels", [*SM80, *SM90A])
def test_no_schedule_changes_a_bit(kernels: str, use: Callable[[str], None]) -> None:
    use(kernels)
    problem = problem_of((CASES if kernels in SM80 else HOPPER_CASES)["ragged"])
    expected = results(problem)
    for schedule in SCHEDULES:
        EMULATION.set_schedule(*schedule)
        assert_all_equal(str(schedule), results(problem), expected)
        assert_all_equal(str(schedule), [problem.call()], expected[:1])


@pytest.mark.parametrize(("block_size", "is_hopper"), [(32, False), (64, True), (128, True)])
def test_blocks_of_64_run_forward_on_the_kernels_for_hopper(
    block_size: int, is_hopper: bool
) -> None:
    problem = pruned_problem(70, 72, 9, block_size, (7, 1, 2, 8), torch.bfloat16)
    with recorded() as launches:
        results(problem)
    text = "\n".join(launches)
    assert ("up_sm90a" in text) == is_hopper
    assert ("grouped_ffn_up_kernel" in text) != is_hopper
    assert "grad_hidden_sm90a" not in text


def test_blocks_that_share_the_weights_change_no_bit(use: Callable[[str], None]) -> None:
    for problem in problems_of("family=sm90a", torch.bfloat16):
        problem = problem.rows if "token_rows" in problem.values else problem
        use("family=sm90a")
        alone = problem.call()
        use("family=sm90a,multicast=on")
        assert torch.equal(problem.call(), alone)
        with recorded() as launches:
            problem.call()
        assert len(launches) == 2
        assert all(", 2>" in launch for launch in launches), launches


@pytest.mark.parametrize(
    ("width", "rule", "asked", "is_hopper"),
    [
        (80, "", "", True),
        (80, "90 0 0 0 0 0 0 0 family=sm80", "", False),
        (80, "80 0 0 0 0 0 0 0 family=sm80", "", True),
        (80, "90 0 136 5 80 0 1000 1 family=sm80", "", False),
        (80, "90 0 136 5 80 0 300 1 family=sm80", "", True),
        (80, "90 0 0 0 0 0 0 0 family=sm80", "family=sm90a", True),
        (24, "90 0 0 0 0 0 0 0 family=sm90a", "", False),  # which does not take this width
    ],
)
def test_a_rule_stands_for_the_choice_of_a_process(
    width: int, rule: str, asked: str, is_hopper: bool, use: Callable[[str], None]
) -> None:
    if asked:
        use(asked)
    EMULATION.set_rules(rule)
    try:
        with recorded() as launches:
            grouped_problem(400, 136, 5, width, 2, torch.bfloat16).call()
    finally:
        EMULATION.set_rules("")
    assert ("sm90a" in "".join(launches)) == is_hopper


def test_a_short_sum_takes_the_medium_tile() -> None:
    """The down-projection of h = 592: 19 steps, too few to hide the start of one large block."""
    EMULATION.set_device(80, 8)  # so that there are several rounds of tiles
    for width, tile in ((592, "<128, 128, 32"), (1184, "<128, 256, 32")):
        problem = grouped_problem(600, 1024, 2, width, 1, torch.bfloat16).rows
        with recorded() as launches:
            problem.call()
        up, down = launches
        assert "<128, 256, 32" in up
        assert tile in down


def test_a_process_may_leave_multiprocessors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer of them the same tiles are more rounds, enough for the large ones."""
    EMULATION.set_device(80)
    problem = grouped_problem(600, 1024, 3, 80, 2, torch.bfloat16)
    kernels = []
    for limit in ("108", "2"):
        monkeypatch.setenv("SPARSE_UNIFIED_NUM_SMS", limit)
        with recorded() as launches:
            problem.call()
        kernels.append(launches)
    assert kernels[0] != kernels[1]
    monkeypatch.setenv("SPARSE_UNIFIED_NUM_SMS", "none")
    with pytest.raises(RuntimeError, match=r"SPARSE_UNIFIED_NUM_SMS must be at least 1, got none"):
        problem.call()


def test_a_forward_pass_asks_torch_for_little_beside_the_ops() -> None:
    """Memory comes without the dispatcher, devices are described once."""
    block = SparseMoE(64, 8 * 48, 8, 2, dtype=torch.bfloat16, return_router_logits=False)
    x = torch.randn(9, 64).bfloat16()
    with torch.inference_mode(), torch.autograd.profiler.profile() as profile, recorded():
        block(x)
    calls = [event.name for event in profile.function_events]
    assert len([name for name in calls if name.startswith("sparse_unified::")]) == 3
    assert [name for name in calls if name.startswith("aten::")] == []


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "width", "num_experts"),
    [
        (torch.bfloat16, 40, 24, 5),
        (torch.float16, 8, 8, 256),
        (torch.float32, 40, 24, 5),
        (torch.bfloat16, 36, 24, 5),
        (torch.bfloat16, 40, 20, 5),
    ],
)
def test_python_and_the_library_refuse_alike(
    dtype: torch.dtype, hidden_size: int, width: int, num_experts: int
) -> None:
    why = backend.cuda_refusal(
        dtype=dtype, hidden_size=hidden_size, widths=(width, 0), num_experts=num_experts
    )
    problem = grouped_problem(3, hidden_size, num_experts, width, 1, dtype)
    if why is None:
        assert problem.call().shape == (3, hidden_size)
    else:
        with pytest.raises(RuntimeError, match="grouped_ffn"):
            problem.call()


@pytest.mark.parametrize("kernels", ["medium", "sm90a"])
@pytest.mark.parametrize(
    ("op", "name", "at", "value"),
    [
        ("sort_by_expert", "topk_idx", (-1, -1), 5),
        ("sort_by_expert", "topk_idx", (0, 0), -1),
        ("permute", "row_token", 3, 800),
        ("combine", "token_rows", (3, 1), 1600),
        ("combine", "token_rows", (3, 1), -1),
        ("grouped_ffn_combine_backward", "token_rows", (3, 1), 1600),
        ("route_topk_backward", "topk_idx", (0, 1), 5),
        ("grouped_ffn", "row_token", 3, 800),
        ("grouped_ffn", "row_token", 3, -1),
        ("grouped_ffn", "expert_offsets", -1, 1601),
        ("grouped_ffn", "expert_offsets", 2, 1601),
        ("pruned_ffn", "kept_blocks", -1, 7),
        ("pruned_ffn", "kept_blocks", 0, -1),
    ],
)
def test_an_index_outside_ends_the_kernel(
    op: str, name: str, at: int, value: int, kernels: str, use: Callable[[str], None]
) -> None:
    use(kernels)
    values = grouped_values(800, 72, 5, 48, 2, torch.bfloat16)
    if op == "pruned_ffn":
        values = pruned_problem(70, 40, 7, 64, dtype=torch.bfloat16).values
    values[name][at] = value
    with pytest.raises(RuntimeError, match="device_check"):
        call(op, values)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("route_topk", {"gate": torch.zeros(5, 40)}, "route_topk: gate must have dtype bfloat16"),
        ("route_topk", {"top_k": 6}, "route_topk: top_k must be from 1 to .* 5, got 6"),
        ("sort_by_expert", {"num_experts": 257}, "num_experts must be at most 256 on CUDA, got"),
        ("sort_by_expert", {"topk_idx": torch.zeros(3, 2)}, "topk_idx must have dtype int32"),
    ],
)
def test_bad_arguments_are_named_before_a_kernel_runs(
    op: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(op, grouped_values(dtype=torch.bfloat16) | change)
