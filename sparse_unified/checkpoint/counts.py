# SPDX-License-Identifier: Apache-2.0
"""What the decoder layers of a component cost: parameters, bytes, arithmetic, cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from sparse_unified._common import format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.safetensors_io import TensorSpec

_TITLES = {
    "parameters": "parameters",
    "bytes": "bytes",
    "flops_per_token": "FLOPs per token",
    "flops_per_pair": "FLOPs of attention per pair",
    "kv_bytes_per_token": "cached bytes per token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The decoder layers of one component, or of several added up.

    Attributes:
        parameters, bytes: of all weights.
        flops_per_token: 2 per weight of the projections, FFNs and routers that a token runs
            through; idle experts do not count.
        flops_per_pair: 4 * query heads * head_dim of all layers: what attention takes per pair of
            a token and one it sees, beside the projections.
        kv_bytes_per_token: keys and values that a token leaves in a context.
    """

    parameters: int = 0
    bytes: int = 0
    flops_per_token: int = 0
    flops_per_pair: int = 0
    kv_bytes_per_token: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


def count_weight(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Counts:
    """Returns what one weight of a decoder layer costs; `name` is its module's, as in `q_proj`."""
    size = math.prod(shape)
    is_matrix = len(shape) == 2
    rows = shape[0] if is_matrix and name in ("q_proj", "k_proj", "v_proj") else 0
    return Counts(
        parameters=size,
        bytes=size * dtype.itemsize,
        # The two routers of und blocks take different tokens.
        flops_per_token=2 * size if is_matrix and name != "gate_img" else 0,
        flops_per_pair=4 * rows if name == "q_proj" else 0,
        kv_bytes_per_token=0 if name == "q_proj" else rows * dtype.itemsize,
    )


def count_tensors(
    specs: Mapping[str, TensorSpec],
    sizes: Mapping[str, Sequence[int]],
    component: str,
    top_k: int | None,
) -> Counts:
    """Returns what the decoder layers of a component cost with tensors of these sizes."""
    counts = Counts()
    for key, shape in sizes.items():
        match = keys.LAYER_KEY.fullmatch(key)
        if match is None or keys.component_of(match[2]) != component:
            continue
        module = match[2].rpartition(".")[0].rpartition(".")[2]
        own = count_weight(module.removesuffix(keys.SUFFIXES["gen"]), specs[key].dtype, shape)
        expert = keys.EXPERT_KEY.search(match[2])
        if expert is not None and top_k is not None and int(expert[1]) >= top_k:
            own = Counts(parameters=own.parameters, bytes=own.bytes)  # as many are idle
        counts += own
    return counts


def format_counts(before: Counts, after: Counts) -> str:
    """Lays out what was and what is left, side by side."""
    rows: list[Sequence[object]] = [("in the decoder layers", "before", "after", "left")]
    for name, title in _TITLES.items():
        old, new = getattr(before, name), getattr(after, name)
        left = f"{100 * new / old:.1f} %" if old else "-"
        rows.append((title, f"{old:,}", f"{new:,}", left))
    return format_table(rows, header=True)
