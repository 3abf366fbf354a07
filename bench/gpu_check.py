# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in two calls of about four minutes.

    python bench/gpu_check.py --parts first    [--out DIR] [--seconds N]
    python bench/gpu_check.py --parts second   once the first is right

Needs a source tree with the built library, torch and a GPU; no installation, no git, no pytest.
Parts of the first call: environment; instructions, each instruction of csrc/device alone; checks,
the properties that tests hold on the CPU; bench, the block and its ops beside dense, an expert loop
and grouped_mm. Of the second: tune, all configurations of the expert GEMMs; kernels, each of these
GEMMs by itself, on Hopper with multicast and without; families, what `sparse-unified doctor` finds;
sanitizer, compute-sanitizer over small checks; compile, the checks that wait for a compiler. Each
runs in a process of its own and writes DIR/PART.json as soon as there is something to save; the
speeds are DIR/DEVICE.json, which belongs into bench/results. Where OUT is set,
$OUT/gpu_check.tar.gz holds all of DIR at any time. The exit status is 1 when a part failed.
`--build` compiles the instruction programs into build/gpu for a machine without nvcc;
`--device cpu` tries the script itself on small shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tests" / "ops"
PROGRAMS = ROOT / "tests" / "gpu" / "instructions"
BUILT = ROOT / "build" / "gpu"
# Measured in one process; other packages may do anything to it.
PROVIDERS = (
    *("dense", "dense_half", "dense_ours", "expert_loop"),
    *("grouped_mm", "transformers_grouped_mm", "sparse_unified"),
)
LARGE = ("bagel-16to8-T4096", "bagel-32to16-T4096")
PRUNED = ("bagel-half-bs64-T4096", "bagel-half-bs16-T4096")
SMALLER = ("bagel-16to8-T1024", "bagel-16to8-T256", "bagel-32to16-T1024")
ON_CPU = ("odd-7to3-T300",)
# What the kernels are timed with one by one, by direction: without overlap, which would count the
# wait of the down-projection for the up-projection, and in pairs of blocks that share their loads.
KERNEL_VARIANTS = {
    "fwd": ("family=sm90a,overlap=off", "family=sm90a,overlap=off,multicast=on"),
    "fwd_bwd": ("family=sm90a", "family=sm90a,grad_multicast=on"),
}
KERNEL_ROUNDS = 10
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Each op forward and backward, ragged and empty experts, sizes that fit no tile.
SANITIZED = (
    "kernels.route_of_exact_logits[1-bfloat16-37-(32, 16)]",
    "kernels.sort_is_the_stable_one[gaps-1-(12, 12)]",
    "kernels.permute_and_combine[37-1000-bfloat16-4]",
    "kernels.ffn_of_any_routing[60-(5, 2)-bfloat16-gaps]",
    "checks_experts.ffn_of_sizes_that_fit_no_tile[(72, 56)-90-bfloat16]",
    "kernels.pruned_ffn_of_any_list[(9, 64)-37-bfloat16-some]",
    "kernels.gradients_of_route_topk[bfloat16-53]",
    "kernels.gradient_of_permute[bfloat16-41]",
    "kernels.gradients_of_experts[90-False-bfloat16-gaps]",
)


def use_tree() -> None:
    """Makes package, `bench` and checks importable from the tree, installed or not."""
    # NOTE: a script's own directory comes first there, and modules of other packages that have the
    # name of one of ours would be ours.
    kept = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]
    sys.path[:] = [str(ROOT), str(ROOT / "tests"), str(CHECKS), *kept]
    import sparse_unified

    if str(ROOT) not in sparse_unified.__path__:
        sparse_unified.__path__.append(str(ROOT))


