# SPDX-License-Identifier: Apache-2.0
"""The compiled library says what it is, and what it says agrees with what others say of it."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from refusals import refused
from torch.utils import cpp_extension

import sparse_unified
from sparse_unified import _library
from sparse_unified.build import BuildInfo, build_info
from sparse_unified.cli import main
from sparse_unified.ops import backend

ROOT = Path(__file__).parent.parent
SETUP = (ROOT / "setup.py").read_text()


@pytest.fixture
def found() -> BuildInfo:
    return build_info()


def setup_value(name: str) -> int:
    return int(re.findall(rf'^{name} = "(0x[0-9A-Fa-f]+)"', SETUP, re.MULTILINE)[0], 16)


def test_versions_and_abis_are_those_of_package_torch_and_setup(found: BuildInfo) -> None:
    assert found.problems == ()
    assert found.version == found.library_version == sparse_unified.__version__
    assert found.torch == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", found.torch_built)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found.commit)
    target = setup_value("TORCH_TARGET_VERSION")
    assert found.torch_abi == f"{target >> 56}.{target >> 48 & 255}"
    python = setup_value("PYTHON_LIMITED_API")
    assert found.python_abi == f"abi3 {python >> 24}.{python >> 16 & 255}"
    assert Path(found.library).name == "_C.abi3.so"
    assert f"_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}" in found.cxx_abi
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("sparse_unified::combine", "CUDA")
    assert (found.cuda_toolkit != "none") == bool(found.cuda_architectures) == has_kernels
    assert re.fullmatch(r"none|\d+\.\d+", found.cuda_driver)
    assert all(re.fullmatch(r"(sm|compute)_\d+[a-z]?", name) for name in found.cuda_architectures)
    name, version = found.compiler.split()  # is the one that signed the file
    signature = f"{name.upper()}: ".encode() if name == "gcc" else name.encode()
    signed = [line for line in Path(found.library).read_bytes().split(b"\0") if signature in line]
    assert any(version.encode() in line for line in signed)
    flags = re.findall(r"^CXX_FLAGS = \[(.*?)^\]", SETUP, re.DOTALL | re.MULTILINE)[0]
    assert set(re.findall(r'"(-.+?)"', flags)) <= set(found.compiler_flags.split())
    torch.set_num_threads(3)
    assert build_info().threads == 3


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64",
    reason="reads the flags of an x86-64 processor in /proc/cpuinfo",
)
def test_the_instructions_that_run_are_those_of_the_processor(found: BuildInfo) -> None:
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    best = "baseline"
    if {"avx2", "fma", "bmi1", "bmi2"} <= flags:
        best = "x86-64-v3"
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        best = "x86-64-v4"
    assert found.instruction_set.split()[0] == best
    assert found.instruction_sets == ("baseline", "x86-64-v3", "x86-64-v4")
    kernels = dict(kernel.rstrip(")").split(" (") for kernel in found.cpu_ffn_kernels)
    wide = {"x86-64-v3": "AVX2", "x86-64-v4": "AVX-512"}.get(best)
    assert tuple(kernels) == (("float32", "bfloat16", "float16") if wide else ())
    assert kernels.get("float32") == kernels.get("float16") == wide
    if kernels.get("bfloat16") != wide:
        assert {"AMX": "amx_bf16", "AVX512_BF16": "avx512_bf16"}[kernels["bfloat16"]] in flags


@pytest.mark.parametrize(
    ("allowed", "told"),
    [
        ("none", "'cpu_ffn_kernels': 'none'"),
        ("avx", "SPARSE_UNIFIED_CPU_FFN must be none, avx2, avx512, avx512bf16 or amx, got avx"),
    ],
)
def test_the_environment_limits_the_kernels_of_the_cpu(allowed: str, told: str) -> None:
    code = "import sparse_unified._library as l; print(l.module.build_info())"
    environment = {**os.environ, "SPARSE_UNIFIED_CPU_FFN": allowed}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert told in run.stdout + run.stderr


def test_commands_tell_the_build(found: BuildInfo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (found.commit, found.torch, found.torch_built, found.compiler, found.library):
        assert fact in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(found.to_json())
    assert main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"sparse-unified {sparse_unified.__version__}"
    for fact in (found.commit, found.torch_built, found.torch_abi, found.python_abi, "CUDA"):
        assert fact in second


def test_what_does_not_fit_together_is_told(monkeypatch: Any, capsys: Any, request: Any) -> None:
    for cache in (backend._device_refusal, backend._capability, backend._cached_choices):
        request.addfinalizer(cache.cache_clear)
    facts = {**_library.module.build_info(), "version": "0.0.1", "cuda_toolkit": "13.0"}
    facts |= {"cuda_architectures": "sm_80 sm_90a sm_100", "cuda_driver": "13.0"}
    module = SimpleNamespace(build_info=lambda: facts, __file__="_C.abi3.so")
    monkeypatch.setattr(_library, "module", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    capabilities = [(9, 0), (7, 5), (10, 0)]
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d: capabilities[getattr(d, "index", d)]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["new", "old", "newest"][i])
    told = build_info()
    assert told.devices == (
        "cuda:0: new, 9.0",
        "cuda:1: old, 7.5",
        "cuda:2: newest, 10.0 (bf16 experts by torch's grouped_mm)",
    )
    assert len(told.problems) == 2
    assert "version must be" in told.problems[0]
    assert told.problems[1] == (
        "cuda:1: the CUDA kernels have code for sm_80 sm_90a sm_100, got compute capability 7.5"
    )
    assert "CUDA 13.0: sm_80 sm_90a sm_100" in told.to_line()
    assert main(["info"]) == 1
    assert "library: version must be" in capsys.readouterr().out


# setup.py


@pytest.fixture
def build_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[], SimpleNamespace]:
    """Runs setup.py up to the building; returns its names."""
    monkeypatch.setenv("SPARSE_UNIFIED_CUDA", "off")
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.delenv("SPARSE_UNIFIED_STRICT", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    # Restores what setup.py replaces.
    monkeypatch.setattr(cpp_extension, "_check_cuda_version", cpp_extension._check_cuda_version)
    return lambda: SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.mark.parametrize(
    ("wish", "codes"),
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "sm_80 sm_86 sm_90a sm_100 sm_120 compute_120"),
        ("9.0a", "sm_90a"),
        ("8.0;9.0+PTX", "sm_80 sm_90a compute_90"),
        ("10.0a+PTX", "sm_100a compute_100"),
        ("7.0 7.5+PTX", ""),
        ("", None),
    ],
)
def test_architectures_are_those_the_kernels_compile_for(
    wish: str,
    codes: str | None,
    build_script: Callable[[], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    found = [flag.rpartition("code=")[2] for flag in build_script().architecture_flags()]
    if codes is None:  # the default, which every GPU from Ampere on runs
        for capability in ((8, 0), (8, 7), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)):
            assert backend.runs_on(tuple(found), capability), capability
        return
    assert found == codes.split()
    assert len(capsys.readouterr().err.splitlines()) == wish.count("7.")


def test_torch_may_have_another_cuda_than_nvcc(
    build_script: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    version = torch.torch_version.TorchVersion("12.2")
    with pytest.raises(RuntimeError):
        cpp_extension._check_cuda_version("g++", version)
    build_script()
    cpp_extension._check_cuda_version("g++", version)


def test_the_cuda_runtime_is_that_of_the_processor(
    build_script: Callable[[], SimpleNamespace], tmp_path: Path
) -> None:
    own = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    for kind in ("armv7", "ppc64le", "riscv64", own):
        folder = tmp_path / "targets" / f"{kind}-linux" / "lib"
        folder.mkdir(parents=True)
        (folder / "libcudart_static.a").touch()
    found = build_script().find_runtime(tmp_path)
    assert found.relative_to(tmp_path).parts[1] == f"{own}-linux"
    found.unlink()
    refused(platform.machine(), build_script().find_runtime, tmp_path, error=SystemExit)


def test_spills_are_errors_for_us_alone(
    build_script: Callable[[], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("Werror" in flag for flag in build_script().NVCC_FLAGS)
    monkeypatch.setenv("SPARSE_UNIFIED_STRICT", "1")
    assert any("Werror" in flag for flag in build_script().NVCC_FLAGS)
