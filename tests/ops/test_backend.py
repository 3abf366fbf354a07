# SPDX-License-Identifier: Apache-2.0
"""Which kernels a sparse FFN runs on, and why none."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from refusals import refused

from sparse_unified import _library
from sparse_unified.bench import suites
from sparse_unified.bench.cases import Case
from sparse_unified.checks import kernels
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.dense import SwiGLU
from sparse_unified.nn.expert_state import PROJECTIONS
from sparse_unified.ops import backend, choices, composed, reference
from sparse_unified.surgery.quantize import quantize_ffn_

BAGEL: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "hidden_size": 3584,
    "widths": (1184, 0),
    "num_experts": 16,
}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An H200, as far as the choice can see, and facts of a build with CUDA kernels."""
    facts = {
        "cuda_architectures": "sm_80 sm_90a sm_100 sm_120",
        "cuda_toolkit": "13.0",
        "cuda_driver": "13.1",
        "capability": (9, 0),
    }
    monkeypatch.setattr(_library, "module", SimpleNamespace(build_info=lambda: facts))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts["capability"])
    monkeypatch.delenv(backend.OVERRIDE, raising=False)
    for name in ("key_of", "device_name"):
        monkeypatch.setattr(choices, name, str)
    caches = (
        backend._device_refusal,
        backend._capability,
        backend._cached_choices,
        choices.refused,
    )
    for cache in caches:
        cache.cache_clear()
    yield facts
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("device", "change", "chosen"),
    [
        ("cpu", {"dtype": torch.float32, "widths": (3, 1), "hidden_size": 5}, "^cpu$"),
        ("meta", {}, "device type 'meta'"),
        ("cuda", {}, "^cuda$"),
        ("cuda", {"dtype": torch.float16, "widths": (1184, 1184)}, "^cuda$"),
        ("cuda", {"widths": (8, 0)}, "^cuda$"),
        ("cuda", {"dtype": torch.float32}, "torch: .*bfloat16 and float16, got float32"),
        ("cuda", {"hidden_size": 3580}, "torch: .*hidden size that is a multiple of 8, got 3580"),
        ("cuda", {"widths": (1184, 4)}, "torch: .*width that is a multiple of 8, got 4"),
        ("cuda", {"num_experts": 512}, "torch: .*up to 256 experts, got 512"),
    ],
)
def test_what_runs_and_why_not(device: str, change: dict[str, Any], chosen: str) -> None:
    found = backend.choose(torch.device(device), **{**BAGEL, **change})
    assert re.search(chosen, found), found


