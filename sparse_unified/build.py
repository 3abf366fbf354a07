# SPDX-License-Identifier: Apache-2.0
"""What this installation was built from and what it runs on, for bug reports and for support."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from sparse_unified import _library
from sparse_unified._common import Report
from sparse_unified._version import __version__
from sparse_unified.ops import backend, choices


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInfo(Report):
    """Facts of the compiled library, told by itself, and of what it runs in."""

    version: str  # of the package
    library_version: str  # of the sources the library was compiled from
    commit: str  # of those, with -dirty where files differed; "unknown" without a trace
    library: str
    torch_built: str  # release of the headers
    torch_abi: str
    python_abi: str
    cxx_abi: str
    compiler: str
    compiler_flags: str
    cuda_toolkit: str
    cuda_driver: str  # newest CUDA that it runs, "none" without one or in a CPU build
    cuda_architectures: tuple[str, ...]
    instruction_sets: tuple[str, ...]  # that the CPU kernels were compiled for
    instruction_set: str  # that they run
    # What the CPU's FFN kernels take, with the instructions that multiply it: "bfloat16 (AMX)";
    # torch's products run the others.
    cpu_ffn_kernels: tuple[str, ...]
    torch: str
    torch_cuda: str
    openmp: bool
    threads: int
    python: str
    platform: str
    devices: tuple[str, ...]  # "cuda:0: NAME, 9.0", and whether torch's grouped_mm runs experts
    problems: tuple[str, ...]  # what does not fit together

    def table(self) -> list[tuple[str, str]]:
        architectures = " ".join(self.cuda_architectures) or "none"
        return [
            ("sparse_unified", f"{self.version}, commit {self.commit}"),
            ("library", self.library),
            ("torch", f"{self.torch}, built against {self.torch_built}, ABI {self.torch_abi}"),
            ("Python", f"{self.python}, ABI {self.python_abi}"),
            ("compiler", f"{self.compiler} {self.compiler_flags}, {self.cxx_abi}"),
            ("CUDA kernels", f"{architectures}, toolkit {self.cuda_toolkit}"),
            ("CUDA", f"driver {self.cuda_driver}, torch {self.torch_cuda}"),
            ("devices", "; ".join(self.devices) or "none"),
            ("CPU kernels", f"{self.instruction_set}, of {', '.join(self.instruction_sets)}"),
            ("CPU FFN kernels", ", ".join(self.cpu_ffn_kernels) or "none"),
            ("threads", f"{self.threads}, {'OpenMP' if self.openmp else 'no OpenMP'}"),
            ("platform", self.platform),
        ]

    def notes(self) -> list[str]:
        return [f"disagrees: {p}" for p in self.problems] or ["nothing disagrees"]

    def to_line(self) -> str:
        """Returns what tells builds of one version apart, in one line."""
        architectures = " ".join(self.cuda_architectures)
        cuda = f"CUDA {self.cuda_toolkit}: {architectures}" if architectures else "no CUDA"
        return (
            f"commit {self.commit}, torch {self.torch} (built against {self.torch_built}, "
            f"ABI {self.torch_abi}), {self.python_abi}, {cuda}"
        )


def build_info() -> BuildInfo:
    """Asks the compiled library what it is, and torch and Python what they are."""
    facts: dict[str, Any] = dict(_library.module.build_info())
    built = facts["library_version"] = facts.pop("version")
    facts["threads"] = int(facts["threads"])
    for name in ("instruction_sets", "cpu_ffn_kernels", "cuda_architectures"):
        separator = " " if name == "cuda_architectures" else ", "
        facts[name] = () if facts[name] == "none" else tuple(facts[name].split(separator))
    architectures = facts["cuda_architectures"]
    problems = []
    if built != __version__:
        problems.append(f"library: version must be {__version__} like the package, got {built}")
    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        device, name = torch.device("cuda", i), torch.cuda.get_device_name(i)
        devices.append(f"cuda:{i}: {name}, {major}.{minor}")
        why = backend.device_refusal(device) if architectures else None
        why = why or choices.note(device)
        if why:
            problems.append(f"cuda:{i}: {why}")
        elif architectures and backend.prefers_grouped_mm(device):
            devices[-1] += " (bf16 experts by torch's grouped_mm)"
    if why := choices.note(torch.device("cpu")):
        problems.append(f"cpu: {why}")
    return BuildInfo(
        version=__version__,
        library=str(_library.module.__file__),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "none",
        openmp=torch.backends.openmp.is_available(),
        python=platform.python_version(),
        platform=platform.platform(),
        devices=tuple(devices),
        problems=tuple(problems),
        **facts,
    )
