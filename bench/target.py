# SPDX-License-Identifier: Apache-2.0
"""What is measured on: a device, its name, how its calls are timed, and the state it is in."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import EventTimer, Timer, WallTimer

# Newer drivers call the reasons of a lowered clock events.
_STATE_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "memory.used",
)
_REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to measure on.

    Args:
        device: of all tensors.
        name: for people.
        slug: for the name of its file in bench/results.
        timer: of its calls.
    """

    device: torch.device
    name: str
    slug: str
    timer: Timer

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def state(self) -> dict[str, str]:
        """Clocks, power and reasons of a lowered clock, as nvidia-smi writes them; or none."""
        return device_state(self.device) if self.is_cuda else {}


def find_target(name: str) -> Target:
    """Returns the device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: the name is no device that this torch finds here.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"bench: device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if name == "cpu":
        return Target(
            device=torch.device("cpu"), name=processor_name(), slug="cpu", timer=WallTimer()
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0)
    if index >= count:
        raise ValueError(
            f"bench: device must be one of the {count} that torch {torch.__version__} finds here, "
            f"got {name!r}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    model = torch.cuda.get_device_name(device)
    return Target(device=device, name=model, slug=slug(model), timer=EventTimer(device))


def slug(model: str) -> str:
    """Shortens the name of a GPU: "NVIDIA H200" -> "h200"."""
    words = re.sub(r"\b(nvidia|geforce|tesla|graphics|device)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "gpu"


def processor_name() -> str:
    """Model of the processor and the threads in use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def device_state(device: torch.device) -> dict[str, str]:
    """Asks nvidia-smi for the state of a CUDA device; its answers as they are.

    Returns:
        Field -> value; {"nvidia-smi": why} where it gives none.
    """
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None else str(device.index or 0)
    answer = ""
    for reason in _REASON_FIELDS:
        fields = (*_STATE_FIELDS, reason)
        try:
            run = subprocess.run(
                [
                    "nvidia-smi",
                    "-i",
                    which,
                    f"--query-gpu={','.join(fields)}",
                    "--format=csv,noheader",
                ],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"nvidia-smi": str(error)}
        answer = (run.stdout or run.stderr).strip()
        values = [value.strip() for value in answer.split(",")]
        if run.returncode == 0 and len(values) == len(fields):
            return {**dict(zip(_STATE_FIELDS, values, strict=False)), "clocks_reasons": values[-1]}
    return {"nvidia-smi": answer.splitlines()[-1] if answer else "no answer"}
