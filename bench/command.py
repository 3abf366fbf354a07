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

from .cases import CASES, CPU_DEFAULTS, CUDA_DEFAULTS, DIRECTIONS
from .measure import Session
from .peers import PEERS
from .report import Report, save
from .suites import BLOCK, PRUNED, Suite, block_suite, measure_overhead, op_suites, pruned_suite
from .suites import OPS as SINGLE
from .target import Target, find_target, measure_roof
from .tune import measure_variants

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = (BLOCK, *SINGLE, PRUNED)
_SAVED_IN = "bench-results"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sparse-unified: error: bench: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparse-unified bench",
        description="Measures what the device reaches at most, then times the sparse FFN and its "
        "ops beside the dense FFN and every other implementation that is installed, interleaved in "
        "one process; prints and saves the table.",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--case",
        action="append",
        choices=sorted(CASES),
        metavar="NAME",
        help=f"shape by name, repeatable (default on the cpu: {', '.join(CPU_DEFAULTS)}; on cuda: "
        f"{', '.join(CUDA_DEFAULTS)}); one of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=OPS,
        metavar="NAME",
        help=f"repeatable (default: all); {BLOCK} is the whole block, {PRUNED} half of the "
        f"blocks of a FFN; one of {', '.join(OPS)}",
    )
    parser.add_argument(
        "--provider",
        action="append",
        choices=tuple(PEERS),
        metavar="NAME",
        help="of the whole block, repeatable (default: all that can be had); one of "
        f"{', '.join(PEERS)}",
    )
    parser.add_argument(
        "--direction",
        choices=(*DIRECTIONS, "all"),
        default="fwd",
        help="forward, with backward, with backward and experts frozen (default: fwd)",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="time every configuration of the expert GEMMs beside the chosen one instead",
    )
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="default: float32 on the cpu, bfloat16 on cuda"
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count (default: 30)")
    parser.add_argument(
        "--graph", action="store_true", help="on cuda, replay graphs of what can be captured"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="save the records as JSON in FILE; without FILE print them instead of the table",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the measured providers; needs matplotlib"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"directory of DEVICE.json and DEVICE.txt (default, without --json: {_SAVED_IN})",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in ("repeats", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"bench: {name} must be at least 1, got {value}")
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).parent.is_dir()):
        raise ValueError(f"bench: --json must be a file in a directory that exists, got {target!r}")
    if arguments.out is not None and Path(arguments.out).is_file():
        raise ValueError(f"bench: --out must be a directory, got the file {arguments.out!r}")
    if arguments.graph and arguments.device == "cpu":
        raise ValueError("bench: --graph must go with a CUDA device, got 'cpu'")


@contextlib.contextmanager
def _rounds_bar() -> Iterator[Callable[[], object]]:
    """Counts rounds on stderr; without tqdm, which the core does not need, in silence."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(unit="round", leave=False) as bar:
        yield bar.update


def run(
    report: Report,
    *,
    cases: Sequence[str],
    dtype: torch.dtype,
    directions: Sequence[str],
    repeats: int,
    ops: Sequence[str] = OPS,
    providers: Sequence[str] | None = None,
    graph: bool = False,
    variants: bool = False,
    on_round: Callable[[], object] | None = None,
) -> None:
    """Adds to a report what the arguments ask for, case by case."""
    device = report.target.device
    session = Session(
        device=device,
        timer=report.target.timer,
        roof=report.roof,
        repeats=repeats,
        graph=graph,
        on_round=on_round,
    )
    single = [op for op in ops if op in SINGLE]
    for name in cases:
        case = CASES[name]
        if variants:
            for direction in directions:
                report.measured += measure_variants(case, dtype, direction, session)
            continue
        # First, on a heap that other providers have not yet cut up: the steps are so short that
        # the page faults of a single buffer would be most of what is measured.
        if not case.block_size and device.type == "cpu" and set(ops) == set(OPS):
            report.overhead[case.name] = measure_overhead(case, dtype, session)
        for direction in directions:
            suites: list[Suite] = []
            if case.block_size:
                if PRUNED in ops:
                    suites.append(pruned_suite(case, dtype, direction, device))
            else:
                if BLOCK in ops:
                    suites.append(block_suite(case, dtype, direction, device, providers=providers))
                suites += op_suites(case, dtype, direction, device, single)
            while suites:
                suite = suites.pop(0)
                report.measured += session.measure(suite.subject, suite.candidates, suite.baselines)


def start(target: Target, dtype: torch.dtype) -> Report:
    """Measures the roof; the report to add to."""
    before = target.state()
    return Report(target=target, roof=measure_roof(dtype, target), states={"before": before})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the table and saves it.

    Args:
        argv: arguments after `bench`; those of the process by default.

    Returns:
        Exit status 0.

    Raises:
        ValueError: an argument is out of range, or the device is not there.
        SystemExit: an argument is unknown (status 2) or help was asked for (0).
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    target = find_target(arguments.device)
    dtype = _DTYPES[arguments.dtype or ("bfloat16" if target.is_cuda else "float32")]
    report = start(target, dtype)
    with _rounds_bar() as on_round:
        run(
            report,
            cases=arguments.case or (CUDA_DEFAULTS if target.is_cuda else CPU_DEFAULTS),
            dtype=dtype,
            directions=DIRECTIONS if arguments.direction == "all" else (arguments.direction,),
            repeats=arguments.repeats,
            ops=arguments.op or OPS,
            providers=arguments.provider,
            graph=arguments.graph,
            variants=arguments.variants,
            on_round=on_round,
        )
    report.states["after"] = target.state()
    text = json.dumps(report.as_json(), indent=1)
    if arguments.json == "-":
        print(text)
    else:
        print(report.text())
    files = [] if arguments.json in (None, "-") else [(Path(arguments.json), text)]
    if arguments.out is not None or arguments.json is None:
        folder = Path(arguments.out or _SAVED_IN)
        folder.mkdir(parents=True, exist_ok=True)
        files += [
            (folder / f"{target.slug}.json", text),
            (folder / f"{target.slug}.txt", report.text()),
        ]
    for path, content in files:
        save(path, content)
        if arguments.json != "-":
            print(f"\nsaved {path}")
    if arguments.plot is not None:
        from .plots import plot

        plot(report.as_json(), Path(arguments.plot))
    return 0
