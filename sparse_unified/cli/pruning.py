# SPDX-License-Identifier: Apache-2.0
"""prune: a smaller model directory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sparse_unified.cli import values
from sparse_unified.cli.console import Usage, add_common, check_output, show_progress, write_result

if TYPE_CHECKING:
    from sparse_unified.checkpoint.modes import Mode


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    prune = commands.add_parser(
        "prune",
        help="make a smaller checkpoint: narrower FFNs, fewer heads, skipped layers",
        description="Leaves neurons, attention heads or layers of MODEL out and writes the rest "
        "to OUT, tensor by tensor. What stays, stays bit for bit; sparse_unified.json in OUT says "
        "what was done. OUT appears complete or not at all.",
    )
    prune.add_argument("model", metavar="MODEL", help="a model directory, dense, sparse or pruned")
    prune.add_argument("out", metavar="OUT", help="the directory to make; must not exist")
    prune.add_argument(
        "--component",
        type=values.names("und", "gen"),
        required=True,
        metavar="und,gen",
        help="which weights: understanding, generation, or both; both lose the same heads, so "
        "that their keys and values go too",
    )
    prune.add_argument(
        "--axis",
        type=values.names("depth", "width", "heads"),
        default=("width",),
        metavar="depth,width,heads",
        help="what to prune, in this order (default width)",
    )
    prune.add_argument(
        "--keep-ratio",
        type=values.ratio,
        metavar="R",
        help="share of the neurons and of the groups of heads that stays, above 0 and at most 1",
    )
    prune.add_argument(
        "--layers",
        help="layers to make narrower or take heads from: all (default), middle, 1-26, 1,4-6",
    )
    prune.add_argument(
        "--budget",
        choices=("uniform", "global"),
        help="the share of each layer (uniform, the default), or of all layers together",
    )
    prune.add_argument(
        "--block-size",
        type=values.positive,
        metavar="N",
        help="neurons go in blocks of N: 1 (default), or 16 to 128",
    )
    prune.add_argument("--skip-layers", metavar="A,B-C", help="layers to skip, with --axis depth")
    prune.add_argument(
        "--skip-part",
        choices=("block", "attention", "ffn"),
        help="what of them to skip (default block)",
    )
    ranking = prune.add_mutually_exclusive_group()
    ranking.add_argument(
        "--scores",
        metavar="FILE",
        help="importance of neurons and heads: a safetensors file as for convert, with tensors "
        "such as gen.3 [width] and gen.3.heads [groups]",
    )
    ranking.add_argument(
        "--criterion",
        choices=("magnitude", "random"),
        help="without scores: rank by weight magnitude (default), or at random",
    )
    prune.add_argument("--seed", type=values.seed, metavar="N", help="of --criterion random")
    add_common(prune)
    prune.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from sparse_unified.checkpoint import prune

    check_output(options.json, "--json")
    modes = [mode for axis in options.axis for mode in _modes(options, axis)]
    _refuse_unused(options)
    seed = options.seed
    if options.criterion == "random" and seed is None:
        seed = 0
    with show_progress("pruning", "B", quiet=options.quiet) as progress:
        report = prune(
            options.model, options.out, modes, scores=options.scores, seed=seed, progress=progress
        )
    write_result(options.json, report.to_text(), report.to_json())
    return 0


def _modes(options: argparse.Namespace, axis: str) -> list[Mode]:
    from sparse_unified.checkpoint import (
        Part,
        PruneHeadsConfig,
        PruneWidthConfig,
        SkipLayersConfig,
    )
    from sparse_unified.experts import Budget

    components = options.component
    if axis == "depth":
        if options.skip_layers is None:
            raise Usage("--skip-layers must be given with --axis depth, got none")
        part = Part(options.skip_part or "block")
        return [
            SkipLayersConfig(component=name, layers=options.skip_layers, part=part)
            for name in components
        ]
    if options.keep_ratio is None:
        raise Usage(f"--keep-ratio must be given with --axis {axis}, got none")
    shared = {
        "layers": options.layers or "all",
        "keep_ratio": options.keep_ratio,
        "budget": Budget(options.budget or "uniform"),
    }
    if axis == "heads":
        name = "both" if len(components) == 2 else components[0]
        return [PruneHeadsConfig(component=name, **shared)]
    size = options.block_size or 1
    return [PruneWidthConfig(component=name, block_size=size, **shared) for name in components]


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raises Usage for an option that nothing of what is asked for looks at."""
    ranked = {"width", "heads"} & set(options.axis)
    needs = {
        "skip_layers": "depth" in options.axis,
        "skip_part": "depth" in options.axis,
        "block_size": "width" in options.axis,
        "seed": options.criterion == "random",
    }
    needs |= dict.fromkeys(("keep_ratio", "layers", "budget", "scores", "criterion"), bool(ranked))
    for name, used in needs.items():
        if getattr(options, name) is not None and not used:
            option = "--" + name.replace("_", "-")
            wanted = "--criterion random" if name == "seed" else "an --axis that it belongs to"
            raise Usage(f"{option} must be given with {wanted}, got {option} without")
