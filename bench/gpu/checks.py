# SPDX-License-Identifier: Apache-2.0
"""The checks of tests/gpu, in processes that may end."""

from __future__ import annotations

import json
import subprocess
import sys

from .job import FAILED, PASSED, ROOT, Job

RUNNER = ROOT / "tests" / "gpu" / "run.py"
# Enough of them for a dry run.
_DRY = ("checks_block", "checks_routing.sort_is_the_stable_one[random")


def run(job: Job) -> bool:
    """Runs all checks; those for which there was no time have not passed."""
    path = job.out / f"{job.name}.json"
    command = [sys.executable, str(RUNNER), "--device", job.device, "--json", str(path)]
    command += ["--seconds", str(max(job.left() - 5, 5))]
    if job.is_dry:
        command += ["--small", *_DRY]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    saved = json.loads(path.read_text()) if path.exists() else {"counts": {}, "checks": []}
    job.content = saved
    counts = ", ".join(f"{number} {outcome}" for outcome, number in saved["counts"].items())
    failed = [check["name"] for check in saved["checks"] if check["outcome"] == "failed"]
    summary = "; failed: ".join([counts or "nothing ran", *failed[:4]])
    job.save(PASSED if status == 0 else FAILED, summary)
    return status == 0
