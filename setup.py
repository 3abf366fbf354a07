# SPDX-License-Identifier: Apache-2.0
"""Builds `sparse_unified._C`: torch-free kernels and stable-ABI bindings, one abi3 library."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# Oldest releases the library runs on; both are checked by `make abi`.
PYTHON_LIMITED_API = "0x030A0000"  # 3.10
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

CXX_FLAGS = [
    "-O3",
    # errno and floating-point traps keep loops from vectorising; results do not depend on them.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]


def kernel_sources() -> list[str]:
    """Reads the C++ files of the source list that CMakeLists.txt reads too."""
    lines = (CSRC / "sources.txt").read_text().splitlines()
    return [f"csrc/{line}" for line in lines if line.endswith(".cpp")]


def limit_jobs() -> None:
    """Keeps parallel compilers within the free memory: a binding takes about 1 GB."""
    if "MAX_JOBS" not in os.environ:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(free_gib))))


class IncrementalBuild(BuildExtension):
    """Keeps object files where the next build finds them; an editable install would not."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"


limit_jobs()
setup(
    ext_modules=[
        CppExtension(
            name="sparse_unified._C",
            sources=kernel_sources(),
            include_dirs=[str(CSRC), str(CSRC / "include")],
            define_macros=[
                ("Py_LIMITED_API", PYTHON_LIMITED_API),
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ],
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": IncrementalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
