# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of `registry` without pytest, and goes on after one that ended its process.

    python tests/gpu/run.py --device cuda --json checks.json [--small] [--seconds 120] [NAME ...]

Each check runs in a worker process that writes a line when it starts and one when it is done. A
worker that ends, hangs, or reports an error of the device is replaced, and the check it was at has
failed. The exit status is 1 when a check failed and 3 when there was no time for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
# A check that takes longer than this hangs, the start of a worker included.
_MOST_SECONDS = 90.0
FAILED, OUT_OF_TIME = 1, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Runs the checks that a device must pass.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where the results are kept up to date")
    parser.add_argument("--small", action="store_true", help="the small checks alone")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all checks together")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="prefixes of names; all by default"
    )
    return parser


def _find(names: Sequence[str], small: bool) -> dict[str, Any]:
    from registry import all_checks

    checks = {
        name: check
        for name, check in all_checks().items()
        if (check.is_small or not small) and (not names or name.startswith(tuple(names)))
    }
    if not checks:
        raise ValueError(f"run: names must be prefixes of checks, got {list(names)}")
    return checks


def work(device: str, names: Sequence[str]) -> None:
    """Runs checks by their exact names; a line of JSON before and after each."""
    import torch
    from registry import Skip, all_checks

    checks = all_checks()
    for name in names:
        print(json.dumps({"name": name, "outcome": "started"}), flush=True)
        start = time.perf_counter()
        outcome, text = "passed", ""
        try:
            checks[name](torch.device(device))
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        except Skip as reason:
            outcome, text = "skipped", str(reason)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            outcome, text = "failed", f"{type(error).__name__}: {error}\n{where}"
        line = {
            "name": name,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - start, 3),
            "text": text[:2000],
        }
        print(json.dumps(line), flush=True)
        if outcome == "failed" and "CUDA error" in text:
            return  # nothing this process does on the device is worth anything now


class Worker:
    """A process at work, and its lines as they come."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        for target in (self._read_lines, self._read_errors):
            threading.Thread(target=target, daemon=True).start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = [*self.errors[-40:], line]

    def results(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yields what the worker says; last, what it was at when it ended or hung."""
        current: str | None = None
        while True:
            wait = min(_MOST_SECONDS, deadline - time.monotonic())
            try:
                line = self.lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                why = "hangs" if wait >= _MOST_SECONDS else "was stopped: out of time"
                break
            if line is None:
                why = f"ended the process with status {self.process.wait()}"
                break
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(line)
                current = said["name"] if said["outcome"] == "started" else None
                if said["outcome"] != "started":
                    yield said
        self.stop()
        if current is not None:
            text = f"{why}\n{''.join(self.errors[-8:])}"
            outcome = "not_run" if "out of time" in why else "failed"
            yield {"name": current, "outcome": outcome, "seconds": 0.0, "text": text[:2000]}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def worker_command(device: str) -> list[str]:
    """What starts a worker, before the names of its checks."""
    return [sys.executable, __file__, "--worker", "--device", device]


def run(
    command: Sequence[str], names: Sequence[str], seconds: float, json_path: Path | None
) -> int:
    """Runs checks in workers, prints what fails, keeps the JSON up to date."""
    deadline = time.monotonic() + seconds
    results: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left and time.monotonic() < deadline:
        worker = Worker([*command, *left])
        before = len(results)
        for result in worker.results(deadline):
            results[result["name"]] = result
            if result["outcome"] == "failed":
                print(f"FAILED {result['name']}: {result['text']}", flush=True)
            _write(json_path, results)
        left = [name for name in names if name not in results]
        if len(results) == before:  # it did not even start: neither will the next
            text = f"the worker does not start\n{''.join(worker.errors[-8:])}"
            results[left[0]] = {"name": left[0], "outcome": "failed", "seconds": 0.0, "text": text}
            print(f"FAILED {left[0]}: {text}", flush=True)
            break
    for name in names:
        results.setdefault(name, {"name": name, "outcome": "not_run", "seconds": 0.0, "text": ""})
    _write(json_path, results)
    counts = count(results.values())
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()), flush=True)
    if counts.get("failed"):
        return FAILED
    return OUT_OF_TIME if counts.get("not_run") else 0


def count(results: Any) -> dict[str, int]:
    """Number of results by outcome."""
    counts: dict[str, int] = {}
    for result in results:
        counts[result["outcome"]] = counts.get(result["outcome"], 0) + 1
    return counts


def _write(path: Path | None, results: dict[str, dict[str, Any]]) -> None:
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    content = {"counts": count(results.values()), "checks": list(results.values())}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    for folder in (ROOT, TESTS, TESTS / "gpu"):
        sys.path.insert(0, str(folder))
    if arguments.worker:
        work(arguments.device, arguments.names)
        return 0
    names = list(_find(arguments.names, arguments.small))
    command = worker_command(arguments.device)
    return run(command, names, arguments.seconds, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
