# SPDX-License-Identifier: Apache-2.0
"""Builds `sparse_unified._C`: torch-free kernels and stable-ABI bindings, one abi3 library.

A wheel is named `sparse_unified-VERSION-0cpu-cp310-abi3-PLATFORM.whl`, or `0cu13` with the kernels
of CUDA 13: one for each CUDA major, and one for the CPU.

Environment:
    SPARSE_UNIFIED_CUDA: auto (default: CUDA kernels where nvcc is found), on (an error without
        nvcc) or off. Torch itself may be a CPU build.
    TORCH_CUDA_ARCH_LIST: architectures of the CUDA kernels (default: all, 8.0 to 12.0, and PTX
        for what comes after); those below 8.0 are left out.
    CUDA_HOME: the CUDA toolkit (default: that of the nvcc on the PATH).
    SPARSE_UNIFIED_STRICT: 1 makes a kernel that spills registers an error (default: no).
    MAX_JOBS: compilers at once (default: by cores and free memory).
    SPARSE_UNIFIED_COMMIT: the commit to name in `sparse-unified info` (default: that of the git
        checkout, or of the source archive).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
GENERATED = Path("build/generated")

# Oldest releases the library runs on; both are checked by `make abi`.
PYTHON_LIMITED_API = "0x030A0000"  # 3.10
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

# Set by the Makefile.
STRICT = "SPARSE_UNIFIED_STRICT"

# A100, and PTX that the driver translates for any other (Thor, what comes after 12.x); RTX 30;
# RTX 40; H100 and H200 with their own instructions; B200; RTX 50.
CUDA_ARCHITECTURES = "8.0+PTX 8.6 8.9 9.0a 10.0 12.0"

CXX_FLAGS = [
    "-O3",
    # errno and floating-point traps keep loops from vectorising; results do not depend on them.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",  # designated initializers leave out what stays null
    "-Wno-psabi",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fvisibility=hidden,-Wno-psabi",
    # Constants of a kernel whose body is for another architecture.
    "-diag-suppress=177",
    # A tenth of the size, for a few milliseconds at the first launch.
    "--compress-mode=size",
]
# A kernel that spills registers to memory is a mistake of ours, and no reason to fail for a user.
NVCC_FLAGS += ["-Xptxas=--warn-on-spills,-Werror"] if os.environ.get(STRICT) else []


def kernel_sources(with_cuda: bool) -> list[str]:
    """Reads the source list that CMakeLists.txt reads too."""
    lines = (CSRC / "sources.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    return [f"csrc/{name}" for name in names if with_cuda or not name.endswith(".cu")]


def find_cuda() -> Path | None:
    """Folder of the CUDA toolkit, or None where kernels for CUDA are not wanted or possible."""
    wish = os.environ.get("SPARSE_UNIFIED_CUDA", "auto")
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"setup: SPARSE_UNIFIED_CUDA must be auto, on or off, got {wish!r}")
    if wish == "off":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        if wish == "on":
            raise SystemExit("setup: SPARSE_UNIFIED_CUDA=on must find nvcc, got none on the PATH")
        return None
    if not architecture_flags():
        if wish == "on":
            raise SystemExit("setup: TORCH_CUDA_ARCH_LIST must name 8.0 or newer, got older alone")
        return None
    # The nvcc on the PATH may be a link or a script elsewhere; it knows where its toolkit is.
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return Path(top.group(1) if top else Path(nvcc).parent.parent).resolve()


def find_runtime(cuda: Path) -> Path:
    """The static CUDA runtime of a toolkit for this processor: a toolkit may hold several."""
    machine = platform.machine()
    kinds = ("sbsa", "aarch64") if machine == "aarch64" else (machine,)
    folders = ["lib64", "lib", f"lib/{machine}-linux-gnu"]
    for folder in [*folders, *(f"targets/{kind}-linux/lib" for kind in kinds)]:
        runtime = cuda / folder / "libcudart_static.a"
        if runtime.exists():
            return runtime
    raise SystemExit(f"setup: {cuda} must hold libcudart_static.a for {machine}, got none")


def wheel_tag() -> str:
    """Build tag of a wheel's name, which tells builds of one version apart: 0cpu or 0cu13."""
    cuda = find_cuda()
    if cuda is None:
        return "0cpu"
    told = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", told.stdout)
    if release is None:
        raise SystemExit(f"setup: nvcc of {cuda} must tell its release, got {told.stdout!r:.200}")
    return f"0cu{release[1]}"


