# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer's four tools on small checks, side by side, looking at our kernels alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .checks import RUNNER
from .job import FAILED, PASSED, ROOT, SKIPPED, Job

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Each op forward and backward, ragged and empty experts, sizes that fit no tile.
CHECKS = (
    "checks_routing.route_of_exact_logits[bfloat16-37-(5, 2)]",
    "checks_routing.sort_is_the_stable_one[gaps-37-(16, 8)]",
    "checks_routing.permute_and_combine[bfloat16-37-41]",
    "checks_ffn.ffn_of_extreme_routings[bfloat16-gaps-37]",
    "checks_ffn.ffn_of_bagel_widths[bfloat16-592-41-64]",
    "checks_ffn.ffn_of_sizes_that_fit_no_tile[float16-(72, 56)]",
    "checks_gradients.gradients_of_route_topk[bfloat16-53]",
    "checks_gradients.gradients_of_permute_and_combine[bfloat16-41]",
    "checks_gradients.gradients_of_grouped_ffn[bfloat16-gaps-False]",
    "checks_gradients.gradients_of_grouped_ffn[float16-random-False]",
)
_SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)")


def command(tool: str, device: str) -> list[str]:
    """The sanitizer around a worker; kernels of our namespace have its name in theirs."""
    worker = [sys.executable, str(RUNNER), "--worker", "--device", device, *CHECKS]
    return [
        "compute-sanitizer",
        "--tool",
        tool,
        "--kernel-name",
        "kernel_substring=sparse_unified",
        "--target-processes",
        "all",
        "--error-exitcode",
        "99",
        "--print-limit",
        "20",
        *worker,
    ]


def judge(text: str, status: int) -> tuple[bool, str]:
    """Whether a tool found nothing, and its findings or why it did not finish."""
    summary = _SUMMARY.findall(text)
    passed_checks = text.count('"outcome": "passed"')
    if '"outcome": "failed"' in text:
        return False, "a check failed under the sanitizer"
    if not summary:
        return False, f"no summary, status {status}: {text.strip().splitlines()[-1:]}"
    found = sum(int(number) for _, number in summary)
    if passed_checks < len(CHECKS):
        return False, f"{passed_checks} of {len(CHECKS)} checks ran, {found} findings"
    return found == 0 and status == 0, f"{found} findings in {passed_checks} checks"


def run(job: Job) -> bool:
    """Runs the tools at the same time, each until the part's time is up."""
    if job.is_dry:
        job.save(SKIPPED, "needs a GPU")
        return True
    if shutil.which("compute-sanitizer") is None:
        job.save(FAILED, "compute-sanitizer is not here")
        return False
    folder = Path(tempfile.mkdtemp(prefix="sanitizer-"))
    logs = {tool: folder / f"{tool}.log" for tool in TOOLS}
    started = {}
    for tool, path in logs.items():
        with path.open("w") as log:
            started[tool] = subprocess.Popen(
                command(tool, job.device), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
            )
    while job.left() > 5 and any(process.poll() is None for process in started.values()):
        time.sleep(0.5)
    verdicts = {}
    for tool, process in started.items():
        timed_out = process.poll() is None
        if timed_out:
            process.kill()
            process.wait()
        verdicts[tool] = _verdict(logs[tool], process.returncode, timed_out)
    job.content |= {
        "tools": {tool: {"ok": ok, "text": text} for tool, (ok, text) in verdicts.items()}
    }
    job.content["findings"] = {tool: _findings(path) for tool, path in logs.items()}
    shutil.rmtree(folder, ignore_errors=True)
    all_ok = all(ok for ok, _ in verdicts.values())
    summary = "; ".join(f"{tool}: {text}" for tool, (_, text) in verdicts.items())
    job.save(PASSED if all_ok else FAILED, summary)
    return all_ok


def _verdict(path: Path, status: int, timed_out: bool) -> tuple[bool, str]:
    text = path.read_text(errors="replace")
    if timed_out:
        done = text.count('"outcome": "passed"')
        return False, f"out of time after {done} of {len(CHECKS)} checks"
    return judge(text, status)


def _findings(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if line.startswith("=========")][:80]
