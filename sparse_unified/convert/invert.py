# SPDX-License-Identifier: Apache-2.0
"""Sparse checkpoint -> the dense checkpoint it came from, bit for bit.

The sidecar gives the header of each dense file and the text of each JSON file as they were; the
weights come from the experts, so that tuned experts give the tuned dense FFN.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from sparse_unified._common import (
    Progress,
    Report,
    format_bytes,
    format_layers,
    format_table,
    list_some,
)
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import refuse_overlap
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.modes import AdaptConfig, MoEConfig
from sparse_unified.checkpoint.recipe import RECIPE
from sparse_unified.checkpoint.rewrite import Edit, gather, rewrite
from sparse_unified.checkpoint.safetensors_io import Header, TensorSpec
from sparse_unified.checkpoint.shapes import ffn_parts
from sparse_unified.checkpoint.sidecar import (
    EARLIER_SIDECAR,
    SIDECAR,
    Sidecar,
    parse_dense_headers,
    read_sidecar,
)
from sparse_unified.experts import ExpertLayout

WHAT = "invert"


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertReport(Report):
    """What an inversion wrote."""

    out: str
    component: str
    layers: tuple[int, ...]
    converted_by: str
    bytes_written: int
    seconds: float

    def to_text(self) -> str:
        rows = [
            ("written", self.out),
            ("component", self.component),
            ("layers made dense", format_layers(self.layers)),
            ("was converted by", self.converted_by),
            ("size", format_bytes(self.bytes_written)),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return format_table(rows)


def invert(
    sparse: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
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
    refuse_overlap(out, source.directory, what=WHAT)
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
    headers = parse_dense_headers(source.directory / SIDECAR, sidecar)
    experts = source.experts.get(sidecar.component, {})
    layers = tuple(sidecar.neuron_index)
    if tuple(experts) != layers:
        raise ValueError(
            f"{source.directory}: sparse {sidecar.component} layers must be "
            f"{format_layers(layers)} as {SIDECAR} says, got {format_layers(tuple(experts))}"
        )
    _check_tensors(source, sidecar, headers)

    edits = {}
    for layer, index in sidecar.neuron_index.items():
        position = np.empty_like(index)
        position[index] = np.arange(len(index))  # dense neuron -> place in expert order
        layout = experts[layer]
        for name in keys.PROJECTIONS:
            key = keys.dense_key(sidecar.component, layer, name)
            edits[key] = _join(source, sidecar.component, layer, layout, name, position)
    bytes_written = rewrite(
        source,
        out,
        edits,
        sidecar.texts,
        what=WHAT,
        headers=headers,
        rename={EARLIER_SIDECAR: SIDECAR},
        skip=(RECIPE, SIDECAR),
        progress=progress,
    )
    return InvertReport(
        out=str(out),
        component=sidecar.component,
        layers=layers,
        converted_by=sidecar.tool,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - start,
    )


def _join(
    source: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout,
    name: str,
    position: np.ndarray,
) -> Edit:
    """Returns one dense projection, put together from its experts."""
    prefix = keys.ffn_prefix(component, layer)
    specs = [source.spec(f"{prefix}{part}{name}.weight") for part in ffn_parts(layout)]
    dim = 1 if name == "down_proj" else 0
    shape = list(specs[0].shape)
    shape[dim] = len(position)
    entry = (keys.dense_key(component, layer, name), specs[0].dtype, tuple(shape))
    return Edit(entries=(entry,), blocks=lambda: gather(specs, dim, [position]))


def _split_part(sidecar: Sidecar, key: str) -> tuple[int, str] | None:
    """Returns (layer, projection) when dense tensor `key` is spread over experts, else None."""
    found = keys.find_ffn_key(key)
    if found is None or found[0] != sidecar.component or found[1] not in sidecar.neuron_index:
        return None
    return found[1], found[2].removesuffix(".weight")


def _check_tensors(source: Checkpoint, sidecar: Sidecar, headers: dict[str, Header]) -> None:
    """Every dense tensor must follow from the sparse file, and no sparse tensor be left over."""
    specs = source.specs
    kept: set[str] = set()
    split: set[tuple[int, str]] = set()
    for header in headers.values():
        for key, wanted in header.tensors.items():
            part = _split_part(sidecar, key)
            if part is None:
                got = specs.get(key)
                kept.add(key)
            else:
                got = _dense_spec(source, sidecar, *part)
                split.add(part)
            if got is None or (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
                have = f"{got.dtype} {list(got.shape)}" if got is not None else "nothing"
                raise ValueError(
                    f"{source.directory}: {key} must be {wanted.dtype} {list(wanted.shape)} as "
                    f"{SIDECAR} says, got {have}"
                )
    for layer, index in sidecar.neuron_index.items():
        width = source.ffns[sidecar.component][layer].intermediate_size
        lost = [name for name in keys.PROJECTIONS if (layer, name) not in split]
        if len(index) != width or lost:
            raise ValueError(
                f"{source.directory}: {SIDECAR} must describe three projections and {width} "
                f"neurons of layer {layer}, got {3 - len(lost)} and {len(index)}"
            )
    extra = [
        key
        for key in specs
        if key not in kept
        and ((ffn := keys.find_ffn_key(key)) is None or ffn[0] != sidecar.component)
    ]
    if extra:
        raise ValueError(
            f"{source.directory}: keys must be those {SIDECAR} describes, "
            f"got {list_some(extra)} too"
        )


def _dense_spec(
    source: Checkpoint, sidecar: Sidecar, layer: int, projection: str
) -> TensorSpec | None:
    if projection not in keys.PROJECTIONS:
        return None
    ffn = source.ffns[sidecar.component][layer]
    shape = (ffn.intermediate_size, ffn.hidden_size)
    if projection == "down_proj":
        shape = shape[::-1]
    first = source.spec(keys.router_key(sidecar.component, layer, "gate"))
    return TensorSpec(dtype=ffn.dtype, shape=shape, file=first.file, start=0, nbytes=0)
