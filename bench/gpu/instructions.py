# SPDX-License-Identifier: Apache-2.0
"""Each instruction that the kernels use, alone on the hardware, before any kernel is trusted.

The programs of tests/gpu/instructions also run in the emulator; where one passes there and fails
here, emulator and wrapper share a misreading. They are taken from build/gpu when they lie there
(`python bench/gpu_check.py --build`), and compiled here otherwise.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

from .job import FAILED, PASSED, ROOT, SKIPPED, Job

FOLDER = ROOT / "tests" / "gpu" / "instructions"
BUILT = ROOT / "build" / "gpu"
# Program -> further sources, and the one code it is compiled for, where that is no choice.
_PROGRAMS = {
    "sm80": ((), ""),
    "sm90a": (("csrc/cuda/tensor_map.cu",), "90a"),
}
# For a device that is not here: machine code of two, and what the driver compiles for the others.
_PORTABLE = ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_80,code=compute_80")


def programs(capability: tuple[int, int]) -> tuple[str, ...]:
    """Those that a device can run: the code of 9.0a runs on 9.0 alone."""
    return ("sm80", "sm90a") if capability == (9, 0) else ("sm80",)


def command(program: str, architecture: str | None, output: Path) -> list[str]:
    """The compiler call of a program, for one architecture such as "90", or for any."""
    sources, fixed = _PROGRAMS[program]
    number = fixed or architecture
    codes = (f"compute_{number},code=sm_{number}",) if number else _PORTABLE
    return [
        "nvcc",
        "-std=c++20",
        "-O2",
        *(f"-gencode=arch={code}" for code in codes),
        *(f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include")),
        f"-I{FOLDER}",
        str(FOLDER / f"{program}.cu"),
        *(str(ROOT / source) for source in sources),
        "-o",
        str(output),
    ]


def build(
    architecture: str | None, names: tuple[str, ...], folder: Path = BUILT
) -> dict[str, Path]:
    """Compiles programs side by side; name -> executable.

    Raises:
        RuntimeError: the compiler refuses one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = {
        name: subprocess.Popen(
            command(name, architecture, folder / name),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    }
    for name, process in started.items():
        text, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"nvcc refuses {name}: {text.strip()[-800:]}")
    return {name: folder / name for name in names}


def results(text: str) -> dict[str, bool]:
    """Test -> passed, of the lines "PASS name" and "FAIL name" of a program."""
    found = {}
    for line in text.splitlines():
        outcome, _, name = line.strip().partition(" ")
        if outcome in ("PASS", "FAIL"):
            found[name.strip()] = outcome == "PASS"
    return found


def run(job: Job) -> bool:
    """Runs the programs of the device."""
    if job.is_dry:
        job.save(SKIPPED, "needs a GPU; the emulator runs the same programs")
        return True
    capability = torch.cuda.get_device_capability(job.torch_device)
    names = programs(capability)
    paths = {name: BUILT / name for name in names}
    if not all(path.exists() for path in paths.values()):
        if shutil.which("nvcc") is None:
            job.save(FAILED, "neither programs in build/gpu nor nvcc are here")
            return False
        major, minor = capability
        paths = build(f"{major}{minor}", names)
    tests: dict[str, bool] = {}
    logs: dict[str, str] = {}
    for name, path in paths.items():
        try:
            ran = subprocess.run(
                [str(path)],
                capture_output=True,
                text=True,
                timeout=max(job.left() - 2, 5),
                check=False,
            )
            text, status = ran.stdout + ran.stderr, ran.returncode
        except subprocess.TimeoutExpired as error:
            written = error.stdout or b""
            text = written.decode(errors="replace") if isinstance(written, bytes) else written
            text, status = f"{text}\ntimed out", -1
        logs[name] = text[-4000:]
        tests |= {f"{name}: {test}": passed for test, passed in results(text).items()}
        if status != 0:
            tests.setdefault(f"{name}: ended with status {status}", False)
    wrong = [test for test, passed in tests.items() if not passed]
    job.content |= {"tests": tests, "logs": logs}
    summary = f"{len(tests) - len(wrong)} of {len(tests)} passed"
    job.save(FAILED if wrong or not tests else PASSED, "; failed: ".join([summary, *wrong[:6]]))
    return bool(tests) and not wrong
