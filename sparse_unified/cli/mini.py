# SPDX-License-Identifier: Apache-2.0
"""mini: a BAGEL that is small enough to train and to study on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sparse_unified.cli.console import Command, Output
from sparse_unified.cli.console import add_commands as add

_TASKS = ("digits", "scenes")
_PARTS = (
    *("dense", "probe", "sparse-16-8", "sparse-32-16", "random-16-8"),
    *("coactivation-16-8", "static"),
)


def add_commands(actions: Any) -> None:
    """Adds the commands of the study."""
    for name, text, options, run in (
        ("train", "train the dense model from nothing", _add_train, _run_train),
        ("study", "run the study, or what is missing of it", _add_study, _run_study),
        ("report", "tables and a picture from the records", _add_report, _run_report),
    ):
        add(actions, Command(name=name, help=text, description=text, add=options, run=run))


def _add_train(parser: Any) -> None:
    parser.add_argument("task", choices=_TASKS)
    parser.add_argument("out", metavar="OUT", help="folder of weights, log and configuration")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as shipped)")
    parser.add_argument("--batch-size", type=int, help="sequences of a step")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--seed", type=int, help="of weights and data")


def _add_study(parser: Any) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of records, one for each part")
    parser.add_argument("--task", nargs="+", choices=_TASKS, default=list(_TASKS))
    parser.add_argument("--part", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each of the three stages of tuning")
    parser.add_argument("--batch-size", type=int, help="sequences of a step")
    parser.add_argument("--questions", type=int, help="to answer, at each evaluation")
    parser.add_argument("--velocities", type=int, help="to predict, at each evaluation")
    parser.add_argument("--pictures", type=int, help="for each digit or column of the scenes")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes, of one thread each (default: %(default)s)",
    )


def _add_report(parser: Any) -> None:
    parser.add_argument("records", metavar="RECORDS", help="folder of records, or their JSON file")
    parser.add_argument("--markdown", metavar="FILE", help="fill the tables into this page")
    parser.add_argument("--plot", metavar="FILE", help="draw a PNG")


def _given(options: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Returns the options that were given, under the names of a configuration."""
    values = {name: getattr(options, option) for name, option in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _run_train(options: argparse.Namespace) -> Output:
    from dataclasses import replace

    import torch

    from sparse_unified.mini.model import MiniTask
    from sparse_unified.mini.train import DENSE, LOG_EVERY, train_dense

    torch.set_num_threads(1)
    task = MiniTask(options.task)
    changed = _given(
        options, steps="steps", batch_size="batch_size", learning_rate="lr", seed="seed"
    )

    def tell(record: Any) -> None:
        if record.step % LOG_EVERY == 0 and not options.quiet:
            sys.stderr.write(f"step {record.step}: loss {record.loss:.4f}\n")

    out = train_dense(task, options.out, replace(DENSE[task], **changed), tell)
    about = (out / "training.json").read_text(encoding="utf-8").rstrip()
    return Output(text=str(out), document=json.loads(about))


def _run_study(options: argparse.Namespace) -> Output:
    from sparse_unified.mini.model import MiniTask
    from sparse_unified.mini.report import to_json, to_text
    from sparse_unified.mini.study import StudyConfig, run_study

    config = StudyConfig(
        seeds=tuple(options.seeds),
        **_given(
            options,
            steps="steps",
            batch_size="batch_size",
            questions="questions",
            velocities="velocities",
            pictures="pictures",
        ),
    )

    def tell(part: Any, done: int, total: int) -> None:
        if not options.quiet:
            sys.stderr.write(f"{done} of {total}: {part.file_name}\n")

    files = run_study(
        options.out,
        config,
        tasks=tuple(MiniTask(name) for name in options.task),
        names=tuple(options.part),
        jobs=options.jobs,
        progress=tell,
    )
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return Output(text=to_text(records), document=json.loads(to_json(records)))


def _run_report(options: argparse.Namespace) -> Output:
    from sparse_unified.mini.report import fill_page, read_records, to_json, to_text

    records = read_records(options.records)
    if options.markdown:
        fill_page(Path(options.markdown), records)
    if options.plot:
        from sparse_unified.mini.picture import write_plot

        write_plot(records, options.plot)
    return Output(text=to_text(records), document=json.loads(to_json(records)))
