# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint -> sparse checkpoint: neurons are permuted into experts, nothing is computed.

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

import numpy as np
import torch

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.atomic import atomic_directory
from sparse_unified.checkpoint.ffn import list_some
from sparse_unified.checkpoint.files import copy_files, list_files, refuse_nesting, require_room
from sparse_unified.checkpoint.index import rewrite_indices
from sparse_unified.checkpoint.layout import CONFIG
from sparse_unified.checkpoint.modes import MoEConfig
from sparse_unified.checkpoint.reader import Checkpoint, read_text
from sparse_unified.checkpoint.recipe import RECIPE, Recipe, Step
from sparse_unified.checkpoint.report import Report, format_bytes, format_layers, format_table
from sparse_unified.checkpoint.scores import Scores, resolve_scores
from sparse_unified.checkpoint.sidecar import (
    EARLIER_SIDECAR,
    SIDECAR,
    Sidecar,
    tool_version,
    write_sidecar,
)
from sparse_unified.checkpoint.split import Split, split_entries, write_split
from sparse_unified.checkpoint.surroundings import require_surroundings
from sparse_unified.checkpoint.writer import (
    ByteCounter,
    FileWriter,
    Progress,
    build_header,
    write_text,
)
from sparse_unified.partition import ExpertLayout, select_layers, snake_partition

WHAT = "convert"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes a sparse version of a dense checkpoint directory.

    Each dense neuron goes to exactly one expert, routers start at zero, dtypes stay, every other
    file is copied, and `partition.safetensors` keeps what `invert` needs. The directory appears
    complete or not at all.

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
        progress: called with (bytes written, bytes in all).

    Returns:
        a report of what was written.

    Raises:
        ValueError: an argument or the checkpoint is not as described; nothing is written.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(dense)
    refuse_nesting(source.directory, out, what=WHAT)
    layouts = _check_arguments(source, num_experts, top_k, num_shared_experts, layers, component)
    selected = tuple(layouts)
    scores_of, origin = resolve_scores(
        source, component, selected, scores=scores, seed=seed, what=WHAT
    )

    indices: dict[int, np.ndarray] = {}

    def index_of(layer: int) -> np.ndarray:
        if layer not in indices:
            indices[layer] = snake_partition(scores_of(layer), layouts[layer]).numpy()
        return indices[layer]

    split = Split(component=component, layouts=layouts, index_of=index_of)

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
    config = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        component=component,
        layers=selected,
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
        }
        sidecar = Sidecar(
            component=component,
            neuron_index={layer: index_of(layer) for layer in selected},
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
        bytes_written=counter.done,
        seconds=time.perf_counter() - start,
    )


def _check_arguments(
    source: Checkpoint,
    num_experts: int,
    top_k: int,
    num_shared_experts: int,
    layers: str | Sequence[int],
    component: str,
) -> dict[int, ExpertLayout]:
    if component not in keys.FFN_NAMES:
        raise ValueError(f"{WHAT}: component must be gen or und, got {component!r}")
    require_surroundings(source)
    ffns = source.ffns.get(component, {})
    if not ffns:
        raise ValueError(
            f"{source.directory}: keys must hold {component} FFNs "
            f"({keys.dense_key(component, 0, 'gate_proj')} and so on), got none"
        )
    moe = source.moe
    if moe is not None and component in moe.layers:
        raise ValueError(
            f"{source.directory}: {component} FFNs must all be dense, got sparse layers "
            f"{format_layers(list(moe.layers[component]))}; invert gives the dense files back"
        )
    selected = select_layers(layers, source.num_layers)
    if layers in ("all", "middle"):
        selected = tuple(layer for layer in selected if layer in ffns) or selected
    skipped = [layer for layer in selected if layer not in ffns]
    if skipped:
        raise ValueError(
            f"{WHAT}: layers must have a {component} FFN, got {list_some(skipped)}, which skip it"
        )
    dtypes = {ffns[layer].dtype for layer in selected} - set(_DTYPES)
    if dtypes:
        raise ValueError(
            f"{source.directory}: FFN dtype must be one of "
            f"{', '.join(map(str, _DTYPES))}, got {dtypes.pop()}"
        )
    layouts = {}
    for layer in selected:
        try:
            layouts[layer] = ExpertLayout(
                intermediate_size=ffns[layer].intermediate_size,
                num_experts=num_experts,
                num_shared_experts=num_shared_experts,
            )
        except ValueError as error:
            at = f"{component} layer {layer}: " if source.held is not None else ""
            raise ValueError(f"{at}{error}") from error
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise ValueError(f"{WHAT}: top_k must be 1 to num_experts = {num_experts}, got {top_k!r}")
    # The config has one set of counts for both components.
    wanted = (num_experts, num_shared_experts, top_k)
    if moe is not None and (moe.num_experts, moe.num_shared_experts, moe.top_k) != wanted:
        raise ValueError(
            f"{WHAT}: num_experts, num_shared_experts and top_k must be {moe.num_experts}, "
            f"{moe.num_shared_experts} and {moe.top_k} as in the component that is sparse "
            f"already, got {num_experts}, {num_shared_experts} and {top_k}"
        )
    return layouts
