# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel takes of a multiprocessor: docs/resources.json, for docs/performance.md.

    python docs/resources.py

Registers and spills are the compiler's report (nvcc, ptxas -v), instructions are counted in its
PTX; threads and shared memory are those
of the launches that the ops make for BAGEL's shapes, which the emulated library records without
running them. Blocks per multiprocessor follow from both. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "cmake" / "libsparse_unified_emulated_ops.so"

Launch = tuple[str, int, int]  # kernel, threads, dynamic shared memory


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a multiprocessor; CUDA C++ Programming Guide, "Technical Specifications"."""

    target: str  # of nvcc
    warps: int
    blocks: int
    shared_bytes: int


REGISTERS = 65536
REGISTER_UNIT = 256  # registers are handed to a warp in this many
RESERVED_SHARED_BYTES = 1024  # of each block, by the system
ARCHITECTURES = {
    80: Limits("80", 64, 32, 164 * 1024),
    86: Limits("86", 48, 16, 100 * 1024),
    89: Limits("89", 48, 24, 100 * 1024),
    90: Limits("90a", 64, 32, 228 * 1024),
    100: Limits("100", 64, 32, 228 * 1024),
    120: Limits("120", 48, 24, 100 * 1024),
}


def blocks_per_multiprocessor(
    limits: Limits, threads: int, registers: int, shared_bytes: int
) -> int:
    """How many blocks of a kernel a multiprocessor holds at a time."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps // warps,
        REGISTERS // of_warp // warps,
        limits.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
    )


def short_name(symbol: str) -> str:
    """The name of a kernel and its template arguments, without namespaces, as people write it."""
    name = re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N__\w+::|\bsparse_unified::", "", symbol)
    name = name.removeprefix("void ")
    depth = 0
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:index]
            break
    return re.sub(r"\((?:bool|int|Major)\)", "", name)


def demangle(symbols: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


# Instructions that tell which way a kernel goes, by a name for the table.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "TMA load": "cp.async.bulk.tensor.2d.shared",
    "of them multicast": ".multicast::cluster",
    "TMA store": "cp.async.bulk.tensor.2d.global",
    "cp.async": "cp.async.cg",
}


def run_nvcc(source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("resources: nvcc must be on the PATH, got none")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "-O3", "-diag-suppress=177"),
            *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"),
            *(*options, str(source)),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"resources: {source.name} must compile, got\n{done.stderr}")
    return done


def count_instructions(ptx: str) -> dict[str, dict[str, int]]:
    """Mangled kernel -> how often its PTX has each of INSTRUCTIONS."""
    bodies = re.split(r"\.entry\s+(\w+)", ptx)[1:]
    return {
        name: {label: body.count(text) for label, text in INSTRUCTIONS.items() if text in body}
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def compile_report(source: Path, limits: Limits) -> dict[str, dict[str, Any]]:
    """Kernel -> registers, spilled bytes and instructions of one file on one architecture."""
    target = limits.target
    with tempfile.TemporaryDirectory() as folder:
        run_nvcc(source, f"-arch=compute_{target}", "-ptx", "-o", f"{folder}/out.ptx")
        instructions = count_instructions(Path(folder, "out.ptx").read_text())
        gencode = f"-gencode=arch=compute_{target},code=sm_{target}"
        done = run_nvcc(source, gencode, "-Xptxas=-v", "-cubin", "-o", f"{folder}/out.cubin")
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    names = demangle([entry[0] for entry in entries]) if entries else []
    return {
        short_name(name): {
            "registers": int(used),
            "spilled_bytes": int(stores) + int(loads),
            "instructions": instructions[symbol],
        }
        for name, (symbol, stores, loads, used) in zip(names, entries, strict=True)
    }


def record_launches(capability: int) -> list[Launch]:
    """The launches of BAGEL's sparse FFN, forward and backward, and of half of its dense one.

    Also where blocks share the weights, which Hopper's kernels alone have.
    """
    import torch

    from sparse_unified import ops
    from sparse_unified.bench.cases import CASES
    from sparse_unified.bench.suites import CHOSEN, set_variant

    torch.ops.load_library(LIBRARY)
    emulation = torch.ops.sparse_unified_emulation
    emulation.set_device(capability)
    emulation.record_launches(True)
    case = CASES["bagel-16to8-T4096"]
    hidden, width = case.hidden_size, case.intermediate_size
    x = torch.empty(case.tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    gate = torch.empty(case.num_experts, hidden, dtype=torch.bfloat16).requires_grad_()
    gate_proj, up_proj, down_proj = [
        torch.empty(shape, dtype=torch.bfloat16).requires_grad_()
        for shape in ((width, hidden), (width, hidden), (hidden, width))
    ]
    logits, topk_logits, topk_idx = ops.route_topk(x, gate, case.top_k)
    offsets, row_token, token_rows = ops.sort_by_expert(topk_idx, case.num_experts)
    ops.permute(x.detach(), row_token, token_rows)
    arguments = (x, topk_logits, row_token, token_rows, offsets, gate_proj, up_proj, down_proj, 1.0)
    y = ops.grouped_ffn_combine(*arguments)
    torch.autograd.backward([y, logits], [torch.empty_like(y), torch.empty_like(logits)])
    set_variant("grad_multicast=on")
    y = ops.grouped_ffn_combine(x, topk_logits.detach(), *arguments[2:])
    torch.autograd.grad(y, x, torch.empty_like(y))
    kept = torch.arange(0, width // 64, 2, dtype=torch.int32)
    with torch.inference_mode():
        for variant in (CHOSEN, "multicast=on"):
            set_variant(variant)
            ops.grouped_ffn(x, row_token, offsets, gate_proj, up_proj, down_proj)
            ops.pruned_ffn(x, kept, gate_proj, up_proj, down_proj, 64)
    lines = emulation.recorded_launches().splitlines()
    return [
        (short_name(name), int(threads), int(shared))
        for threads, shared, name in (line.split(" ", 2) for line in lines)
    ]


def launches_of(capability: int) -> list[Launch]:
    """The same in a process of its own, whose ops the emulated library may replace."""
    done = subprocess.run(
        [sys.executable, __file__, "--launches", str(capability)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(launch) for launch in json.loads(done.stdout)]


def measure() -> dict[str, object]:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    records = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for capability, limits in ARCHITECTURES.items():
            reports: dict[str, dict[str, Any]] = {}
            for report in pool.map(lambda source, of=limits: compile_report(source, of), sources):
                reports |= report
            for kernel, threads, shared in sorted(set(launches_of(capability))):
                found = reports[kernel]
                records.append(
                    {
                        "kernel": kernel,
                        "architecture": f"sm_{limits.target}",
                        "threads": threads,
                        **found,
                        "shared_bytes": shared,
                        "blocks": blocks_per_multiprocessor(
                            limits, threads, found["registers"], shared
                        ),
                    }
                )
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\S+),", version.stdout)
    return {"nvcc": release[1] if release else "", "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, metavar="CAPABILITY", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "resources.json")
    arguments = parser.parse_args()
    if arguments.launches is not None:
        sys.stdout.write(json.dumps(record_launches(arguments.launches)))
        return
    arguments.out.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