def save(path: Path, content: Any) -> None:
    """Writes JSON; readers see the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def pack(out: Path) -> None:
    """Keeps all files in one, where the environment names a directory for what must survive."""
    if folder := os.environ.get("OUT"):
        partial = Path(folder) / "gpu_check.partial"
        with suppress(FileNotFoundError):  # a part has just replaced a file; the next time, then
            with tarfile.open(partial, "w:gz") as archive:
                archive.add(out, out.name)
            partial.replace(partial.with_suffix(".tar.gz"))


def environment(out: Path, device: str, seconds: float) -> bool:
    """Facts of the machine; fails where the library has no kernels for the device."""
    import torch

    from sparse_unified.bench.report import origin
    from sparse_unified.bench.suites import OPS
    from sparse_unified.bench.target import find_target
    from sparse_unified.build import build_info

    target = find_target(device)
    key = "CUDA" if target.is_cuda else "CPU"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    content: dict[str, Any] = {
        **origin(target.name),
        "platform": platform.platform(),
        "state": target.state(),
        "build": json.loads(build_info().to_json()),
        "ops": {op: bool(has_kernel(f"sparse_unified::{op}", key)) for op in (*OPS, "pruned_ffn")},
        "tools": {name: shutil.which(name) for name in ("nvcc", "compute-sanitizer", "ncu")},
    }
    if target.is_cuda:
        facts = torch.cuda.get_device_properties(target.device)
        names = ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        content["facts"] = {name: getattr(facts, name, None) for name in names}
    save(out / "environment.json", content)
    print(target.name, "torch", torch.__version__)
    return all(content["ops"].values())


def build(architectures: dict[str, str]) -> dict[str, Path]:
    """Compiles the programs of single instructions; program -> executable.

    Args:
        architectures: program -> arguments of -gencode, with spaces between.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    compilers = {}
    for name in architectures:
        sources = [PROGRAMS / f"{name}.cu"]
        sources += [ROOT / "csrc" / "cuda" / "tensor_map.cu"] if name == "sm90a" else []
        codes = [f"-gencode=arch={code}" for code in architectures[name].split()]
        command = ["nvcc", "-std=c++20", "-O2", *codes]
        command += [f"-I{f}" for f in (ROOT / "csrc", ROOT / "csrc" / "include", PROGRAMS)]
        compilers[name] = subprocess.Popen([*command, *map(str, sources), "-o", str(BUILT / name)])
    if failed := [name for name, compiler in compilers.items() if compiler.wait()]:
        raise RuntimeError(f"gpu_check: nvcc must compile {', '.join(failed)}, got errors")
    return {name: BUILT / name for name in architectures}


def instructions(out: Path, device: str, seconds: float) -> bool:
    """Each instruction that the kernels use, alone; the emulator runs the same programs.

    Where one passes there and fails here, emulator and wrapper share a misreading.
    """
    import torch

    if device == "cpu":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    names = ("sm80", "sm90a") if (major, minor) == (9, 0) else ("sm80",)  # 9.0a runs on 9.0 alone
    paths = {name: BUILT / name for name in names}
    if not all(path.exists() for path in paths.values()):
        own = f"compute_{major}{minor},code=sm_{major}{minor}"
        codes = {"sm80": own, "sm90a": "compute_90a,code=sm_90a"}
        paths = build({name: codes[name] for name in names})
    found: dict[str, Any] = {}
    for name, path in paths.items():
        ran = subprocess.run([path], capture_output=True, text=True, timeout=seconds, check=False)
        lines = [line.split(maxsplit=1) for line in ran.stdout.splitlines()]
        results = {line[1]: line[0] for line in lines if line and line[0] in ("PASS", "FAIL")}
        found[name] = {"status": ran.returncode, "tests": results, "log": ran.stderr[-2000:]}
        save(out / "instructions.json", found)
        print(name, ran.returncode, f"{len(results)} tests", *results.items(), sep="\n")
    return all(
        f["status"] == 0 and f["tests"] and "FAIL" not in f["tests"].values()
        for f in found.values()
    )


def worker(device: str) -> list[str]:
    """The command of a process that runs checks, but for their names."""
    return [sys.executable, __file__, "--work", device]


def run_checks(out: Path, device: str, seconds: float, part: str) -> bool:
    """The checks of a part; one that ends or hangs its process fails, another process goes on."""
    import checks  # noqa: F401  (registers them)

    from sparse_unified.checks import all_checks, results

    left = list(all_checks("cpu" if device == "cpu" else "cuda"))
    left = [name for name in left if ("compile" in name) == (part == "compile")]
    left = left[:: 40 if device == "cpu" else 1]
    found: list[dict[str, Any]] = []
    for said in results(worker(device), left, seconds=seconds, stall=seconds):
        found.append(said)
        left.remove(said["name"])
        save(out / f"{part}.json", {"not_run": left, "checks": found})
    failed = [f"{said['name']}: {said['text']}" for said in found if said["outcome"] == "failed"]
    print(f"{len(found)} ran, {len(left)} not, {len(failed)} failed", *failed, sep="\n")
    return bool(found) and not failed and not left


