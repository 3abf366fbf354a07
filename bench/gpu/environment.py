# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine: versions, device, library, tools, and which peers can run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import sparse_unified

from ..cases import CASES
from ..peers import PEERS, Setting
from ..report import commit, versions
from ..target import find_target
from .job import FAILED, PASSED, Job

# Ops without which the block does not run on the device, and those it does without.
_REQUIRED = (
    "route_topk",
    "route_topk_backward",
    "sort_by_expert",
    "permute",
    "combine",
    "combine_backward",
    "grouped_ffn",
    "grouped_ffn_train",
    "grouped_ffn_combine",
    "grouped_ffn_backward",
)
OPTIONAL = ("pruned_ffn", "ffn_importance")
_PREFIXES = ("SPARSE_UNIFIED", "CUDA", "TORCH", "PYTORCH", "NVIDIA")


def tool_version(name: str) -> str | None:
    """The last line of a tool's version, or None without it."""
    if shutil.which(name) is None:
        return None
    run = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    lines = (run.stdout or run.stderr).strip().splitlines()
    return lines[-1] if lines else "of unknown version"


def registered(op: str, device: torch.device) -> bool:
    """Whether the library has a kernel of an op for the type of a device."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    name = f"sparse_unified::{op}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def device_facts(device: torch.device) -> dict[str, Any]:
    """What torch and the driver say of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    free, _ = torch.cuda.mem_get_info(device)
    facts = {name: getattr(properties, name, None) for name in names}
    return {**facts, "free_memory": free, "count": torch.cuda.device_count()}


def run(job: Job) -> bool:
    """Collects the facts; fails where the device's kernels are not in the library."""
    ops = {op: registered(op, job.torch_device) for op in (*_REQUIRED, *OPTIONAL)}
    setting = Setting(
        case=CASES["bagel-16to8-T4096"], dtype=torch.bfloat16, device=job.torch_device
    )
    target = find_target(job.device)
    library = Path(sparse_unified._library.__file__).parent / "_C.abi3.so"
    job.content |= {
        "commit": commit(),
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": target.name,
        "facts": {} if job.is_dry else device_facts(job.torch_device),
        "state": target.state(),
        "library_bytes": library.stat().st_size if library.exists() else None,
        "ops": ops,
        "tools": {
            name: tool_version(name)
            for name in ("nvcc", "compute-sanitizer", "ncu", "cuobjdump", "nvidia-smi")
        },
        "peers": {name: peer.unavailable(setting) or "here" for name, peer in PEERS.items()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_PREFIXES)},
    }
    absent = [op for op, found in ops.items() if not found]
    ok = all(ops[op] for op in _REQUIRED)
    here = [name for name, why in job.content["peers"].items() if why == "here"]
    summary = f"{target.name}; torch {torch.__version__}; peers: {', '.join(here)}"
    if absent:
        summary += f"; without a kernel: {', '.join(absent)}"
    job.save(PASSED if ok else FAILED, summary)
    return ok
