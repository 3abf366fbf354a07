# SPDX-License-Identifier: Apache-2.0
"""Which kernels a sparse FFN runs on, and why none."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_unified import _library
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import backend

BAGEL: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "hidden_size": 3584,
    "widths": (1184, 0),
    "num_experts": 16,
}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An H200, as far as the choice can see, and facts of a build with CUDA kernels."""
    facts = {
        "cuda_architectures": "sm_80 sm_90a sm_100 sm_120",
        "cuda_toolkit": "13.0",
        "cuda_driver": "13.1",
    }
    monkeypatch.setattr(_library, "module", SimpleNamespace(build_info=lambda: facts))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backend._device_refusal.cache_clear()
    yield facts
    backend._device_refusal.cache_clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("device", "change", "chosen"),
    [
        ("cpu", {"dtype": torch.float32, "widths": (3, 1), "hidden_size": 5}, "cpu"),
        ("meta", {}, "device type 'meta'"),
        ("cuda", {}, "cuda"),
        ("cuda", {"dtype": torch.float16, "widths": (1184, 1184)}, "cuda"),
        ("cuda", {"widths": (8, 0)}, "cuda"),
        ("cuda", {"dtype": torch.float32}, "torch: .*bfloat16 and float16, got float32"),
        ("cuda", {"hidden_size": 3580}, "torch: .*hidden size that is a multiple of 8, got 3580"),
        ("cuda", {"widths": (1180, 0)}, "torch: .*width that is a multiple of 8, got 1180"),
        ("cuda", {"widths": (1184, 4)}, "torch: .*width that is a multiple of 8, got 4"),
        ("cuda", {"num_experts": 512}, "torch: .*up to 256 experts, got 512"),
    ],
)
def test_what_runs_and_why_not(device: str, change: dict[str, Any], chosen: str) -> None:
    found = backend.choose(torch.device(device), **{**BAGEL, **change})
    assert re.search(rf"^{chosen}$" if chosen in ("cpu", "cuda") else chosen, found), found


@pytest.mark.parametrize(
    ("codes", "capability", "runs"),
    [
        ("sm_80 sm_90a sm_120", (9, 0), True),
        ("sm_80 sm_90a sm_120", (8, 9), True),
        ("sm_80 sm_90a sm_120", (12, 1), True),
        ("sm_80 sm_90a sm_120", (11, 0), False),
        ("sm_80 compute_80 sm_90a", (11, 0), True),
        ("sm_80 compute_80 sm_90a", (13, 0), True),
        ("sm_80 compute_80 sm_90a", (7, 5), False),
        ("sm_90a", (8, 0), False),
    ],
)
def test_cuda_takes_what_the_library_has_code_for(
    codes: str,
    capability: tuple[int, int],
    runs: bool,
    gpu: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu["cuda_architectures"] = codes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    got = "got compute capability {}.{}".format(*capability)
    chosen = backend.choose(CUDA, **BAGEL)
    assert chosen == "cuda" if runs else chosen.endswith(f"have code for {codes}, {got}")


@pytest.mark.parametrize(
    ("toolkit", "driver", "runs"),
    [
        ("13.0", "13.0", True),
        ("13.2", "13.0", True),  # any toolkit of the driver's major version
        ("12.8", "13.0", True),
        ("13.0", "12.8", False),
        ("12.8", "12.4", True),
        ("12.8", "12.2", False),  # cannot unpack compressed code
        ("13.0", "none", False),
    ],
)
def test_a_driver_older_than_the_toolkit_is_named(
    toolkit: str, driver: str, runs: bool, gpu: dict[str, str]
) -> None:
    gpu |= {"cuda_toolkit": toolkit, "cuda_driver": driver}
    chosen = backend.choose(CUDA, **BAGEL)
    assert chosen == "cuda" if runs else chosen.endswith(f"or newer, got one for {driver}")


def test_a_build_without_nvcc_says_so(gpu: dict[str, str]) -> None:
    gpu["cuda_architectures"] = "none"
    assert "without nvcc" in backend.choose(CUDA, **BAGEL)


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100", (10, 3), True),
        ("compute_80", (12, 0), True),
        ("compute_90", (8, 0), False),
    ],
)
def test_code_runs_on_its_own_major_version(
    architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    assert backend.runs_on((architecture,), capability) is runs
    assert not backend.runs_on((), capability)


@pytest.fixture
def block(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> SparseMoE:
    """A block in fp32, with a shared expert, that takes the CPU for a GPU."""
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda _, **facts: choose(CUDA, **facts))
    torch.manual_seed(0)
    block = SparseMoE(64, 9 * 16, 8, 3, 1, return_router_logits=False)
    for router in (block.gate, block.gate_shared):
        torch.nn.init.normal_(router.weight)
    return block


def test_a_block_on_cuda_compiles_as_one_graph(
    block: SparseMoE, gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
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
        logits = block.route(x)[0]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_may_have_their_own_dtype(block: SparseMoE, dtype: torch.dtype) -> None:
    block.to(dtype)
    block.gate.float()
    block.gate_shared.float()
    x = torch.randn(50, 64).to(dtype)
    y = block(x)
    assert y.dtype == dtype
    logits = block.route(x)[0]
    torch.testing.assert_close(logits, x.float() @ block.gate.weight.t())
