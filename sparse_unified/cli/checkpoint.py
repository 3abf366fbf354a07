# SPDX-License-Identifier: Apache-2.0
"""convert, prune, verify, invert, info and mini write: commands on model directories."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from sparse_unified._common import Report, naming
from sparse_unified.analysis import FfnStatistics
from sparse_unified.analysis.criteria import Similarity
from sparse_unified.bagel.hub import push_to_hub, write_card
from sparse_unified.build import build_info
from sparse_unified.checkpoint import (
    Checkpoint,
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
    convert,
    info,
    invert,
    prune,
    verify,
)
from sparse_unified.checkpoint.files import check_target
from sparse_unified.checkpoint.scores import describe_scores, hash_stored_ffns
from sparse_unified.cli.console import Output, Usage, show_progress
from sparse_unified.cli.options import Flags, arguments, ratio
from sparse_unified.convert.info import memory
from sparse_unified.experts.keep import select_layers
from sparse_unified.mini.model import write_model

# convert


def add_convert(flags: Flags) -> None:
    flags.table("""
        DENSE  the dense model directory
        OUT    the directory to make; must not exist
        """)
    flags.of(
        convert,
        "num_experts top_k num_shared_experts layers component",
        num_experts={"metavar": "E"},
        top_k={"metavar": "K"},
        num_shared_experts={"metavar": "S"},
        layers="layers to split: middle (all but the first and last, the default), all, 1-26, or "
        "a list such as 1,4-6",
        component={"choices": ("gen", "und"), "help": "FFNs to split: gen (default) or und"},
    )
    ranking = flags.exclusive()
    ranking.table("""
        --scores FILE  importance of each neuron: a safetensors file with one tensor 'scores'
                       [num_layers, width], or one tensor [width] per layer named by its index, or
                       by component and index as in gen.3; without it, neurons are ranked by weight
                       magnitude
        """)
    ranking.of(convert, "seed", seed="rank neurons at random, from this seed")
    routing = flags.group("who goes where")
    routing.of(MoEConfig, "partition router_init time_router")
    routing.of(convert, "partition_seed")
    routing.table("""
        --stats FILE.safetensors  statistics of DENSE that calibrate gathered with --inputs, for
                                  coactivation and activation
        """)


def run_convert(options: argparse.Namespace) -> Report:
    """Splits the FFNs of DENSE into experts and writes the result to OUT, tensor by tensor.

    Weights stay as they are: neurons are reordered, routers are added, all else is copied. OUT
    appears complete or not at all.
    """
    is_needed = options.partition == "coactivation" or options.router_init == "activation"
    if is_needed != (options.stats is not None):
        raise Usage(
            "convert: --stats must come with --partition coactivation or --router-init activation, "
            "and these with --stats"
        )
    inputs: Mapping[int, Any] | None = None
    if is_needed:
        check_target(options.out, options.dense, options.stats)
        with naming(f"--stats: {options.stats}"):
            statistics = FfnStatistics.load(options.stats)
            statistics.check(Checkpoint(options.dense), options.component)
            kept = statistics.inputs(options.component)
        inputs = {key: x for key, x in kept.items() if isinstance(key, int)}
    with show_progress(options, "converting") as progress:
        return convert(**arguments(convert, options, inputs=inputs, progress=progress))


# prune


def add_prune(flags: Flags) -> None:
    flags.table("""
        MODEL  a model directory, dense, sparse or pruned
        OUT    the directory to make; must not exist
        --component und,gen!  which weights: understanding, generation, or both; both lose the same
                              heads, so that their keys and values go too
        --axis depth,width,heads  what to prune, in this order (default width)
        """)
    # Unset where not given, so that options that nothing looks at are refused.
    flags.of(
        PruneWidthConfig,
        "keep_ratio layers budget block_size",
        unset=True,
        keep_ratio={
            "type": ratio,
            "help": "share of the neurons, of the groups of heads and, by the similarity that "
            "--scores of calibrate hold, of the layers that stays, in (0, 1]",
        },
        layers="layers to make narrower or take heads from: all (default), middle, 1-26, 1,4-6",
    )
    flags.table("""
        --skip-layers A,B-C  layers to skip, with --axis depth (or --keep-ratio and --scores)
        """)
    part = {"dest": "skip_part", "help": "what of them to skip (default block)"}
    flags.of(SkipLayersConfig, "skip_part=part", unset=True, part=part)
    flags.exclusive().table("""
        --scores FILE  importance of neurons and heads: a safetensors file as for convert, with
                       tensors such as gen.3 [width] and gen.3.heads [groups]
        --criterion magnitude|random  without scores: rank by weight magnitude (default), or at
                                      random
        """)
    flags.of(prune, "seed", seed="of --criterion random")


def run_prune(options: argparse.Namespace) -> Report:
    """Leaves neurons, attention heads or layers of MODEL out and writes the rest to OUT.

    What stays, stays bit for bit; sparse_unified.json in OUT says what was done. OUT appears
    complete or not at all.
    """
    modes = [mode for axis in options.axis for mode in _modes(options, axis)]
    is_ranked = bool({"width", "heads"} & set(options.axis)) or options.skip_layers is None
    for name, is_used in (
        *((name, "depth" in options.axis) for name in ("skip_layers", "skip_part")),
        ("block_size", "width" in options.axis),
        *((name, is_ranked) for name in ("keep_ratio", "layers", "budget", "scores", "criterion")),
        ("seed", options.criterion == "random"),
    ):
        if getattr(options, name) is not None and not is_used:
            wanted = "--criterion random" if name == "seed" else "an --axis that it belongs to"
            raise Usage(f"--{name.replace('_', '-')} must be given with {wanted}, got none")
    seed = options.seed or 0 if options.criterion == "random" else None
    with show_progress(options, "pruning") as progress:
        return prune(
            options.model, options.out, modes, scores=options.scores, seed=seed, progress=progress
        )


def _modes(options: argparse.Namespace, axis: str) -> list[Any]:
    """Returns the configs of an axis, one per component."""
    by_similarity = axis == "depth" and options.skip_layers is None and options.keep_ratio
    if by_similarity and options.scores is None:
        raise Usage("--scores must be given with --axis depth and --keep-ratio, got none")
    kind, needed = {
        "depth": (SkipLayersConfig, "keep_ratio" if by_similarity else "skip_layers"),
        "width": (PruneWidthConfig, "keep_ratio"),
        "heads": (PruneHeadsConfig, "keep_ratio"),
    }[axis]
    if getattr(options, needed) is None:
        raise Usage(f"--{needed.replace('_', '-')} must be given with --axis {axis}, got none")
    given = arguments(kind, options)
    if axis == "depth":
        given |= {"layers": options.skip_layers, "part": options.skip_part}
    given = {name: value for name, value in given.items() if value is not None}
    if by_similarity:
        return [
            kind(**given | {"component": name, "layers": _redundant(options, name)})
            for name in options.component
        ]
    shared = axis == "heads" and len(options.component) == 2
    components = ("both",) if shared else options.component
    return [kind(**given | {"component": name}) for name in components]


def _redundant(options: argparse.Namespace, component: str) -> tuple[int, ...]:
    """Returns the layers that change the least of what passes through them, to be skipped."""
    layers, source = None, Checkpoint(options.model)
    own_hash = partial(hash_stored_ffns, source, component)
    describe_scores(options.scores, component, own_hash)  # refuses those of another model
    if options.layers is not None:
        layers = select_layers(options.layers, source.num_layers)
    part, ratio = options.skip_part or "block", options.keep_ratio
    found = Similarity.of_scores(options.scores).left_out(component, ratio, part, layers)
    if not found:
        raise Usage(f"--keep-ratio must leave a layer of {component} out, got {ratio:g}")
    return found


# verify, invert, info, mini write


def add_verify(flags: Flags) -> None:
    flags.table("""
        SPARSE  the sparse or pruned model directory
        --against DENSE!  the dense model directory
        """)
    flags.of(verify, "seed")


def run_verify(options: argparse.Namespace) -> Report:
    """Proves from the weights alone that the experts of SPARSE are the neurons of DENSE.

    Each is there once and bit for bit, every other tensor is the same, and with all experts active
    the FFNs compute the same. Of a pruned checkpoint, what is left is proved to be there and what
    is gone is listed. Exit status 1 when anything differs.
    """
    with show_progress(options, "verifying") as progress:
        return verify(options.sparse, options.against, seed=options.seed, progress=progress)


def add_invert(flags: Flags) -> None:
    flags.table("""
        SPARSE  a directory that convert wrote
        OUT     the directory to make; must not exist
        """)


def run_invert(options: argparse.Namespace) -> Report:
    """Writes the dense directory that convert made SPARSE from.

    Where experts were trained since, the dense FFNs hold the trained weights; routers are dropped.
    """
    with show_progress(options, "inverting") as progress:
        return invert(options.sparse, options.out, progress=progress)


def add_info(flags: Flags) -> None:
    flags.table("""
        [DIR]     a model directory
        --memory  show instead which devices each way of loading it fits, computed from the headers
        """)


def run_info(options: argparse.Namespace) -> Report:
    """Shows what a model directory holds, dense or sparse, and what disagrees in it.

    Reads headers only. Without DIR: version, ABI and build of the compiled library, and what it
    runs on. Exit status 1 when anything disagrees.
    """
    if options.dir is None:
        if options.memory:
            raise Usage("info: --memory must come with DIR, got none")
        return build_info()
    return memory(options.dir) if options.memory else info(options.dir)


def add_mini_write(flags: Flags) -> None:
    flags.parser.add_argument("task", choices=["scenes"])
    flags.table("OUT  model directory, for generate, convert, ...")


def run_mini_write(options: argparse.Namespace) -> Report:
    """Writes the trained model as a model directory, for every other command."""
    written = str(write_model(options.out))
    return Output(text=written, document={"model": written})


# card, push

_CARD = """
MODEL              a model directory
--base-model ID    the model it was made from, by its id on the hub
--license NAME     as the hub writes it, apache-2.0
"""


def add_card(flags: Flags) -> None:
    flags.table(_CARD)
    flags.table("--name ID  the id it will have on the hub")


def run_card(options: argparse.Namespace) -> Report:
    """Writes README.md of MODEL: what was done to it and what it holds. An older one is replaced.

    convert, prune and adapt put one without names of the hub in the place of their source's.
    """
    path = write_card(options.model, **_given(options, "name base_model license"))
    return Output(text=f"wrote {path}", document={"card": str(path)})


def add_push(flags: Flags) -> None:
    flags.table(_CARD)
    flags.table("""
        REPO            owner/name, made if it is not there
        --private       for you alone, if it is made
        --revision REV  branch to upload to
        """)


def run_push(options: argparse.Namespace) -> Report:
    """Uploads MODEL to REPO with a card of its own; the token is that of `hf auth login`."""
    given = _given(options, "private revision base_model license")
    url = push_to_hub(options.model, options.repo, **given)
    return Output(text=f"uploaded to {url}", document={"url": url})


def _given(options: argparse.Namespace, wanted: str) -> dict[str, Any]:
    return {name: value for name in wanted.split() if (value := getattr(options, name))}