def checks(out: Path, device: str, seconds: float) -> bool:
    """All checks but those that wait for a compiler, up to a minute each."""
    return run_checks(out, device, seconds, "checks")


def compile(out: Path, device: str, seconds: float) -> bool:
    """The checks that wait for a compiler."""
    return run_checks(out, device, seconds, "compile")


def measure(path: Path, device: str, seconds: float, names: Sequence[str], *words: str) -> bool:
    """Calls `sparse-unified bench`, which saves after each result; all of ours must run."""
    from sparse_unified.bench.command import main

    cases = [w for name in (ON_CPU if device == "cpu" else names) for w in ("--case", name)]
    options = ["--device", device, "--seconds", f"{max(seconds, 1)}", "--json", str(path)]
    main([*options, *cases, *words, *(("--repeats", "2") if device == "cpu" else ())])
    content = json.loads(path.read_text())
    ours = ("sparse_unified", "chosen")
    missing = [m for m in content["not_measured"] if m["provider"] in ours]
    print(*missing, sep="\n")
    return not missing and any(r["provider"] in ours for r in content["records"])


def bench(out: Path, device: str, seconds: float) -> bool:
    """The most wanted numbers first."""
    from sparse_unified.bench.target import find_target

    chosen = [word for name in PROVIDERS for word in ("--provider", name)]
    saved = out / f"{find_target(device).slug}.json"
    names = (*LARGE, *PRUNED, *SMALLER)
    ok = measure(saved, device, 0.8 * seconds, names, *chosen, "--direction", "all")
    if device == "cpu":
        return ok
    both = ("--provider", "dense", "--provider", "sparse_unified", "--op", "sparse_ffn", "--graph")
    return measure(out / "graphs.json", device, 0.1 * seconds, SMALLER, *both) and ok


def tune(out: Path, device: str, seconds: float) -> bool:
    """Every configuration of the expert GEMMs beside the chosen one."""
    results = []
    for direction in ("fwd", "fwd_bwd"):
        words = ("--variants", "--direction", direction)
        path = out / f"tune_{direction}.json"
        results.append(measure(path, device, 0.4 * seconds, LARGE, *words))
    return all(results)


