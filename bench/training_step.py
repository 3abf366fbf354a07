# SPDX-License-Identifier: Apache-2.0
"""How much of a training step of the miniature is spent outside of torch and of our kernels.

    python -m sparse_unified.bench.training_step [--only TEXT ...] [--json FILE.json]

A process trains; py-spy (extra `test`) stops it now and then and reads its stack, native frames
included, so that what runs is not slowed down by being watched: see `outside.py` for whose a moment
is. All of a step counts: receiving or preparing its batch, forward, backward, optimizer, average,
and a line of the log. Two things would make the shares wrong by half, and are kept away. A stack
takes py-spy some 10 ms: asked for more of them than it can read, it catches up by reading one spot
again and again, so it is asked for few. And its moments are periodic, as steps are: now and then
the process sleeps between two steps for a random time, which does not count.

Two checks come with every number:

    phases        shares of the phases by samples, beside those that clocks around them give
    instructions  of the interpreter, outside of torch, in one step: counted, so without noise
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any

import torch

from sparse_unified.adapt import (
    StepRecord,
    Trainer,
    TrainingConfig,
    ahead,
    freeze,
    init_router_,
    trainer,
)
from sparse_unified.adapt.log import TrainingLog
from sparse_unified.adapt.masters import Masters
from sparse_unified.bagel.model import Bagel
from sparse_unified.mini import MiniTask, StudyConfig, mini_config, training_data
from sparse_unified.mini.train import DENSE
from sparse_unified.surgery import MoEConfig, apply_moe_

from .outside import OUTSIDE, Shares, count_instructions, read_stacks
from .report import commit, versions
from .target import processor_name

MODELS = ("dense", "router", "expert_frozen", "full")
HIDDEN_SIZES = (64, 96)
THREADS = (1,)
PHASES = (
    "_Reader.receive",
    "TrainingPass.forward",
    "Tensor.backward",
    "Masters.step",
)
BOUND = 0.05

_WARMUP, _COUNTED, _CLOCKED = 3, 3, 60
# Seconds, at most, and steps.
_PAUSE, _PAUSE_EVERY = 0.06, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained.

    Attributes:
        task: of the miniature. hidden_size: of the decoder.
        model: "dense", or the stage in which a sparse model, 16 experts of which 8 are active, is.
        threads: of torch.
    """

    task: str
    hidden_size: int
    model: str
    threads: int

    @property
    def batch_size(self) -> int:
        """Sequences of a step, as the shipped models were trained, or are tuned in the study."""
        task = MiniTask(self.task)
        return DENSE[task].batch_size if self.model == "dense" else StudyConfig().batch_size

    @property
    def name(self) -> str:
        return f"{self.task}-{self.hidden_size}-{self.model}-{self.threads}"


def cases() -> list[Case]:
    """Returns what is measured."""
    return [
        Case(task=task.value, hidden_size=hidden_size, model=model, threads=threads)
        for task, hidden_size, model, threads in product(MiniTask, HIDDEN_SIZES, MODELS, THREADS)
    ]


def new_trainer(case: Case) -> Trainer:
    """Returns the trainer of a case, at its first step; threads are left alone."""
    task = MiniTask(case.task)
    config = mini_config(task)
    llm = dataclasses.replace(config.llm, hidden_size=case.hidden_size)
    torch.manual_seed(0)
    model = Bagel(dataclasses.replace(config, llm=llm))
    if case.model != "dense":
        moe = MoEConfig(num_experts=16, top_k=8, component="gen", layers="all")
        apply_moe_(model, moe, keep_dense=False)
        init_router_(model, "random")
    freeze(model, "full" if case.model == "dense" else case.model)
    training = TrainingConfig(
        steps=10**6, batch_size=case.batch_size, learning_rate=1e-3, ema_decay=0.995
    )
    return Trainer(model.train(), training_data(task), training, ahead=True)


class _EnoughError(Exception):
    """Ends a training."""


def pause() -> None:
    """Sleeps for a random time, up to some moments of py-spy."""
    time.sleep(random.uniform(0, _PAUSE))


def train_until(
    run: Trainer, log: TrainingLog, enough: Callable[[], bool], *, pauses: bool = False
) -> None:
    """Trains and logs as `adapt` does; `pauses` after every few steps, if asked."""

    def on_step(record: StepRecord) -> None:
        log.write(record)
        if enough():
            raise _EnoughError
        if pauses and record.step % _PAUSE_EVERY == 0:
            pause()

    with suppress(_EnoughError):
        run.run(on_step)


def train_steps(run: Trainer, log: TrainingLog, count: int) -> None:
    """Takes so many steps."""
    last = run.steps_done + count
    train_until(run, log, lambda: run.steps_done >= last)


