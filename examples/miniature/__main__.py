# SPDX-License-Identifier: Apache-2.0
"""Trains the miniature and runs its study: `python examples/miniature --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # also where this folder itself is run

from miniature.data import write_records
from miniature.report import fill_page, read_records, to_json, to_text, write_plot
from miniature.study import PARTS, StudyConfig, run_study
from miniature.train import DENSE, LOG_EVERY, train_dense
from sparse_unified.mini import MiniTask


def _train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    train_dense(
        MiniTask(options.task),
        options.out,
        progress=lambda r: r.step % LOG_EVERY or print(f"step {r.step}: loss {r.loss:.4f}"),
    )


def _data(options: argparse.Namespace) -> None:
    print(write_records(MiniTask(options.task), Path(options.out), options.count, options.seed))


def _study(options: argparse.Namespace) -> None:
    files = run_study(
        options.out,
        StudyConfig(seeds=tuple(options.seeds)),
        tasks=tuple(MiniTask(task) for task in options.task),
        names=tuple(options.part),
        jobs=options.jobs,
        progress=lambda part, done, total: print(f"{done} of {total}: {part.file_name}"),
    )
    print(*files, sep="\n")


def _report(options: argparse.Namespace) -> None:
    records = read_records(options.records)
    if options.markdown:
        fill_page(options.markdown, records)
    if options.plot:
        write_plot(records, options.plot)
    if options.json:
        options.json.write_text(to_json(records) + "\n")
    print(to_text(records))


def main(argv: list[str] | None = None) -> None:
    """Runs train, data, study or report."""
    parser = argparse.ArgumentParser(prog="python examples/miniature")
    actions = parser.add_subparsers(required=True)
    tasks = [task.value for task in MiniTask]

    train = actions.add_parser("train", help="train the dense model from nothing")
    train.add_argument("task", choices=tasks)
    train.add_argument("out", help="folder of weights, log and configuration")
    steps = ", ".join(f"{task.value} {training.steps}" for task, training in DENSE.items())
    train.epilog = f"Steps: {steps}."
    train.set_defaults(run=_train)

    data = actions.add_parser("data", help="write training data for adapt, calibrate, evaluate")
    data.add_argument("task", choices=tasks)
    data.add_argument("out", help="folder of pictures and records.jsonl, to be made")
    data.add_argument("--count", type=int, default=256, help="pictures of each kind")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(run=_data)

    study = actions.add_parser("study", help="run the study, or what is missing of it")
    study.add_argument("out", help="folder of records, one for each part")
    study.add_argument("--task", nargs="+", choices=tasks, default=tasks)
    study.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    study.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    study.set_defaults(run=_study)

    report = actions.add_parser("report", help="tables and plots from the records")
    report.add_argument("records", help="folder of records, or their JSON file")
    report.add_argument("--markdown", type=Path, help="fill the tables into this page")
    report.add_argument("--plot", help="draw a PNG")
    report.add_argument("--json", type=Path, help="write all records as one JSON file")
    report.set_defaults(run=_report)

    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