def kernels(out: Path, device: str, seconds: float) -> bool:
    """The time of each kernel of an expert FFN, forward and backward, as the profiler saw it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from sparse_unified.bench.cases import CASES
    from sparse_unified.bench.suites import CHOSEN, variant_suite

    is_hopper = device != "cpu" and torch.cuda.get_device_capability(device) == (9, 0)
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    found: list[dict[str, Any]] = []
    for name in ON_CPU if device == "cpu" else LARGE:
        for direction, variants in KERNEL_VARIANTS.items():
            of_device = variants if is_hopper else ()
            case, where = CASES[name], torch.device(device)
            suite = variant_suite(case, torch.bfloat16, direction, where, of_device)
            for variant in of_device or (CHOSEN,):
                call = suite.candidates[variant].build()
                call(0)
                with profile(activities=[activity]) as profiled:
                    for turn in range(KERNEL_ROUNDS):
                        call(turn)
                    if device != "cpu":
                        torch.cuda.synchronize()
                times: dict[str, list[float]] = {}
                for event in profiled.events():
                    if "sparse_unified" in event.name:
                        times.setdefault(event.name, []).append(event.time_range.elapsed_us())
                medians = {kernel: statistics.median(of) for kernel, of in times.items()}
                found.append(
                    {"case": name, "direction": direction, "variant": variant, "median_us": medians}
                )
                save(out / "kernels.json", found)
                print(name, direction, variant, *medians.items(), sep="\n")
    return all(row["median_us"] for row in found)


def sanitizer(out: Path, device: str, seconds: float) -> bool:
    """compute-sanitizer's tools on small checks, side by side.

    Three look at our kernels alone. initcheck must see who writes what ours read, torch's kernels,
    so it looks at all, and reports that name ours count.
    """
    if device == "cpu":
        return True
    ours = ("--error-exitcode", "99", "--kernel-name", "kernel_substring=sparse_unified")
    # The cache of torch's allocator would hide accesses outside of a tensor.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = {}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
        command += [*(ours if tool != "initcheck" else ()), *worker(device), json.dumps(SANITIZED)]
        log = (out / f"{tool}.txt").open("w")
        started[tool] = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=variables
        )
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    for tool, process in started.items():
        try:
            status: int | None = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        text = (out / f"{tool}.txt").read_text(errors="replace")
        reports = len(re.findall(r"^========= +at .*sparse_unified", text, re.MULTILINE))
        passed = text.count('"outcome": "passed"')
        found[tool] = {"status": status, "reports": reports, "checks": passed}
        save(out / "sanitizer.json", found)
    print(found, "of", len(SANITIZED))
    right = {"status": 0, "reports": 0, "checks": len(SANITIZED)}
    return all(told == right for told in found.values())


def families(out: Path, device: str, seconds: float) -> bool:
    """What `sparse-unified doctor` tells users: each kernel family alone."""
    os.environ["SPARSE_UNIFIED_CACHE"] = str(out)  # where it keeps what fails
    from sparse_unified import doctor

    def told(done: int, total: int, text: str) -> None:
        print(f"{done} of {total}: {text}", flush=True)

    command = worker(device)[:-1]
    report = doctor.examine(device, stall=seconds, command=command, progress=told)
    save(out / "families.json", report.to_dict())
    print(report)
    return report.ok


# Part -> its seconds, and what runs it, in this order.
PARTS = {
    "environment": (25, environment),
    "instructions": (30, instructions),
    "checks": (60, checks),
    "bench": (130, bench),
    "tune": (50, tune),
    "kernels": (15, kernels),
    "families": (55, families),
    "sanitizer": (75, sanitizer),
    "compile": (70, compile),
}
CALLS = {"first": list(PARTS)[:4], "second": list(PARTS)[4:]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of results (build/gpu_check)")
    parser.add_argument("--seconds", type=float, help="for everything (first 245, second 265)")
    parser.add_argument(
        "--parts", help=f"first, second, or some of {','.join(PARTS)}, with commas between"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--build", action="store_true", help="compile instruction tests, no more")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    out = (options.out or ROOT / "build" / "gpu_check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.build:
        portable = "compute_80,code=sm_80 compute_90,code=sm_90 compute_80,code=compute_80"
        build({"sm80": portable, "sm90a": "compute_90a,code=sm_90a"})
        return 0
    if options.work or options.part:
        use_tree()
        if options.work:
            import checks  # noqa: F401  (registers them)

            from sparse_unified import doctor

            doctor.child()
            return 0
        return 0 if PARTS[options.part][1](out, options.device, options.seconds) else 1
    names = CALLS.get(options.parts) or (options.parts or ",".join(PARTS)).split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts must be some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    total = sum(PARTS[name][0] for name in names)
    rows = []
    for name in names:
        seconds = PARTS[name][0] * (options.seconds or total) / total
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        command += ["--device", options.device, "--seconds", f"{0.9 * seconds - 2:.0f}"]
        began = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            part = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while part.poll() is None and time.monotonic() - began < seconds:
            pack(out)
            time.sleep(2)
        status = part.poll()
        with suppress(ProcessLookupError):  # what it started, too
            os.killpg(part.pid, signal.SIGKILL)
        part.wait()
        took = time.monotonic() - began
        rows.append({"part": name, "ok": status == 0, "status": status, "seconds": round(took, 1)})
        ok = all(row["ok"] for row in rows)
        save(out / "summary.json", {"ok": ok, "rows": rows})
        print(f"{name:<14}{'passed' if status == 0 else 'FAILED':<8}{took:>6.0f} s", flush=True)
        pack(out)
        if status != 0:  # a machine that goes back may take its files along
            print((out / f"{name}.log").read_text(errors="replace")[-2000:], flush=True)
    print(f"results in {out}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