def step_instructions(run: Trainer, log: TrainingLog) -> float:
    """Counts the instructions of a step outside of torch, mean over the same few early steps."""
    train_steps(run, log, _WARMUP)
    return count_instructions(lambda: train_steps(run, log, _COUNTED)) / _COUNTED


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Counts the seconds that the phases take inside the block."""
    spent = dict.fromkeys(PHASES, 0.0)
    owners: dict[str, Any] = {
        "_Reader.receive": ahead._Reader,
        "TrainingPass.forward": trainer.TrainingPass,
        "Tensor.backward": torch.Tensor,
        "Masters.step": Masters,
    }
    kept = {}

    def clocked(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            spent[phase] += time.perf_counter() - start
            return out

        return call

    for phase, owner in owners.items():
        name = phase.rpartition(".")[2]
        kept[owner, name] = getattr(owner, name)
        setattr(owner, name, clocked(phase, kept[owner, name]))
    try:
        yield spent
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)


def serve(names: Sequence[str]) -> None:
    """Trains case after case to be watched: says what it found out by itself, then goes on training
    until SIGUSR1."""
    enough = Event()
    signal.signal(signal.SIGUSR1, lambda *_: enough.set())
    for case in cases():
        if case.name not in names:
            continue
        torch.set_num_threads(case.threads)
        run = new_trainer(case)
        with tempfile.TemporaryDirectory() as folder, TrainingLog(Path(folder), 0) as log:
            instructions = step_instructions(run, log)
            with clocks() as spent:
                start = time.perf_counter()
                train_steps(run, log, _CLOCKED)
                seconds = time.perf_counter() - start
            found = {
                "step_ms": 1e3 * seconds / _CLOCKED,
                "clocked": {phase: spent[phase] / seconds for phase in PHASES},
                "instructions": instructions,
            }
            print(json.dumps(found), flush=True)
            train_until(run, log, enough.is_set, pauses=True)
        enough.clear()


def watch(
    chosen: Sequence[Case], seconds: float, rounds: int, rate: int
) -> Iterator[dict[str, Any]]:
    """Yields a record of each case: one process trains them all, and py-spy watches it.

    Raises:
        RuntimeError: the process fails, or py-spy cannot watch it.
    """
    names = [case.name for case in chosen]
    command = [sys.executable, "-m", "sparse_unified.bench.training_step", "--serve", *names]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for case in chosen:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"training_step: {case.name} must train, got an error")
                found = [
                    _sample(process.pid, seconds, rate, Path(folder) / "stacks")
                    for _ in range(rounds)
                ]
                process.send_signal(signal.SIGUSR1)
                yield (
                    asdict(case)
                    | {"batch_size": case.batch_size}
                    | json.loads(line)
                    | _summary(found)
                )
        except BaseException:
            process.kill()
            raise


def _summary(rounds: Sequence[Shares]) -> dict[str, Any]:
    samples = sum(shares.samples for shares in rounds)
    functions: Counter[str] = sum((shares.functions for shares in rounds), Counter())
    inside: Counter[str] = sum((shares.inside for shares in rounds), Counter())
    return {
        "outside": sum(shares.owners[OUTSIDE] for shares in rounds) / samples,
        "rounds": [round(shares.outside, 4) for shares in rounds],
        "samples": samples,
        "sampled": {phase: inside[phase] / samples for phase in PHASES},
        "functions": {name: count / samples for name, count in functions.most_common(12)},
    }


def _sample(pid: int, seconds: float, rate: int, out: Path) -> Shares:
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        raise RuntimeError("training_step: py-spy must be installed (pip install py-spy), got none")
    options = ["--native", "--idle", "--full-filenames", "--format", "raw", "--output", str(out)]
    often = ["--rate", str(rate), "--duration", f"{seconds:g}"]
    done = subprocess.run(
        [str(spy), "record", *options, *often, "--pid", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not out.exists():
        raise RuntimeError(f"training_step: py-spy must watch {pid}, got {done.stderr[-300:]}")
    with out.open(encoding="utf-8") as lines:
        return read_stacks(lines, train_until.__name__, PHASES, apart=pause.__name__)


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields a line for each case."""
    yield "| task | hidden | model | batch | threads | step, ms | outside | samples | instr. |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    for r in records:
        yield (
            f"| {r['task']} | {r['hidden_size']} | {r['model']} | {r['batch_size']} "
            f"| {r['threads']} | {r['step_ms']:.1f} | {r['outside']:.1%} | {r['samples']:,} "
            f"| {r['instructions']:,.0f} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a share is above the bound."""
    parser = argparse.ArgumentParser(prog="training_step", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round of samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=40, help="samples a second")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose names, as scenes-64-dense-1, hold one"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurement")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve)
        return 0
    content: dict[str, Any] = {
        "device": processor_name(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "records": [],
    }
    records = content["records"]
    chosen = [case for case in cases() if any(text in case.name for text in options.only)]
    for record in watch(chosen, options.seconds, options.rounds, options.rate):
        records.append(record)
        print(*list(table(records))[0 if len(records) == 1 else -1 :], sep="\n", flush=True)
        if options.json:
            text = json.dumps(content, indent=1) + "\n"
            Path(options.json).write_text(text, encoding="utf-8")
    return int(any(record["outside"] > BOUND for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
