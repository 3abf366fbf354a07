# SPDX-License-Identifier: Apache-2.0
"""The log of a run: a JSON object a step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sparse_unified._common import optional
from sparse_unified.adapt.reports import StepRecord
from sparse_unified.checkpoint import strict_json
from sparse_unified.checkpoint.atomic import replace_file

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
_WRITE_EVERY = 1.0  # seconds


class TrainingLog:
    """Appends what the steps did to `log.jsonl` of a directory, and to `tensorboard/` if asked.

    Steps are written a second's worth at a time, before a state is saved, and at the end.

    Args:
        directory: of the run.
        steps: done already; what a killed run logged after them is dropped.
        tensorboard: also write event files.

    Raises:
        ImportError: `tensorboard` is asked for and the `train` extra is not installed.
    """

    def __init__(self, directory: Path, steps: int, *, tensorboard: bool = False) -> None:
        self._path = directory / LOG
        self._events: Any = None
        if tensorboard:
            optional("tensorboard", extra="train")
            self._events = optional("torch.utils.tensorboard", extra="train").SummaryWriter(
                os.fspath(directory / TENSORBOARD), purge_step=steps + 1
            )
        kept = [line for line in read_lines(self._path) if line["step"] <= steps]
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._stream = self._path.open("a", encoding="utf-8")
        self._waiting: list[StepRecord] = []
        self._written_at = time.monotonic()

    def write(self, record: StepRecord) -> None:
        """Logs one step."""
        self._waiting.append(record)
        if time.monotonic() >= self._written_at + _WRITE_EVERY:
            self._write_waiting()

    def _write_waiting(self) -> None:
        for record in self._waiting:
            values = record.to_dict()
            self._stream.write(json.dumps(values) + "\n")
            if self._events is not None:
                for name, value in values.items():
                    if name not in ("step", "expert_load"):
                        self._events.add_scalar(name, value, record.step)
        self._stream.flush()
        self._waiting.clear()
        self._written_at = time.monotonic()

    def sync(self) -> None:
        """Makes what was logged survive a crash of the machine."""
        self._write_waiting()
        os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write_waiting()
        self._stream.close()
        if self._events is not None:
            self._events.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the steps of a log, up to the first line that a kill cut short."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = strict_json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            break
        found.append(values)
    return found
