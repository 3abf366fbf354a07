# SPDX-License-Identifier: Apache-2.0
"""Sparse checkpoint -> the dense checkpoint it came from, bit for bit.

The sidecar gives the header of each dense file and the text of each JSON file as they were; the
weights come from the experts, so that tuned experts give the tuned dense FFN.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparse_unified._common import Progress, Report, context, format_bytes, format_layers
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import refuse_overlap
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import AdaptConfig, MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.rewrite import Edit, gather, rewrite
from sparse_unified.checkpoint.shapes import ffn_parts, ffn_shapes
from sparse_unified.checkpoint.sidecar import EARLIER_SIDECAR, SIDECAR, read_sidecar


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertReport(Report):
    """What an inversion wrote."""

    out: str
    component: str
    layers: tuple[int, ...]
    converted_by: str
    bytes_written: int
    seconds: float

    def table(self) -> Sequence[Sequence[object]]:
        return [
            ("written", self.out),
            ("component", self.component),
            ("layers made dense", format_layers(self.layers)),
            ("was converted by", self.converted_by),
            ("size", format_bytes(self.bytes_written)),
            ("time", f"{self.seconds:.1f} s"),
        ]


@context("invert")
def invert(
    sparse: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress | None = None
) -> InvertReport:
    """Writes the dense directory that `convert` made `sparse` from.

    Files come back bit for bit where their tensors were not trained since; routers are dropped.
    A checkpoint converted twice (gen, then und) goes back one conversion at a time.

    Args:
        sparse: a directory with the `partition.safetensors` that `convert` wrote.
        out: the directory to make; it must not exist.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: the sidecar is missing, or tensors do not fit what it describes; nothing is
            written.
        RuntimeError: reading or writing failed; nothing is left under `out`.
    """
    start = time.perf_counter()
    source = Checkpoint(sparse)
    refuse_overlap(out, source.directory)
    sidecar = read_sidecar(source.directory / SIDECAR)
    # Training leaves the experts where they are.
    steps = source.recipe.steps if source.recipe is not None else ()
    changes = [step.config for step in steps if not isinstance(step.config, AdaptConfig)]
    last = changes[-1] if changes else None
    if last is not None and not (
        isinstance(last, MoEConfig) and last.component == sidecar.component
    ):
        raise ValueError(
            f"{source.directory}: last step in {RECIPE} must be the conversion to experts of "
            f"{sidecar.component}, which {SIDECAR} undoes, got a {last.mode} step of "
            f"{last.component}: what was pruned is gone"
        )
    component = sidecar.component
    edits: dict[str, Edit] = {}
    experts = source.experts.get(component, {})
    widths = {layer: layout.intermediate_size for layer, layout in experts.items()}
    if widths != {layer: len(index) for layer, index in sidecar.neuron_index.items()}:
        raise ValueError(
            f"{source.directory}: sparse {component} layers must be "
            f"{format_layers(tuple(sidecar.neuron_index))} as {SIDECAR} says, and as wide, got "
            f"{format_layers(tuple(experts))}"
        )
    for layer, index in sidecar.neuron_index.items():
        ffn, prefix = source.ffns[component][layer], keys.ffn_prefix(component, layer)
        position = np.empty_like(index)
        position[index] = np.arange(len(index))  # dense neuron -> place in expert order
        for rest, shape in ffn_shapes(len(index), ffn.hidden_size, component).items():
            parts = [source.spec(f"{prefix}{part}{rest}") for part in ffn_parts(ffn.ffn)]
            dim = int(rest.startswith("down_proj"))
            edits[prefix + rest] = Edit(
                entries=((prefix + rest, ffn.dtype, shape),),
                blocks=partial(gather, parts, dim, [position]),
            )
    # The dense tensors must be those that follow from the sparse file.
    split = tuple(keys.ffn_prefix(component, layer) for layer in experts)
    found = {
        key: (s.dtype, s.shape) for key, s in source.specs.items() if not key.startswith(split)
    }
    found |= {key: edit.entries[0][1:] for key, edit in edits.items()}
    tensors = [item for header in sidecar.headers.values() for item in header.tensors.items()]
    wanted = {key: (spec.dtype, spec.shape) for key, spec in tensors}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            got, rule = (
                f"{own[key][0]} {list(own[key][1])}" if key in own else "nothing"
                for own in (found, wanted)
            )
            raise ValueError(
                f"{source.directory}: {key} must be {rule} as {SIDECAR} says, got {got}"
            )
    bytes_written = rewrite(
        source,
        out,
        edits,
        sidecar.texts,
        headers=sidecar.headers,
        rename={EARLIER_SIDECAR: SIDECAR},
        skip=(RECIPE, SIDECAR),
        progress=progress,
    )
    return InvertReport(
        out=str(out),
        component=component,
        layers=tuple(sidecar.neuron_index),
        converted_by=sidecar.tool,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - start,
    )
