# SPDX-License-Identifier: Apache-2.0
"""What `doctor` and `tune` found out about kernels on a device, in a small file.

It is {key of a device: {"refused": {family: why}, "variants": {sizes: override}}}. The key names
device, driver and library, so that a new one of them is a clean slate. The file is read once, when
the ops are imported; nothing asks a device then.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from sparse_unified import _library

logger = logging.getLogger(__name__)

# Directory of the file; XDG_CACHE_HOME/sparse_unified without it.
VARIABLE = "SPARSE_UNIFIED_CACHE"
# Kernel families of a device type; what refuses the last, which also routes and combines for the
# others, refuses them all. GROUPED_MM is torch's products between those of ours.
CPU, SM90A, SM80, GROUPED_MM = "cpu", "sm90a", "sm80", "grouped_mm"
FAMILIES = {"cpu": (CPU,), "cuda": (SM90A, GROUPED_MM, SM80)}


def path() -> Path:
    """The file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get(VARIABLE) or cache / "sparse_unified") / "kernels.json"


def processor_name() -> str:
    """Model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    match = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    return match[1].strip() if match else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Model of a GPU or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@functools.cache
def driver() -> str:
    """Version of the CUDA driver and the newest CUDA it runs, "none" without one."""
    told = Path("/proc/driver/nvidia/version")
    match = told.exists() and re.search(r"\s(\d+\.\d+[.\d]*)\s", told.read_text())
    newest: str = _library.module.build_info()["cuda_driver"]
    return f"{match[1]} (CUDA {newest})" if match else newest


@functools.cache
def library() -> str:
    """What tells one build of the library from another."""
    facts, file = _library.module.build_info(), Path(str(_library.module.__file__))
    return f"{facts['version']} {facts['commit']} {int(file.stat().st_mtime)}"


def key_of(device: torch.device) -> str:
    """Names device, driver and library."""
    return f"{device_name(device)} | driver {driver()} | library {library()}"


def read() -> dict[str, Any]:
    """All entries; of a file that cannot be read none, with a warning."""
    file = path()
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return {key: {"refused": dict(e["refused"]), "variants": dict(e["variants"])}
                for key, e in found.items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is ignored: %s: %s", file, type(error).__name__, error)
        return {}


def rules(entries: dict[str, Any]) -> str:
    """The entries of this driver and library, as `set_grouped_ffn_rules` of csrc takes them."""
    own = f" | driver {driver()} | library {library()}"
    lines: list[str] = []
    for key, entry in entries.items():
        if key.endswith(own):
            lines += [f"90 {'0 ' * 7}family=sm80"] if SM90A in entry["refused"] else []
            lines += [f"{sizes} {variant}" for sizes, variant in entry["variants"].items()]
    return "\n".join(lines)


_entries = read()
if _entries:
    _library.module.set_grouped_ffn_rules(rules(_entries))


@functools.cache
def refused(device: torch.device) -> dict[str, str]:
    """Family -> why it is not to run on a device; said once."""
    found: dict[str, str] = _entries[key_of(device)]["refused"] if _has_entry(device) else {}
    for family, why in found.items():
        logger.warning("kernels %s are left out on %s: %s", family, device_name(device), why)
    return found


def _has_entry(device: torch.device) -> bool:
    # NOTE: most have no file, and processes that only build a model need no context of a GPU.
    return bool(_entries) and device.type in FAMILIES and key_of(device) in _entries


def refusal(device: torch.device) -> str | None:
    """Says why no family is to run on a device, or None."""
    last = FAMILIES[device.type][-1]
    why = refused(device).get(last)
    return why and f"{last} kernels {why}"


def tuned(device: torch.device, sizes: tuple[int, ...]) -> tuple[tuple[int, int, str], ...]:
    """What `tune` found for experts of these sizes: number of rows, direction, override.

    Args:
        device: of the experts.
        sizes: hidden size, number and width of the experts.
    """
    found = _entries[key_of(device)]["variants"] if _has_entry(device) else {}
    listed = [([int(word) for word in scope.split()], text) for scope, text in found.items()]
    return tuple((scope[6], scope[7], text) for scope, text in listed if tuple(scope[2:5]) == sizes)


def note(device: torch.device) -> str:
    """What `active_backend` adds: families that a better one was refused for; or nothing."""
    return "; ".join(f"without {family}: {why}" for family, why in refused(device).items())
