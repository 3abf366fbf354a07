# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint -> sparse checkpoint: neurons are permuted into experts, bit for bit.

Files are written front to back. Tensors that stay are copied as byte ranges; each projection of a
sparse layer is read, permuted and written as the official per-expert tensors in its place.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_unified._common import Progress, Report, format_bytes, format_layers, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.atomic import atomic_directory, refuse_overlap
from sparse_unified.checkpoint.convert_plan import plan_layouts
from sparse_unified.checkpoint.files import copy_files, list_files, require_room
from sparse_unified.checkpoint.index import rewrite_indices
from sparse_unified.checkpoint.layout import CONFIG
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.reader import Checkpoint, read_text
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.routing import Inputs, Routing, resolve_inputs
from sparse_unified.checkpoint.scores import Scores, resolve_scores
from sparse_unified.checkpoint.sidecar import (
    EARLIER_SIDECAR,
    SIDECAR,
    Sidecar,
    tool_version,
    write_sidecar,
)
from sparse_unified.checkpoint.split import Split, split_entries, write_split
from sparse_unified.checkpoint.writer import ByteCounter, FileWriter, build_header, write_text
from sparse_unified.experts import Partition, RouterInit

WHAT = "convert"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport(Report):
    """What a conversion wrote. Widths are in neurons, those of the widest layer.

    Attributes:
        expert_widths: of each layer; they differ where FFNs were pruned to different widths.
    """

    out: str
    component: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    num_shared_experts: int
    expert_width: int
    shared_width: int
    expert_widths: tuple[int, ...]
    scores: str
    partition: str
    router_init: str
    bytes_written: int
    seconds: float

    def to_text(self) -> str:
        least, most = min(self.expert_widths), max(self.expert_widths)
        width = f"{most}" if least == most else f"{least} to {most}"
        rows = [
            ("written", self.out),
            ("component", self.component),
            ("sparse layers", format_layers(self.layers)),
            (
                "experts",
                f"{self.num_experts}, {self.top_k} active, {width} neurons each",
            ),
            ("shared expert", f"{self.shared_width} neurons" if self.shared_width else "none"),
            ("neurons ranked by", self.scores),
            ("partition", self.partition),
            ("routers start at", self.router_init),
            ("size", format_bytes(self.bytes_written)),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return format_table(rows)


def convert(
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_experts: int,
    top_k: int,
    num_shared_experts: int = 0,
    layers: str | Sequence[int] = "middle",
    component: str = "gen",
    scores: Scores | None = None,
    seed: int | None = None,
    partition: Partition | str = Partition.SNAKE,
    router_init: RouterInit | str = RouterInit.ZERO,
    partition_seed: int = 0,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes a sparse version of a dense checkpoint directory.

    Each dense neuron goes to exactly one expert, dtypes stay, every other file is copied, and
    `partition.safetensors` keeps what `invert` needs. The directory appears complete or not at
    all.

    Args:
        dense: the dense model directory. One whose other component is already sparse is taken
            too, with the same num_experts, top_k and num_shared_experts.
        out: the directory to make; it must not exist.
        num_experts: E, routed experts of a layer; it must divide what the shared expert leaves.
        top_k: experts a token uses, 1 to E.
        num_shared_experts: S; the shared expert takes S * (I // (E + S)) neurons.
        layers: "middle", "all", "a-b", comma-separated parts of these, or indices.
        component: "gen" or "und".
        scores: importance of each neuron, `{layer: [I]}`, a tensor [num_layers, I], or a
            safetensors file with one tensor `scores` [num_layers, I] or tensors named by layer.
            Without scores and seed, neurons are ranked by weight magnitude.
        seed: rank neurons at random instead.
        partition, router_init: as in `MoEConfig`.
        partition_seed: of what these two draw.
        inputs: what the FFNs were given on calibration tokens, `{layer: [N, D]}` of the component
            or `{component: {layer: [N, D]}}`, N >= 8, any float dtype; must be given exactly
            where the partition is "coactivation" or the routers start at "activation".
        progress: called with (bytes written, bytes in all).

    Returns:
        a report of what was written.

    Raises:
        ValueError: an argument or the checkpoint is not as described; nothing is written.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(dense)
    refuse_overlap(out, source.directory, scores, what=WHAT)
    layouts = plan_layouts(
        source, num_experts, top_k, num_shared_experts, layers, component, what=WHAT
    )
    selected = tuple(layouts)
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        component=component,
        layers=selected,
        partition=partition,  # type: ignore[arg-type]
        router_init=router_init,  # type: ignore[arg-type]
        seed=partition_seed,
    )
    sizes = {layer: source.ffns[component][layer].hidden_size for layer in selected}
    inputs = resolve_inputs(inputs, config, sizes, what=WHAT)
    scores_of, origin = resolve_scores(
        source, component, selected, scores=scores, seed=seed, what=WHAT
    )
    routing = Routing(
        source=source,
        config=config,
        layouts=layouts,
        scores_of=scores_of,
        inputs=inputs,
        what=WHAT,
    )
    split = Split(
        component=component,
        layouts=layouts,
        index_of=routing.index_of,
        routers_of=routing.routers_of,
    )

    # Plan: the header of each weight file, the text of each JSON file, what is copied as it is.
    entries = {key: split_entries(split, key, spec) for key, spec in source.specs.items()}
    headers = {
        name: build_header(
            [entry for key in header.tensors for entry in entries[key]], header.metadata
        )
        for name, header in source.headers.items()
    }
    data_bytes = sum(
        math.prod(shape) * dtype.itemsize for part in entries.values() for _, dtype, shape in part
    )
    old_config = read_text(source.directory / CONFIG)
    fields = {
        "num_experts": num_experts,
        "num_shared_experts": num_shared_experts,
        "top_k": top_k,
        "num_experts_per_tok": top_k,
        keys.TRANSFORMED[component]: list(selected),
    }
    new_config = json.dumps(source.llm_config | fields, indent=2, ensure_ascii=False) + "\n"
    texts = {CONFIG: (old_config, new_config)} | rewrite_indices(
        source,
        {key: [new for new, _, _ in part] for key, part in entries.items()},
        data_bytes - sum(spec.nbytes for spec in source.specs.values()),
    )
    step = Step(config=config, scores=origin, tool=tool_version())
    new_texts = {name: new for name, (_, new) in texts.items()}
    new_texts[RECIPE] = (source.recipe or Recipe()).then(step).to_json()
    if source.recipe is not None:
        texts[RECIPE] = (read_text(source.directory / RECIPE), new_texts[RECIPE])
    others = list_files(source.directory, skip={*headers, *new_texts}, what=WHAT)
    total = data_bytes + sum(8 + len(header.encode()) for header in headers.values())
    total += sum(file.nbytes for file in others)
    counter = ByteCounter(total, progress)

    with atomic_directory(out, what=WHAT) as partial:
        require_room(partial, total, what=WHAT)
        copy_files(others, partial, rename={SIDECAR: EARLIER_SIDECAR}, advance=counter.advance)
        for name, text in headers.items():
            with FileWriter(partial / name, text, counter.advance) as writer:
                write_split(split, source.headers[name], writer)
        for name, new in new_texts.items():
            write_text(partial / name, new)
        arguments = {
            "num_experts": num_experts,
            "top_k": top_k,
            "num_shared_experts": num_shared_experts,
            "layers": list(selected),
            "component": component,
            "scores": origin,
            "partition": config.partition.value,
            "router_init": config.router_init.value,
            "partition_seed": config.seed,
        }
        sidecar = Sidecar(
            component=component,
            neuron_index={layer: routing.index_of(layer) for layer in selected},
            arguments=arguments,
            weight_files={name: header.text for name, header in source.headers.items()},
            texts={name: old for name, (old, _) in texts.items()},
            tool=tool_version(),
        )
        write_sidecar(partial / SIDECAR, sidecar)
        # A last look through the reader's eyes, before the directory gets its name.
        if Checkpoint(partial).moe is None:
            raise RuntimeError(f"{WHAT}: {partial} must read as sparse, got a dense checkpoint")
    return ConvertReport(
        out=str(out),
        component=component,
        layers=selected,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        expert_width=max(layout.expert_width for layout in layouts.values()),
        shared_width=max(layout.shared_width for layout in layouts.values()),
        expert_widths=tuple(layout.expert_width for layout in layouts.values()),
        scores=origin,
        partition=config.partition.value,
        router_init=config.router_init.value,
        bytes_written=counter.done,
        seconds=time.perf_counter() - start,
    )
