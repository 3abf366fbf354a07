# SPDX-License-Identifier: Apache-2.0
"""What a part of the GPU check is given, and where it leaves what it found."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(slots=True, kw_only=True)
class Job:
    """One part at work.

    Args:
        name: of the part, and of its file.
        out: directory of results.
        device: "cuda", or "cpu" in a dry run.
        seconds: the time it has.
        content: what is saved.
    """

    name: str
    out: Path
    device: str
    seconds: float
    content: dict[str, Any] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def left(self) -> float:
        """Seconds until the part will be stopped."""
        return self.seconds - (time.monotonic() - self._start)

    def save(self, status: str, summary: str) -> None:
        """Writes the file of the part; an older one is replaced whole."""
        self.content |= {
            "part": self.name,
            "status": status,
            "summary": summary,
            "seconds": round(time.monotonic() - self._start, 1),
        }
        write_json(self.out / f"{self.name}.json", self.content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; readers see the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