@functools.cache
def architecture_flags() -> list[str]:
    """-gencode flags of TORCH_CUDA_ARCH_LIST; 9.0 stands for 9.0a, whose kernels run there."""
    flags = []
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    for name in wish.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"setup: TORCH_CUDA_ARCH_LIST must hold versions such as 9.0a, got {name!r}"
            )
        if int(match[1]) < 8:
            sys.stderr.write(f"setup: no CUDA kernels for {name}: they need 8.0 or newer\n")
            continue
        number = match[1] + match[2]
        own = number + ("a" if number == "90" else match[3])
        flags.append(f"-gencode=arch=compute_{own},code=sm_{own}")
        if match[4]:  # without the letter: PTX of 9.0a is for 9.0 alone
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def commit() -> str:
    """Commit that is built, with -dirty where files differ from it; "unknown" without a trace."""
    known = os.environ.get("SPARSE_UNIFIED_COMMIT", "")
    if not known and (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        told = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
        known = told.stdout.strip()
    if not known and (ROOT / "COMMIT").exists():
        known = (ROOT / "COMMIT").read_text().strip()
    return known if re.fullmatch(r"[\w.+-]+", known) else "unknown"


def write_build_info(version: str, with_cuda: bool) -> None:
    """Writes the header with what no macro of a compiler tells, where it has changed."""
    codes = [flag.rpartition("=")[2] for flag in architecture_flags()] if with_cuda else []
    facts = {
        "VERSION": version,
        "COMMIT": commit(),
        "CXX_FLAGS": " ".join([*CXX_FLAGS, os.environ.get("CFLAGS", "")]).strip(),
        "CUDA_ARCHITECTURES": " ".join(codes) or "none",
    }
    lines = ["// Written by setup.py.", "#pragma once"]
    lines += [f"#define SPARSE_UNIFIED_{name} {json.dumps(text)}" for name, text in facts.items()]
    text = "\n".join(lines) + "\n"
    header = GENERATED / "build_info_generated.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def limit_jobs() -> None:
    """Keeps parallel compilers within the free memory: a binding takes about 1 GB."""
    if "MAX_JOBS" not in os.environ:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(free_gib))))


def extension() -> Extension:
    """The one library; with nvcc, CUDA kernels and a static CUDA runtime are part of it."""
    cuda = find_cuda()
    options: dict[str, list[str]] = {}
    include_dirs = [CSRC, CSRC / "include", GENERATED.resolve()]
    if cuda is not None:
        # NOTE: torch looks for a toolkit only when torch itself was built with CUDA.
        cpp_extension.CUDA_HOME = str(cuda)
        include_dirs.append(cuda / "include")
        options = {
            "extra_objects": [str(find_runtime(cuda))],
            "libraries": ["dl", "rt", "pthread"],
            "extra_link_args": ["-Wl,--exclude-libs,ALL"],
        }
    return cpp_extension.CppExtension(
        name="sparse_unified._C",
        sources=kernel_sources(cuda is not None),
        include_dirs=[str(folder) for folder in include_dirs],
        define_macros=[
            ("Py_LIMITED_API", PYTHON_LIMITED_API),
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            *([("SPARSE_UNIFIED_WITH_CUDA", None)] if cuda else []),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + architecture_flags()},
        py_limited_api=True,
        **options,
    )


# NOTE: torch refuses an nvcc of another CUDA major than its own. Through the stable ABI and with a
# CUDA runtime of its own, the library does not care.
cpp_extension._check_cuda_version = lambda *_: None


class IncrementalBuild(cpp_extension.BuildExtension):
    """Keeps object files where the next build finds them; an editable install would not."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"

    def build_extensions(self) -> None:
        write_build_info(self.distribution.get_version(), find_cuda() is not None)
        # NOTE: torch has nvcc list the headers of a kernel only when torch was built with CUDA.
        headers = [*CSRC.glob("device/*"), *CSRC.glob("cuda/*.h"), *CSRC.glob("include/**/*.h")]
        newest = max(header.stat().st_mtime for header in headers)
        for kernel in Path(self.build_temp, "csrc", "cuda").glob("*.o"):
            if kernel.stat().st_mtime < newest:
                kernel.unlink()
        super().build_extensions()


class SourceArchive(sdist):
    """Puts the commit into the archive, which has no history."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(f"{commit()}\n")


limit_jobs()
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": IncrementalBuild, "sdist": SourceArchive},
    options={"bdist_wheel": {"py_limited_api": "cp310", "build_number": wheel_tag()}},
)
