# SPDX-License-Identifier: Apache-2.0
"""What a step, a run, and a dry run report, and the log of a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparse_unified._common import Report, optional
from sparse_unified.adapt.memory import MemoryEstimate
from sparse_unified.checkpoint.files import loads_strict, replace_file

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
_FLUSH_EVERY = 1.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did; losses are those before it.

    Attributes:
        step: its number, from 1.
        loss: the weighted sum that was minimised.
        text_loss: mean cross-entropy of predicted text tokens, in nats; None without any.
        image_loss: mean squared error of noised latent tokens; None without any.
        balance_loss: mean over the passes.
        router_z_loss: mean over the passes.
        grad_norm: of the gradient before it was clipped.
        learning_rate: that was used.
        tokens: of the step, all kinds and processes.
        seconds: wall time of the step.
        expert_load: `{(component, layer): tokens of each expert}`.
    """

    step: int
    loss: float
    text_loss: float | None
    image_loss: float | None
    balance_loss: float
    router_z_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    expert_load: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the step per second of wall time."""
        return self.tokens / self.seconds

    @property
    def load_imbalance(self) -> float | None:
        """Load of the busiest expert over the mean load, averaged over layers; None if all dense.

        1 is perfect balance, E / K is all tokens on the same K of E experts.
        """
        ratios = [
            max(load) * len(load) / sum(load) for load in self.expert_load.values() if sum(load)
        ]
        return sum(ratios) / len(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for json.dump, without those that are None."""
        names = [one.name for one in fields(self) if one.name != "expert_load"]
        names += ["tokens_per_second", "load_imbalance"]
        values = {name: getattr(self, name) for name in names}
        load = {f"{name}.{layer}": own for (name, layer), own in self.expert_load.items()}
        values["expert_load"] = load or None
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport(Report):
    """What a run did.

    Attributes:
        steps: taken in all, those before a resume included.
        trained_parameters: number of trained values of the model.
        parameters: number of all of them.
        tokens: of the steps of this process's run, those before a resume excluded.
        seconds: that these steps took.
        first_loss: mean of the first tenth of these steps.
        last_loss: mean of the last tenth.
    """

    steps: int
    trained_parameters: int
    parameters: int
    tokens: int
    seconds: float
    first_loss: float | None
    last_loss: float | None

    def table(self) -> Sequence[Sequence[object]]:
        rows: list[tuple[str, object]] = [
            ("steps", self.steps),
            ("trained", f"{self.trained_parameters:,} of {self.parameters:,} parameters"),
        ]
        if self.first_loss is not None and self.last_loss is not None:
            rows += [
                ("loss", f"{self.first_loss:.4f} -> {self.last_loss:.4f}"),
                ("tokens", f"{self.tokens:,} ({self.tokens / self.seconds:,.0f} a second)"),
                ("time", f"{self.seconds:.1f} s"),
            ]
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptReport(TrainingReport):
    """What `adapt` did.

    Attributes:
        out: the directory it wrote.
        log: the log of the run.
        stage: what was trained.
        component: of which component.
        resumed_from: the step it went on from, 0 from scratch.
    """

    out: str
    log: str
    stage: str
    component: str
    resumed_from: int

    def table(self) -> Sequence[Sequence[object]]:
        rows = [("written", self.out), ("log", self.log), ("stage", self.stage)]
        if self.resumed_from:
            rows.append(("resumed from", f"step {self.resumed_from}"))
        return [*rows, *TrainingReport.table(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Report):
    """What a run would do.

    Attributes:
        sequences: of each use in the data.
        steps: of the run.
        epochs: how often each sequence is seen.
        passes: forward and backward passes of a step, over all processes.
        resumes_from: step of the state that it would go on from.
        memory: for a pass of the size of the first sequences.
    """

    sequences: dict[str, int]
    steps: int
    epochs: float
    passes: int
    resumes_from: int
    memory: MemoryEstimate

    def table(self) -> Sequence[Sequence[object]]:
        uses = ", ".join(f"{count:,} {task}" for task, count in self.sequences.items())
        rows = [
            ("sequences", uses),
            ("steps", f"{self.steps:,}, each of {self.passes} passes"),
            ("epochs", f"{self.epochs:.2f}"),
        ]
        if self.resumes_from:
            rows.append(("resumes from", f"step {self.resumes_from}"))
        return rows

    def notes(self) -> Sequence[str]:
        return [self.memory.to_text()]


class TrainingLog:
    """Appends what the steps did to `log.jsonl` of a directory, and to `tensorboard/` if asked.

    Steps reach the disk about once a second, before a state is saved, and at the end.

    Args:
        directory: of the run.
        steps: done already; what a killed run logged after them is dropped.
        tensorboard: also write event files.

    Raises:
        ValueError: the log lacks one of the steps that are done.
        ImportError: `tensorboard` is asked for and the `train` extra is not installed.
    """

    def __init__(self, directory: Path, steps: int, *, tensorboard: bool = False) -> None:
        path = directory / LOG
        self._events: Any = None
        if tensorboard:
            optional("tensorboard", extra="train")
            self._events = optional("torch.utils.tensorboard", extra="train").SummaryWriter(
                os.fspath(directory / TENSORBOARD), purge_step=steps + 1
            )
        kept = [line for line in read_lines(path) if line["step"] <= steps]
        if [line["step"] for line in kept] != list(range(1, steps + 1)):
            raise ValueError(
                f"{path}: log must hold the steps 1 to {steps} of the state, got {len(kept)} of "
                "them"
            )
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._stream = path.open("a", encoding="utf-8")
        self._flushed_at = time.monotonic()

    def write(self, record: StepRecord) -> None:
        """Logs one step."""
        values = record.to_dict()
        self._stream.write(json.dumps(values) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if name not in ("step", "expert_load"):
                    self._events.add_scalar(name, value, record.step)
        if time.monotonic() >= self._flushed_at + _FLUSH_EVERY:
            self._stream.flush()
            self._flushed_at = time.monotonic()

    def sync(self) -> None:
        """Makes what was logged survive a crash of the machine."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Writes what is left, and closes the files."""
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
            values = loads_strict(line)
        except ValueError:
            break
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            break
        if not isinstance(values.get("loss"), float):
            break
        found.append(values)
    return found