BOTH = "sm_80 sm_90a sm_120"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"cuda_architectures": "none"}, "without nvcc"),
        *(
            ({"cuda_architectures": codes, "capability": capability}, why)
            for codes, capability, why in (
                (BOTH, (9, 0), ""),
                (BOTH, (8, 9), ""),
                (BOTH, (12, 1), ""),
                (BOTH, (11, 0), f"have code for {BOTH}, got compute capability 11.0"),
                ("sm_80 compute_80 sm_90a", (13, 0), ""),
                ("sm_80 compute_80 sm_90a", (7, 5), "got compute capability 7.5"),
                ("sm_86", (8, 0), "8.0"),
                ("sm_90a", (8, 0), "8.0"),
                ("sm_100a", (10, 3), "10.3"),
                ("sm_100", (10, 3), ""),
                ("compute_90", (8, 0), "8.0"),
            )
        ),
        *(
            ({"cuda_toolkit": toolkit, "cuda_driver": driver}, why)
            for toolkit, driver, why in (
                ("13.2", "13.0", ""),  # any toolkit of the driver's major version
                ("12.8", "13.0", ""),
                ("12.8", "12.4", ""),
                ("13.0", "12.8", "or newer, got one for 12.8"),
                ("12.8", "12.2", "or newer, got one for 12.2"),  # cannot unpack compressed code
                ("13.0", "none", "or newer, got one for none"),
            )
        ),
    ],
)
def test_cuda_takes_what_library_and_driver_have_code_for(
    facts: dict[str, Any], why: str, gpu: dict[str, Any]
) -> None:
    gpu |= facts
    chosen = backend.choose(CUDA, **BAGEL)
    assert why in chosen if why else chosen.startswith("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "override", "chosen"),
    [
        ((10, 0), torch.bfloat16, "", "cuda, grouped_mm"),
        ((10, 3), torch.bfloat16, "", "cuda, grouped_mm"),
        ((10, 0), torch.float16, "", "cuda"),
        ((9, 0), torch.bfloat16, "", "cuda"),
        ((12, 0), torch.bfloat16, "", "cuda"),
        ((10, 0), torch.bfloat16, "family=sm80", "cuda"),
        ((10, 0), torch.bfloat16, "all=64x128x32x4", "cuda, grouped_mm"),
        ((9, 0), torch.bfloat16, "overlap=off,family=grouped_mm", "cuda, grouped_mm"),
        ((9, 0), torch.float16, "family=grouped_mm", "cuda"),
    ],
)
def test_torch_multiplies_on_blackwell_and_where_asked(
    capability: tuple[int, int],
    dtype: torch.dtype,
    override: str,
    chosen: str,
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu["capability"] = capability
    monkeypatch.setenv(backend.OVERRIDE, override)
    assert backend.choose(CUDA, **BAGEL | {"dtype": dtype}) == chosen


def keep(monkeypatch: pytest.MonkeyPatch, refused: str = "", **variants: str) -> None:
    """As if `doctor` had refused a family, and `tune` found overrides forward or backward."""
    sizes = "3584 16 1184 0 8192"
    found = {f"0 0 {sizes} {1 + (name == 'backward')}": text for name, text in variants.items()}
    entry = {"refused": {refused: "fails"} if refused else {}, "variants": found}
    monkeypatch.setattr(choices, "_entries", {str(CUDA): entry})


@pytest.mark.parametrize(
    ("capability", "kept", "chosen"),
    [
        ((9, 0), {"forward": "family=grouped_mm"}, {8192, 4096, 16383}),
        ((9, 0), {"forward": "family=sm90a,multicast=on"}, set()),
        ((9, 0), {"backward": "family=grouped_mm"}, set()),
        ((10, 0), {"backward": "family=sm80"}, {4095, 4096, 8192, 16383, 16384}),
        ((10, 0), {"forward": "family=sm80"}, {4095, 16384}),
        ((10, 0), {"refused": "grouped_mm"}, set()),
        ((9, 0), {"refused": "grouped_mm", "forward": "family=grouped_mm"}, set()),
    ],
)
def test_torch_multiplies_as_many_rows_as_it_was_faster_for_and_none_that_it_gets_wrong(
    capability: tuple[int, int],
    kept: dict[str, str],
    chosen: set[int],
    gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu["capability"] = capability
    keep(monkeypatch, **kept)
    with torch.no_grad():
        found = {
            rows
            for rows in (4095, 4096, 8192, 16383, 16384)
            if backend.choose(CUDA, **BAGEL, num_rows=rows) == backend.GROUPED_MM
        }
    assert found == chosen
    by_default = capability == (10, 0) and "refused" not in kept
    for other in ({}, {"num_rows": 8192, "widths": (592, 0)}):  # of any number, of other sizes
        assert (backend.choose(CUDA, **BAGEL | other) == backend.GROUPED_MM) == by_default


def test_torchs_products_are_a_variant(as_gpu: dict[str, Any]) -> None:
    case = Case(
        name="small", tokens=40, hidden_size=64, intermediate_size=96, num_experts=4, top_k=2
    )
    cpu, products = torch.device("cpu"), mock.Mock(wraps=torch.nn.functional.grouped_mm)
    with mock.patch.object(torch.nn.functional, "grouped_mm", products):
        for capability, num_calls in (((9, 0), 0), ((10, 0), 3)):
            as_gpu["capability"] = capability
            for cache in (backend._capability, backend._cached_choices):
                cache.cache_clear()
            suite = suites.variant_suite(
                case, torch.bfloat16, "fwd_bwd", cpu, ("family=grouped_mm", "family=sm80")
            )
            for variant, of_variant in (
                (suites.CHOSEN, num_calls),
                ("family=grouped_mm", 3),
                ("family=sm80", 0),
            ):
                call = suite.candidates[variant].build()  # compares with the chosen one
                products.reset_mock()
                call(0)
                assert products.call_count == of_variant, variant
            suites.set_variant(suites.CHOSEN)
    assert suites.runs_grouped_mm(case, torch.bfloat16, CUDA)
    assert not suites.runs_grouped_mm(case, torch.float16, CUDA)
    assert not suites.runs_grouped_mm(replace(case, block_size=16), torch.bfloat16, CUDA)
    as_gpu["capability"] = (8, 0)
    backend._capability.cache_clear()
    assert not suites.runs_grouped_mm(case, torch.bfloat16, CUDA)


@pytest.fixture
def as_gpu(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Blocks take the CPU for a GPU, of these facts."""
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda _, **facts: choose(CUDA, **facts))
    return gpu


@pytest.mark.parametrize(("shared", "num_tokens"), [(0, 61), (1, 300), (0, 0)])
def test_a_block_on_blackwell_is_that_of_the_cpu(
    shared: int, num_tokens: int, as_gpu: dict[str, Any]
) -> None:
    as_gpu["capability"] = (10, 0)
    products = mock.Mock(wraps=torch.nn.functional.grouped_mm)
    cpu = torch.device("cpu")
    with mock.patch.object(torch.nn.functional, "grouped_mm", products):
        kernels.block_is_that_of_the_cpu(cpu, torch.bfloat16, shared, False, num_tokens)
    assert products.call_count == (6 if num_tokens else 0)  # with gradients and without


@pytest.mark.parametrize("kept", [{}, {"backward": "family=grouped_mm"}])
def test_a_block_on_blackwell_compiles_as_one_graph(
    kept: dict[str, str], as_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_gpu["capability"] = (10, 0)
    keep(monkeypatch, **kept)
    facts = functools.partial(pickle.loads, pickle.dumps(as_gpu))
    monkeypatch.setattr(_library.module, "build_info", facts)
    kernels.block_compiles_as_one_graph(torch.device("cpu"), torch.bfloat16, "aot_eager")


@pytest.mark.parametrize(
    ("device", "capability", "change", "chosen"),
    [
        ("cuda", (9, 0), {}, "^cuda, scaled_grouped_mm$"),
        ("cuda", (10, 3), {"widths": (1184, 1184)}, "^cuda, scaled_grouped_mm$"),
        ("cuda", (8, 9), {}, "torch: .*capability 9.x or 10.x, got 8.9"),
        ("cuda", (12, 0), {}, "torch: .*capability 9.x or 10.x, got 12.0"),
        ("cuda", (7, 5), {}, "torch: the CUDA kernels have code for .*, got .* 7.5"),
        ("cpu", (9, 0), {}, "torch: .*got device type 'cpu'"),
        ("cuda", (9, 0), {"dtype": torch.float16}, "torch: .*of bfloat16, got float16"),
        ("cuda", (9, 0), {"widths": (1184, 8)}, "torch: .*multiples of 16, got 8"),
        ("cuda", (9, 0), {"hidden_size": 3576}, "torch: .*multiples of 16, got 3576"),
    ],
)
def test_fp8_is_multiplied_where_torch_does_it(
    device: str,
    capability: tuple[int, int],
    change: dict[str, Any],
    chosen: str,
    gpu: dict[str, Any],
) -> None:
    gpu["capability"] = capability
    found = backend.choose(torch.device(device), **BAGEL | change, fp8=True)
    assert re.search(chosen, found), found


def scaled_grouped_mm(rows: Any, weights: Any, *scales: Any, offs: Any) -> torch.Tensor:
    """The product in plain torch, if torch takes what it is given."""
    on_meta = (x.to("meta") for x in (rows, weights, scales[0], scales[2]))
    shape = torch._scaled_grouped_mm(*on_meta, offs=offs.to("meta")).shape
    for pointer in (rows.data_ptr(), *(weight.data_ptr() for weight in weights)):
        assert pointer % 16 == 0  # TMA
    for size in (rows.shape[1], *weights.shape[1:], weights.stride(2)):
        assert size % 16 == 0
    assert {scales[1], scales[3]} == {torch.nn.functional.ScalingType.RowWise}
    assert (offs.dtype, int(offs[-1])) == (torch.int32, len(rows))
    y = reference.scaled_grouped_mm(rows, weights, *scales, offs=offs)
    assert y.shape == shape
    return y


@pytest.fixture
def fp8_block(as_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> SparseMoE:
    """A block that multiplies in fp8, with the CPU for a GPU; one expert gets no token."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", scaled_grouped_mm)
    facts = functools.partial(pickle.loads, pickle.dumps(as_gpu))  # compiled code, as it is
    monkeypatch.setattr(_library.module, "build_info", facts)
    torch.manual_seed(0)
    block = SparseMoE(64, 9 * 32, 8, 3, 1, return_router_logits=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(block.gate.weight, std=0.1)
    with torch.no_grad():
        block.gate.weight[5] = 0
        block.gate.weight[5, 0] = -100
        block.up_proj[40:44] = 0  # neurons that never fire
    block.requires_grad_(False).strict = True
    return block


def rounded(rows: torch.Tensor) -> torch.Tensor:
    values, scales = composed.to_fp8(rows)
    return values.float() * scales.unsqueeze(1)


def rounded_block(block: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """What a block computes with weights, tokens and hidden rows rounded to fp8."""
    _, topk_logits, topk_idx = block.route(x)
    weights = torch.zeros(len(x), 8).scatter(1, topk_idx.long(), 1 + topk_logits)
    weights = torch.cat([1 + block.gate_shared(x).float(), weights], dim=1)
    gate, up, down = (rounded(getattr(block, name)) for name in PROJECTIONS)
    tokens = rounded(x)
    y = torch.zeros(x.shape)
    for expert, weight in enumerate(weights.t()):
        own = slice(32 * expert, 32 * expert + 32)
        of_gate, of_up = ((tokens @ w[own].t()).bfloat16() for w in (gate, up))
        hidden = torch.nn.functional.silu(of_gate) * of_up
        y += weight.unsqueeze(1) * (rounded(hidden) @ down[:, own].t())
    return y


@pytest.mark.parametrize("num_tokens", [61, 1, 0])
def test_fp8_experts_get_views_that_torch_takes(num_tokens: int, fp8_block: SparseMoE) -> None:
    x = torch.randn(num_tokens, 64).bfloat16().abs()
    x[3:5] = 0
    expected = rounded_block(fp8_block, x)
    quantize_ffn_(fp8_block, "fp8-compute")
    assert fp8_block.active_backend == "cuda, scaled_grouped_mm"
    stored = [getattr(fp8_block, name).qdata.untyped_storage().data_ptr() for name in PROJECTIONS]
    products = mock.Mock(wraps=torch.nn.functional.scaled_grouped_mm)
    with mock.patch.object(torch.nn.functional, "scaled_grouped_mm", products):
        y = fp8_block(x)
    used = [call.args[1].untyped_storage().data_ptr() for call in products.call_args_list]
    assert used == (stored if num_tokens else [])  # no copies
    assert y[3:5].count_nonzero() == 0
    assert (y - expected).norm() <= 0.01 * expected.norm()


def test_an_fp8_block_compiles_as_one_graph(fp8_block: SparseMoE) -> None:
    quantize_ffn_(fp8_block, "fp8-compute")
    x = torch.randn(9, 64).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(fp8_block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), fp8_block(x))


def test_fp8_is_refused_where_it_is_not_multiplied(
    fp8_block: SparseMoE, as_gpu: dict[str, Any]
) -> None:
    odd = SparseMoE(64, 8 * 24, 8, 3, dtype=torch.bfloat16)
    refused("multiples of 16, got 24", quantize_ffn_, odd, "fp8-compute")
    assert type(odd.up_proj) is torch.nn.Parameter
    plain = copy.deepcopy(fp8_block)
    x = torch.randn(9, 64).bfloat16()
    quantize_ffn_(plain, "fp8")
    quantize_ffn_(fp8_block, "fp8-compute")
    wide = "x must be of torch.bfloat16 as the weights, got torch.float32"
    refused(wide, fp8_block, x.float(), error=RuntimeError)
    as_gpu["capability"] = (8, 0)  # moved there
    backend._capability.cache_clear()
    backend._device_refusal.cache_clear()
    refused("strict must be met by a kernel, got torch: fp8", fp8_block, x, error=RuntimeError)
    fp8_block.strict = plain.strict = False
    y, expected = fp8_block(x).float(), plain(x).float()
    assert (y - expected).norm() < 0.05 * expected.norm()
    dense = SwiGLU(64, 128).bfloat16()
    refused(
        "storage must be int8, nvfp4 or fp8 here, got 'fp8-compute': .* 8.0",
        quantize_ffn_,
        dense,
        "fp8-compute",
    )


@pytest.fixture
def block(as_gpu: dict[str, Any]) -> SparseMoE:
    """A block in fp32, with a shared expert, that takes the CPU for a GPU."""
    block = SparseMoE(64, 9 * 16, 8, 3, 1, return_router_logits=False)
    for router in (block.gate, block.gate_shared):
        torch.nn.init.normal_(router.weight)
    return block


def test_a_block_on_cuda_compiles_as_one_graph(
    block: SparseMoE, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    # Compiled code, as the library is.
    facts = functools.partial(pickle.loads, pickle.dumps(gpu))
    monkeypatch.setattr(_library.module, "build_info", facts)
    block.bfloat16()
    x = torch.randn(9, 64).bfloat16()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_fp32_weights_on_the_kernels(block: SparseMoE, x_dtype: torch.dtype) -> None:
    x = torch.randn(50, 64).to(x_dtype)
    logits, _, topk_idx = block.route(x.float())
    assert "float32" in block.active_backend
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block.active_backend == "cuda"
        block.strict = True
        y = block(x)
        routed = block.route(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(routed[0], logits)  # of fp32, both by kernel and by torch
    assert torch.equal(routed[2], topk_idx)
    assert block.gate_proj.grad is not None
    assert block.gate_proj.grad.dtype == torch.float32
    block.strict = False
    expected = block(x.float())
    assert (y - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("block")
def test_composed_logits_keep_32_bits_under_autocast() -> None:
    block = SparseMoE(64, 8 * 12, 8, 3)
    torch.nn.init.normal_(block.gate.weight)
    x = torch.randn(50, 64)
    expected = block.route(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block.active_backend.startswith("torch: ")
        assert torch.equal(block.route(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_may_have_their_own_dtype(block: SparseMoE, dtype: torch.dtype) -> None:
    block.to(dtype)
    block.gate.float()
    block.gate_shared.float()
    x = torch.randn(50, 64).to(dtype)
    assert block(x).dtype == dtype
    logits = block.route(x)[0]
    torch.testing.assert_close(logits, x.float() @ block.gate.weight.t())
