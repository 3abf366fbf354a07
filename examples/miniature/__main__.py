# SPDX-License-Identifier: Apache-2.0
"""Trains the miniature and runs its study: `python examples/miniature --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # also where this folder itself is run

from safetensors.torch import save_file

from miniature.autoencoder import train_autoencoder
from miniature.data import write_records
from miniature.report import fill_page, read_records, to_json, to_text, write_panel, write_plot
from miniature.study import PARTS, StudyConfig, StudyPart, run_study
from miniature.train import DENSE, LOG_EVERY, train_dense


def _autoencoder(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    vae = train_autoencoder(
        progress=lambda step, e: step % LOG_EVERY or print(f"step {step}: {e:.6f}", flush=True)
    )
    tensors = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
    save_file(tensors, options.out)


def _train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    train_dense(
        options.out,
        replace(DENSE, seed=options.seed),
        progress=lambda r: r.step % LOG_EVERY or print(f"step {r.step}: {r.loss:.4f}", flush=True),
    )


def _data(options: argparse.Namespace) -> None:
    print(write_records(Path(options.out), options.count, options.seed))


def _study(options: argparse.Namespace) -> None:
    start, own = time.perf_counter(), count(1)
    print(f"{len(options.models) * len(options.part)} parts, of some minutes each", flush=True)

    def tell(part: StudyPart, done: int, total: int) -> None:
        minutes = (time.perf_counter() - start) / 60
        left = minutes / max(next(own), options.jobs) * (total - done)
        where = f"{done} of {total}: {part.file_name}"
        print(f"{where}, {minutes:.0f} min, about {left:.0f} to go", flush=True)

    files = run_study(
        options.out,
        StudyConfig(models=tuple(options.models)),
        names=tuple(options.part),
        jobs=options.jobs,
        progress=tell,
    )
    print(*files, sep="\n")


def _report(options: argparse.Namespace) -> None:
    records = read_records(options.records)
    if options.markdown:
        fill_page(options.markdown, records)
    if options.plot:
        write_plot(records, options.plot)
    if options.panel:
        parts = ("dense", "static-1-2", "sparse-16-8-0", "sparse-24-8-8")
        write_panel(Path(options.records), options.panel, parts)
    if options.json:
        options.json.write_text(to_json(records) + "\n")
    print(to_text(records))


def main(argv: list[str] | None = None) -> None:
    """Runs autoencoder, train, data, study or report."""
    parser = argparse.ArgumentParser(prog="python examples/miniature")
    actions = parser.add_subparsers(required=True)

    vae = actions.add_parser("autoencoder", help="train the autoencoder from nothing")
    vae.add_argument("out", help="file of its weights, ae.safetensors")
    vae.set_defaults(run=_autoencoder)

    train = actions.add_parser("train", help="train a dense model from nothing")
    train.add_argument("out", help="folder of weights, log and configuration")
    train.add_argument("--seed", type=int, default=0)
    train.epilog = f"{DENSE.steps} steps of {DENSE.batch_size} sequences, on one thread."
    train.set_defaults(run=_train)

    data = actions.add_parser("data", help="write training data for adapt, calibrate, evaluate")
    data.add_argument("out", help="folder of pictures and records.jsonl, to be made")
    data.add_argument("--count", type=int, default=256, help="pictures of each kind")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(run=_data)

    study = actions.add_parser("study", help="run the study, or what is missing of it")
    study.add_argument("out", help="folder of records, one for each part")
    study.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    study.add_argument("--models", type=int, nargs="+", default=[0, 1, 2], help="seeds of them")
    study.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    study.set_defaults(run=_study)

    report = actions.add_parser("report", help="tables and plots from the records")
    report.add_argument("records", help="folder of records, or their JSON file")
    report.add_argument("--markdown", type=Path, help="fill the tables into this page")
    report.add_argument("--plot", help="draw the curves, .svg or .png")
    report.add_argument("--panel", help="draw the pictures, .svg or .png; of a folder")
    report.add_argument("--json", type=Path, help="write all records as one JSON file")
    report.set_defaults(run=_report)

    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
