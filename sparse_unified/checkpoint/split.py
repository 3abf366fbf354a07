# SPDX-License-Identifier: Apache-2.0
"""What stands in the sparse file where a tensor of the dense file stood, and writing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.moves import expert_ranges, to_experts
from sparse_unified.checkpoint.safetensors_file import Header, TensorSpec, as_bytes
from sparse_unified.checkpoint.writer import FileWriter
from sparse_unified.experts import ExpertLayout

Entry = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which FFNs are split, and how.

    Attributes:
        component: "gen" or "und".
        layouts: layer -> expert ranges, ascending.
        index_of: layer -> neuron_index [I] int64.
        routers_of: layer -> router weights by name.
    """

    component: str
    layouts: Mapping[int, ExpertLayout]
    index_of: Callable[[int], np.ndarray]
    routers_of: Callable[[int], Mapping[str, Tensor]]

    def projection_of(self, key: str) -> tuple[int, str] | None:
        """Returns (layer, projection) when the dense tensor `key` is split, else None."""
        found = keys.find_ffn_key(key)
        if found is None or found[0] != self.component or found[1] not in self.layouts:
            return None
        return found[1], found[2].removesuffix(".weight")


def split_entries(split: Split, key: str, spec: TensorSpec) -> list[Entry]:
    """Returns (key, dtype, shape) of each tensor that takes the place of dense tensor `key`.

    Each expert's part of a projection, in expert order; the routers come before gate_proj.
    """
    part = split.projection_of(key)
    if part is None:
        return [(key, spec.dtype, spec.shape)]
    layer, projection = part
    layout = split.layouts[layer]
    entries: list[Entry] = []
    if projection == "gate_proj":
        hidden = spec.shape[1]
        for name in keys.router_names(split.component):
            rows = 1 if name == "gate_shared" else layout.num_experts
            entries.append(
                (keys.router_key(split.component, layer, name), spec.dtype, (rows, hidden))
            )
    for expert, start, stop in expert_ranges(layout):
        width = stop - start
        shape = (spec.shape[0], width) if projection == "down_proj" else (width, spec.shape[1])
        entries.append(
            (keys.expert_key(split.component, layer, expert, projection), spec.dtype, shape)
        )
    return entries


def write_split(split: Split, header: Header, writer: FileWriter) -> None:
    """Writes what takes the place of each tensor of one dense file, in `split_entries` order."""
    for key, spec in header.tensors.items():
        part = split.projection_of(key)
        if part is None:
            writer.copy(spec)
            continue
        layer, projection = part
        layout = split.layouts[layer]
        if projection == "gate_proj":
            routers = split.routers_of(layer)
            for name in keys.router_names(split.component):
                writer.write(as_bytes(routers[name].contiguous()))
        for piece in to_experts(spec, projection, split.index_of(layer), layout):
            writer.write(piece)
