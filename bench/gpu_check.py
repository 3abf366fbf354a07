# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in one call of less than ten minutes.

    python bench/gpu_check.py [--out DIR] [--budget 540] [--parts NAME,...] [--dry-run]

Needs a source tree with the built library, torch, and a GPU; no installation. Each part runs in a
process of its own with a time limit. `--parts model` draws with the whole 7B model, on a GPU of
80 GB, which takes as long as all others. In DIR ($OUT, or build/gpu_check) lie summary.json with
what each part found, log.txt, and DEVICE.json with the speeds, which belongs into bench/results;
the part at work keeps its own file up to date, so that nothing is lost when it is stopped. The exit
status is 1 when a part failed.

With --build, the programs that test single instructions are compiled into build/gpu, for a machine
without a compiler. With --dry-run, every part runs on the CPU as far as it can.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Part -> its share of the budget; they run in this order.
PARTS = {
    "environment": 45,
    "instructions": 55,
    "checks": 140,
    "speed": 150,
    "variants": 40,
    "peers": 30,
    "sanitizer": 80,
}
BUDGET = sum(PARTS.values())
# Those that are run when they are asked for alone: the whole 7B model, on a GPU of 80 GB.
PARTS_APART = {"model": 500}
_ALL = PARTS | PARTS_APART
# Of the budget, kept for stopping a part and writing the summary.
_RESERVE = 6


def use_tree() -> None:
    """Makes the package importable from the tree, its `bench` included, installed or not."""
    # NOTE: a script's own directory comes first there, and modules of other packages that have the
    # name of one of ours would be ours.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "bench")]
    import sparse_unified

    if str(ROOT) not in sparse_unified.__path__:
        sparse_unified.__path__.append(str(ROOT))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Tests and measures everything that only a GPU can tell."
    )
    made.add_argument("--out", type=Path, help="directory of results ($OUT, or build/gpu_check)")
    made.add_argument("--budget", type=float, default=float(BUDGET), help="seconds for everything")
    made.add_argument("--parts", help=f"some of {','.join(_ALL)}, with commas between")
    made.add_argument("--dry-run", action="store_true", help="on the CPU, as far as that goes")
    made.add_argument("--build", action="store_true", help="compile instruction tests, no more")
    made.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    made.add_argument("--part", help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return made


def run_part(name: str, out: Path, device: str, seconds: float) -> int:
    """Runs one part in this process; its exit status."""
    use_tree()
    from sparse_unified.bench.gpu import checks, environment, instructions, sanitizer, speed
    from sparse_unified.bench.gpu.job import FAILED, Job

    job = Job(name=name, out=out, device=device, seconds=seconds)
    runs = {
        "environment": environment.run,
        "instructions": instructions.run,
        "checks": checks.run,
        "speed": speed.run,
        "variants": speed.run_variants,
        "peers": speed.run_peers,
        "sanitizer": sanitizer.run,
        "model": run_model,
    }
    try:
        if name.startswith("peer-"):
            return 0 if speed.run_peer(job, name.removeprefix("peer-")) else 1
        return 0 if runs[name](job) else 1
    except Exception as error:
        job.save(FAILED, f"{type(error).__name__}: {error}"[:500])
        raise


def run_model(job: Any) -> bool:
    """Imports what only this part needs; the others run where that is not installed."""
    from sparse_unified.bench.gpu import model

    return model.run(job)


def start_part(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Runs a command into the log; its status, or None when its time was up."""
    with log.open("a") as lines:
        process = subprocess.Popen(
            command, stdout=lines, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What the part started goes with it, also when this process is stopped.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Summary:
    """The verdicts and findings of all parts, on disk after each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self.parts: dict[str, Any] = {}

    @property
    def is_ok(self) -> bool:
        return all(row["status"] != "failed" for row in self.rows)

    def add(self, name: str, status: int | None, seconds: float, why: str = "") -> None:
        """Takes what a part left in its file, and how it ended."""
        path = self.out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        row = {
            "part": name,
            "status": found.get("status", "failed") if status == 0 else "failed",
            "seconds": round(seconds, 1),
            "summary": "; ".join(filter(None, (why, found.get("summary", "left no result")))),
        }
        self.rows.append(row)
        self.parts[name] = found
        content = {"ok": self.is_ok, "rows": self.rows, "parts": self.parts}
        (self.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
        path.unlink(missing_ok=True)
        print(line(row), flush=True)


def check(names: Sequence[str], out: Path, device: str, budget: float) -> int:
    """Runs parts one after the other and writes the summary after each."""
    deadline = time.monotonic() + budget
    log = out / "log.txt"
    log.write_text("")
    for name in _ALL:  # an older run's
        (out / f"{name}.json").unlink(missing_ok=True)
    scale = budget / sum(_ALL[name] for name in names)
    summary = Summary(out)
    for position, name in enumerate(names):
        left = deadline - time.monotonic() - _RESERVE
        later = sum(_ALL[other] for other in names[position + 1 :]) * scale
        # A part may use what those before it left over, and never what those after it need.
        seconds = max(min(left, max(_ALL[name] * scale, left - later)), 0.0)
        if seconds < 1.0:
            summary.add(name, None, 0.0, "no time left")
            continue
        command = [sys.executable, "-u", str(Path(__file__).resolve()), "--part", name]
        command += ["--out", str(out), "--device", device, "--seconds", f"{seconds - 1:.0f}"]
        with log.open("a") as lines:
            lines.write(f"\n==== {name}, {seconds:.0f} s\n")
        began = time.monotonic()
        try:
            status = start_part(command, log, seconds)
        except SystemExit:
            summary.add(name, None, time.monotonic() - began, "stopped from outside")
            raise
        summary.add(
            name, status, time.monotonic() - began, "" if status is not None else "out of time"
        )
    total = sum(row["seconds"] for row in summary.rows)
    print(f"{'':<23}{total:>6.0f} s\n\nresults in {out}", flush=True)
    return 0 if summary.is_ok else 1


def line(row: dict[str, Any]) -> str:
    return f"{row['part']:<14}{row['status']:<9}{row['seconds']:>6.0f} s  {row['summary'][:300]}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    out = arguments.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu_check")
    out = out.resolve()
    if arguments.build:
        use_tree()
        from sparse_unified.bench.gpu import instructions

        built = instructions.build(None, ("sm80", "sm90a"))
        print(*built.values(), sep="\n")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return run_part(arguments.part, out, arguments.device, arguments.seconds)
    names = list(PARTS) if arguments.parts is None else arguments.parts.split(",")
    unknown = [name for name in names if name not in _ALL]
    if unknown or not names:
        print(f"gpu_check: --parts must be some of {','.join(_ALL)}, got {arguments.parts!r}")
        return 2
    device = "cpu" if arguments.dry_run else arguments.device
    # A caller's time limit ends the part at work, so that its results so far are summed up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return check(names, out, device, arguments.budget)


if __name__ == "__main__":
    sys.exit(main())
