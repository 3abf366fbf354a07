# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .cases import CASES, CPU_DEFAULTS, Case
from .harness import WARMUP, Record, Roof, measure_roof
from .report import as_json, save, table
from .suites import Overhead, measure_block, measure_ops, measure_overhead

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUM_OPS = 6


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sparse-unified: error: bench: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparse-unified bench",
        description="Times the sparse FFN and its ops beside the dense FFN, a dense FFN of the "
        "active width and the official style of expert loop, interleaved in one process.",
    )
    parser.add_argument(
        "--device", default="cpu", help="device to measure; this release has kernels for the cpu"
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=sorted(CASES),
        metavar="NAME",
        help=f"shape by name, repeatable (default: {', '.join(CPU_DEFAULTS)}); "
        f"one of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--direction", choices=("fwd", "fwd_bwd", "all"), default="fwd", help="default: fwd"
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count (default: 30)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="save the records as JSON; without FILE print them instead of the table",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.device != "cpu":
        raise ValueError(
            f"bench: device must be 'cpu', the one with kernels in this release, got "
            f"{arguments.device!r}"
        )
    for name in ("repeats", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"bench: {name} must be at least 1, got {value}")
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).parent.is_dir()):
        raise ValueError(f"bench: --json must be a file in a directory that exists, got {target!r}")


@contextlib.contextmanager
def _rounds_bar(total: int) -> Iterator[Callable[[], object]]:
    """Counts rounds on stderr; without tqdm, which the core does not need, in silence."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit="round", leave=False) as bar:
        yield bar.update


def _measure(
    cases: list[Case], arguments: argparse.Namespace, roof: Roof
) -> tuple[list[Record], dict[str, Overhead]]:
    """The records of every case, and the share of the steps around its experts."""
    dtype = _DTYPES[arguments.dtype]
    directions = ("fwd", "fwd_bwd") if arguments.direction == "all" else (arguments.direction,)
    repeats = arguments.repeats
    rounds = len(cases) * (len(directions) + _NUM_OPS + 1) * (repeats + WARMUP)
    records: list[Record] = []
    overhead: dict[str, Overhead] = {}
    with _rounds_bar(rounds) as progress:
        for case in cases:
            # First, on a heap that other providers have not yet cut up: the steps are so short that
            # the page faults of a single buffer would be most of what is measured.
            overhead[case.name] = measure_overhead(case, dtype, repeats, progress)
            for direction in directions:
                records += measure_block(case, dtype, direction, roof, repeats, progress)
            records += measure_ops(case, dtype, roof, repeats, progress)
    return records, overhead


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints the table.

    Args:
        argv: arguments after `bench`; those of the process by default.

    Returns:
        Exit status 0.

    Raises:
        ValueError: an argument is out of range.
        SystemExit: an argument is unknown (status 2) or help was asked for (0).
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    roof = measure_roof(_DTYPES[arguments.dtype])
    cases = [CASES[name] for name in arguments.case or CPU_DEFAULTS]
    records, overhead = _measure(cases, arguments, roof)
    text = json.dumps(as_json(records, overhead, roof), indent=1)
    if arguments.json == "-":
        print(text)
        return 0
    print(table(records, overhead, roof))
    if arguments.json is not None:
        save(Path(arguments.json), text)
        print(f"\nsaved {arguments.json}")
    return 0
