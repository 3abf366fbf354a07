# SPDX-License-Identifier: Apache-2.0
"""convert, verify, invert, info: commands on model directories."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage, add_common, check_output, show_progress, write_result

if TYPE_CHECKING:
    from sparse_unified.checkpoint.routing import Inputs


def add_commands(commands: Any) -> None:
    """Adds the four commands to the parser."""
    _add_convert(commands)

    verify = commands.add_parser(
        "verify",
        help="prove that a checkpoint is a dense one, reordered or pruned",
        description="Proves from the weights alone that the experts of SPARSE are the neurons of "
        "DENSE, each once and bit for bit, that every other tensor is the same, and that with all "
        "experts active the FFNs compute the same. Of a pruned checkpoint, what is left is proved "
        "to be there and what is gone is listed. Exit status 1 when anything differs.",
    )
    verify.add_argument("sparse", metavar="SPARSE", help="the sparse or pruned model directory")
    verify.add_argument(
        "--against", metavar="DENSE", required=True, help="the dense model directory"
    )
    verify.add_argument(
        "--seed",
        type=values.seed,
        default=0,
        help="of the random input of the numeric check (default 0)",
    )
    add_common(verify)
    verify.set_defaults(run=_run_verify)

    invert = commands.add_parser(
        "invert",
        help="give the dense checkpoint back, bit for bit",
        description="Writes the dense directory that convert made SPARSE from. Where experts were "
        "trained since, the dense FFNs hold the trained weights; routers are dropped.",
    )
    invert.add_argument("sparse", metavar="SPARSE", help="a directory that convert wrote")
    invert.add_argument("out", metavar="OUT", help="the directory to make; must not exist")
    add_common(invert)
    invert.set_defaults(run=_run_invert)

    info = commands.add_parser(
        "info",
        help="show what a model directory holds, or what this build is, and what disagrees",
        description="Shows what a model directory holds, dense or sparse, and what disagrees in "
        "it. Reads headers only. Without DIR: version, ABI and build of the compiled library, and "
        "what it runs on. Exit status 1 when anything disagrees.",
    )
    info.add_argument("directory", metavar="DIR", nargs="?", help="a model directory")
    info.add_argument(
        "--memory",
        action="store_true",
        help="show instead which devices each way of loading it fits, computed from the headers",
    )
    add_common(info)
    info.set_defaults(run=_run_info)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a sparse checkpoint from a dense one",
        description="Splits the FFNs of DENSE into experts and writes the result to OUT, tensor "
        "by tensor. Weights stay as they are: neurons are reordered, routers are added, all else "
        "is copied. OUT appears complete or not at all.",
    )
    convert.add_argument("dense", metavar="DENSE", help="the dense model directory")
    convert.add_argument("out", metavar="OUT", help="the directory to make; must not exist")
    convert.add_argument(
        "--num-experts", type=int, required=True, metavar="E", help="routed experts of a layer"
    )
    convert.add_argument(
        "--top-k", type=int, required=True, metavar="K", help="experts a token uses, 1 to E"
    )
    convert.add_argument(
        "--num-shared-experts",
        type=int,
        default=0,
        metavar="S",
        help="width of the shared expert, in experts (default 0: none)",
    )
    convert.add_argument(
        "--layers",
        default="middle",
        help="layers to split: middle (all but the first and last, the default), all, 1-26, or "
        "a list such as 1,4-6",
    )
    convert.add_argument(
        "--component",
        default="gen",
        choices=("gen", "und"),
        help="FFNs to split: generation (default) or understanding",
    )
    ranking = convert.add_mutually_exclusive_group()
    ranking.add_argument(
        "--scores",
        metavar="FILE",
        help="importance of each neuron: a safetensors file with one tensor 'scores' [num_layers, "
        "width], or one tensor [width] per layer named by its index, or by component and index "
        "as in gen.3; without it, neurons are ranked by weight magnitude",
    )
    ranking.add_argument(
        "--seed", type=values.seed, metavar="N", help="rank neurons at random, from this seed"
    )
    routing = convert.add_argument_group("who goes where")
    routing.add_argument(
        "--partition",
        choices=("snake", "random", "coactivation"),
        default="snake",
        help="neurons dealt by rank, in turn (snake, the official way and the default), at random, "
        "or those together that fire together",
    )
    routing.add_argument(
        "--router-init",
        choices=("zero", "random", "activation"),
        default="zero",
        help="what routers start from: zero (the official way and the default), small random "
        "weights, or a fit to how much each expert gives on a token",
    )
    routing.add_argument(
        "--partition-seed",
        type=values.seed,
        default=0,
        metavar="N",
        help="of what these two draw (default 0)",
    )
    routing.add_argument(
        "--stats",
        metavar="FILE.safetensors",
        help="statistics of DENSE that calibrate gathered with --inputs, for coactivation and "
        "activation",
    )
    add_common(convert)
    convert.set_defaults(run=_run_convert)


def _run_convert(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint import convert
    from sparse_unified.checkpoint.atomic import refuse_overlap

    check_output(options.json, "--json")
    needing = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in (("partition", "coactivation"), ("router_init", "activation"))
        if getattr(options, name) == value
    ]
    if needing and options.stats is None:
        raise Usage(f"convert: {' and '.join(needing)} must come with --stats, got none")
    if options.stats is not None and not needing:
        raise Usage(
            "convert: --stats must come with --partition coactivation or --router-init activation, "
            "got neither"
        )
    inputs = None
    if options.stats is not None:
        refuse_overlap(options.out, options.dense, options.stats, what="convert")
        inputs = _read_inputs(options.stats, options.dense, options.component)
    with show_progress("converting", "B", quiet=options.quiet) as progress:
        report = convert(
            options.dense,
            options.out,
            num_experts=options.num_experts,
            top_k=options.top_k,
            num_shared_experts=options.num_shared_experts,
            layers=options.layers,
            component=options.component,
            scores=options.scores,
            seed=options.seed,
            partition=options.partition,
            router_init=options.router_init,
            partition_seed=options.partition_seed,
            inputs=inputs,
            progress=progress,
        )
    write_result(options.json, report.to_text(), report.to_json())
    return 0


def _read_inputs(path: str, dense: str, component: str) -> Inputs:
    """Returns the inputs that a statistics file keeps, checked to be of the model directory."""
    from sparse_unified.analysis import FfnStatistics
    from sparse_unified.analysis.checkpoint_hash import check_against_checkpoint
    from sparse_unified.checkpoint import Checkpoint

    statistics = FfnStatistics.load(path)
    try:
        check_against_checkpoint(statistics, Checkpoint(dense), component)
        kept = statistics.inputs(component)
    except ValueError as error:
        raise ValueError(f"--stats: {path}: {error}") from error
    return {key: x for key, x in kept.items() if isinstance(key, int)}


def _run_verify(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint import verify

    check_output(options.json, "--json")
    with show_progress("verifying", "B", quiet=options.quiet) as progress:
        report = verify(options.sparse, options.against, seed=options.seed, progress=progress)
    write_result(options.json, report.to_text(), report.to_json())
    return 0 if report.ok else 1


def _run_invert(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint import invert

    check_output(options.json, "--json")
    with show_progress("inverting", "B", quiet=options.quiet) as progress:
        report = invert(options.sparse, options.out, progress=progress)
    write_result(options.json, report.to_text(), report.to_json())
    return 0


def _run_info(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint import info

    check_output(options.json, "--json")
    if options.directory is None:
        if options.memory:
            raise Usage("info: --memory must come with DIR, got none")
        from sparse_unified.build import build_info

        build = build_info()
        write_result(options.json, build.to_text(), build.to_json())
        return 1 if build.problems else 0
    if options.memory:
        from sparse_unified.checkpoint.memory import memory

        table = memory(options.directory)
        write_result(options.json, table.to_text(), table.to_json())
        return 0
    report = info(options.directory)
    write_result(options.json, report.to_text(), report.to_json())
    return 1 if report.problems else 0
