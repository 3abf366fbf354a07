# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

import torch

from sparse_unified._common import progress_bar
from sparse_unified.checkpoint.files import replace_file

from .cases import CASES, CPU_DEFAULTS, CUDA_DEFAULTS, DIRECTIONS, Case
from .measure import Run, Suite
from .peers import PEERS
from .plots import plot
from .report import as_json, as_text
from .suites import (
    BLOCK,
    CHOSEN,
    OPS,
    PRUNED,
    block_suite,
    op_suites,
    pruned_suite,
    set_variant,
    variant_suite,
)
from .target import find_target, measure_roof

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALL_OPS = (BLOCK, *OPS, PRUNED)
# Number of tokens at which ops are also measured alone.
_ALONE = {"cpu": 1024, "cuda": 4096}
_SAVED_IN = "bench-results"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sparse-unified: error: bench: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparse-unified bench",
        description="Measures the peak of the device, then times the sparse FFN and its ops beside "
        "the dense FFN and other implementations, interleaved in one process; prints the table, "
        "saves it, and draws it where matplotlib is installed.",
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    defaults = f"cpu: {', '.join(CPU_DEFAULTS)}; cuda: {', '.join(CUDA_DEFAULTS)}"
    for option, names, text in (
        ("--case", sorted(CASES), f"shape by name (default on {defaults})"),
        ("--op", ALL_OPS, f"default: all, but those of {', '.join(OPS)} for one number of tokens; "
         f"{BLOCK} is the whole block, {PRUNED} half of the blocks of a FFN"),
        ("--provider", tuple(PEERS), f"of the whole block (default: all); {', '.join(PEERS)}"),
    ):  # fmt: skip
        add(option, action="append", choices=names, metavar="NAME", help=f"repeatable; {text}")
    add(
        "--direction",
        choices=(*DIRECTIONS, "all"),
        default="fwd",
        help="forward, with backward, with backward and experts frozen (default: fwd)",
    )
    add(
        "--variants",
        action="store_true",
        help="time every configuration of the expert GEMMs beside the chosen one instead",
    )
    add("--dtype", choices=sorted(_DTYPES), help="default: float32 on the cpu, bfloat16 on cuda")
    add("--repeats", type=int, default=30, help="rounds that count (default: 30)")
    add(
        "--seconds",
        type=float,
        default=150.0,
        help="of measuring, after which groups get 5 rounds each (default: 150)",
    )
    add("--graph", action="store_true", help="on cuda, replay graphs of what can be captured")
    add("--threads", type=int, help="threads of torch (default: torch's choice)")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="save the records as JSON in FILE, table (.txt) and picture (.svg) beside it; without "
        "FILE print them instead of the table",
    )
    add(
        "--out",
        metavar="DIR",
        help=f"directory of DEVICE.json, .txt and .svg (default, without --json: {_SAVED_IN})",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in ("repeats", "threads", "seconds"):
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


def _suites(
    arguments: argparse.Namespace,
    case: Case,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
) -> Iterator[Suite]:
    """What the arguments ask for of a case; ops alone by default for one number of tokens."""
    is_whole = case.tokens != _ALONE[device.type]
    chosen = arguments.op or ((BLOCK, PRUNED) if is_whole else ALL_OPS)
    if arguments.variants:
        yield variant_suite(case, dtype, direction, device)
    elif case.block_size:
        if PRUNED in chosen:
            yield pruned_suite(case, dtype, direction, device)
    else:
        if BLOCK in chosen:
            yield block_suite(case, dtype, direction, device, providers=arguments.provider)
        yield from op_suites(case, dtype, direction, device, chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the arguments after `bench`, prints the table, saves and draws it.

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
    states = {"before": target.state()}
    run = Run(
        device=target.device,
        timer=target.timer,
        roof=measure_roof(dtype, target),
        repeats=arguments.repeats,
        graph=arguments.graph,
    )
    cases = arguments.case or (CUDA_DEFAULTS if target.is_cuda else CPU_DEFAULTS)
    directions = DIRECTIONS if arguments.direction == "all" else (arguments.direction,)
    left = list(product(cases, directions))
    files: list[Path] = []
    if arguments.json not in (None, "-"):
        files.append(Path(arguments.json))
    if arguments.out is not None or arguments.json is None:
        folder = Path(arguments.out or _SAVED_IN)
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{target.slug}.json")
    deadline = time.monotonic() + arguments.seconds
    with progress_bar("bench", "case") as advance:
        for done, (case, direction) in enumerate(left):
            for suite in _suites(arguments, CASES[case], dtype, direction, target.device):
                run.seconds = max(deadline - time.monotonic(), 0) / (len(left) - done)
                run.measure(suite)
                states["after"] = target.state()
                content = as_json(run, target, states)
                for path in files:  # after each suite: who runs out of time keeps what there is
                    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
            advance(done + 1, len(left))
    set_variant(CHOSEN)
    print(json.dumps(content, indent=1) if arguments.json == "-" else as_text(content))
    has_plots = importlib.util.find_spec("matplotlib") is not None
    is_drawn = any(r["op"] in (BLOCK, PRUNED) and r["direction"] == "fwd" for r in run.records)
    for path in files:
        replace_file(path.with_suffix(".txt"), (as_text(content) + "\n").encode())
        if has_plots and is_drawn:
            plot(content, path.with_suffix(".svg"))
    return 0
