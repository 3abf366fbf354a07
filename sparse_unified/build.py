# SPDX-License-Identifier: Apache-2.0
"""What this installation was built from and what it runs on, for bug reports and for support."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_unified import _library
from sparse_unified._common import Report, format_table
from sparse_unified._version import __version__

_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInfo(Report):
    """Facts of the compiled library, told by itself, and of what it runs in.

    Attributes:
        version: of the package. library_version: of the sources the library was compiled from.
        commit: of those sources, with -dirty where files differed; "unknown" without a trace.
        library: the file.
        torch_built: release of the headers. torch_abi: oldest release it loads into.
        python_abi: oldest Python it loads into. cxx_abi: standard library of the strings.
        cuda_toolkit: CUDA of the kernels, "none" in a CPU build. cuda_architectures: theirs.
        instruction_sets: that the CPU kernels were compiled for. instruction_set: that they run.
        torch, torch_cuda, python, platform: what runs. threads: of an op.
        devices: "cuda:0: NAME, 9.0" of each GPU that torch sees.
        problems: what does not fit together; empty when everything does.
    """

    version: str
    library_version: str
    commit: str
    library: str
    torch_built: str
    torch_abi: str
    python_abi: str
    cxx_abi: str
    compiler: str
    compiler_flags: str
    cuda_toolkit: str
    cuda_architectures: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    instruction_set: str
    torch: str
    torch_cuda: str
    openmp: bool
    threads: int
    python: str
    platform: str
    devices: tuple[str, ...]
    problems: tuple[str, ...]

    def to_text(self) -> str:
        architectures = " ".join(self.cuda_architectures) or _NONE
        openmp = "OpenMP" if self.openmp else "no OpenMP"
        rows = [
            ("sparse_unified", f"{self.version}, commit {self.commit}"),
            ("library", self.library),
            ("torch", f"{self.torch}, built against {self.torch_built}"),
            ("stable ABI", f"torch {self.torch_abi} and newer"),
            ("Python", f"{self.python}, {self.python_abi} and newer"),
            ("C++", self.cxx_abi),
            ("compiler", f"{self.compiler} {self.compiler_flags}"),
            ("CUDA kernels", f"{architectures}, toolkit {self.cuda_toolkit}"),
            ("CUDA of torch", self.torch_cuda),
            ("devices", "; ".join(self.devices) or _NONE),
            ("CPU kernels", f"{self.instruction_set}, of {', '.join(self.instruction_sets)}"),
            ("threads", f"{self.threads}, {openmp}"),
            ("platform", self.platform),
        ]
        lines = [format_table(rows), ""]
        lines += [f"disagrees: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "nothing disagrees"])

    def to_line(self) -> str:
        """Returns what tells builds of one version apart, in one line."""
        architectures = " ".join(self.cuda_architectures)
        cuda = f"CUDA {self.cuda_toolkit}: {architectures}" if architectures else "no CUDA"
        return (
            f"commit {self.commit}, torch {self.torch} (built against {self.torch_built}, "
            f"ABI {self.torch_abi}), {self.python_abi}, {cuda}"
        )


def build_info() -> BuildInfo:
    """Asks the compiled library what it is, and torch and Python what they are.

    Raises:
        RuntimeError: the library is of a time before it could tell.
    """
    library = _library.module
    if not hasattr(library, "build_info"):
        raise RuntimeError(
            "build_info: library must be built from the sources of this package, got an older one "
            f"in {library.__file__}"
        )
    facts: dict[str, str] = library.build_info()
    architectures = _split(facts["cuda_architectures"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = [torch.cuda.get_device_capability(i) for i in range(count)]
    problems = []
    if facts["version"] != __version__:
        problems.append(
            f"library: version must be {__version__} like the package, got {facts['version']}"
        )
    problems += [
        f"cuda:{i}: architecture must be one of {' '.join(architectures)}, got "
        f"{capability[0]}.{capability[1]}"
        for i, capability in enumerate(capabilities)
        if architectures and not runs_on(architectures, capability)
    ]
    return BuildInfo(
        version=__version__,
        library_version=facts["version"],
        commit=facts["commit"],
        library=str(Path(str(library.__file__))),
        torch_built=facts["torch_built"],
        torch_abi=facts["torch_abi"],
        python_abi=facts["python_abi"],
        cxx_abi=facts["cxx_abi"],
        compiler=facts["compiler"],
        compiler_flags=facts["compiler_flags"],
        cuda_toolkit=facts["cuda_toolkit"],
        cuda_architectures=architectures,
        instruction_sets=tuple(facts["instruction_sets"].split(", ")),
        instruction_set=facts["instruction_set"],
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or _NONE,
        openmp=torch.backends.openmp.is_available(),
        threads=int(facts["threads"]),
        python=platform.python_version(),
        platform=platform.platform(),
        devices=tuple(
            f"cuda:{i}: {torch.cuda.get_device_name(i)}, {major}.{minor}"
            for i, (major, minor) in enumerate(capabilities)
        ),
        problems=tuple(problems),
    )


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code of one of the architectures runs on a device.

    Args:
        architectures: sm_80 (runs on its major version from its minor version on), sm_90a (on
            exactly its own) or compute_80 (translated, for all newer ones).
        capability: of the device, as (major, minor).
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if match is None:
            continue
        found = (int(match[2]), int(match[3]))
        if match[4]:
            fits = found == capability
        elif match[1] == "compute":
            fits = found <= capability
        else:
            fits = found[0] == capability[0] and found <= capability
        if fits:
            return True
    return False


def _split(text: str) -> tuple[str, ...]:
    return () if text == _NONE else tuple(text.split())
