# SPDX-License-Identifier: Apache-2.0
"""How much memory a model directory takes on a device, in each way of loading it, computed.

Weights are those of the headers, byte for byte. What a step and the decoding of an image need
besides is estimated from the shapes of their largest tensors, see `_working_bytes`; no part of the
table was measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from sparse_unified._common import Report, check_int, context, format_bytes
from sparse_unified.bagel.config import LLMConfig
from sparse_unified.bagel.loading import Task, unneeded
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header

BUDGETS = (12, 16, 24, 32, 48, 80)  # GB of 10^9 bytes, of cards one can buy
_PACKED_SCALE_BYTES = 5  # of a row stored as int8: a scale and a zero point


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One way to load a model, in bytes: of weights, beside them at the peak, and in host memory.

    Attributes:
        options: of `from_pretrained`.
        fits: budgets, in GB, that hold weights and working memory.
    """

    options: str
    weights: int
    working: int
    host: int
    fits: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport(Report):
    """What fits where, for images of one size."""

    directory: str
    size: tuple[int, int]
    images: int
    budgets: tuple[int, ...]
    rows: tuple[MemoryRow, ...]

    def title(self) -> str:
        what = f"{self.images} image{'s' * (self.images > 1)} of {self.size[0]} x {self.size[1]}"
        return f"memory for {what} with text guidance, computed, not measured"

    def headings(self) -> Sequence[str]:
        names = ("from_pretrained(...)", "weights", "working", "peak", "host")
        return (*names, *(f"{budget} GB" for budget in self.budgets))

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (
                row.options,
                *map(format_bytes, (row.weights, row.working, row.weights + row.working, row.host)),
                *("fits" if budget in row.fits else "-" for budget in self.budgets),
            )
            for row in self.rows
        ]


@context("memory")
def memory(
    directory: str | os.PathLike[str], *, size: tuple[int, int] = (1024, 1024), images: int = 1
) -> MemoryReport:
    """Computes what a model directory takes on a device in each way of loading it.

    Args:
        directory: a model directory.
        size: height and width of the images, in pixels.
        images: drawn together.

    Raises:
        ValueError: the directory is no readable model, or an argument is below 1.
    """
    check_int("size", min(size), 1)
    check_int("images", images, 1)
    source = Checkpoint(directory)
    vae = read_header(source.vae_file).tensors if source.vae_file.exists() else {}
    rows = []
    for task, offload, storage in product(("all", "image"), ("none", "und"), (None, "int8")):
        weights, host = _weight_bytes(source, task, offload, storage)
        weights += sum(spec.nbytes for spec in vae.values())
        is_whole_ffn = storage is not None or offload == "und"
        working = _working_bytes(source, vae, is_whole_ffn, size, images)
        given = [("task", task, "all"), ("offload", offload, "none"), ("storage", storage, None)]
        options = [f"{name}={value!r}" for name, value, default in given if value != default]
        row = MemoryRow(
            options=", ".join(options) or "as it is",
            weights=weights,
            working=working,
            host=host,
            fits=tuple(budget for budget in BUDGETS if weights + working <= budget * 10**9),
        )
        rows.append(row)
    return MemoryReport(
        directory=str(directory), size=size, images=images, budgets=BUDGETS, rows=tuple(rows)
    )


def _weight_bytes(
    source: Checkpoint, task: str, offload: str, storage: str | None
) -> tuple[int, int]:
    """Returns the bytes of the weights on the device and in host memory."""
    lacks = unneeded(LLMConfig.from_json(source.llm_config), Task(task))
    on_device = on_host = 0
    for key, spec in source.specs.items():
        ffn, nbytes = keys.find_ffn_key(key), spec.nbytes
        if key.startswith(lacks):
            continue
        if ffn is not None and storage is not None and not keys.ROUTER_KEY.fullmatch(ffn[2]):
            nbytes = math.prod(spec.shape) + spec.shape[0] * _PACKED_SCALE_BYTES
        if ffn is not None and ffn[0] == offload:
            on_host += nbytes
        else:
            on_device += nbytes
    return on_device, on_host


def _working_bytes(
    source: Checkpoint,
    vae: Mapping[str, TensorSpec],
    is_whole_ffn: bool,
    size: tuple[int, int],
    images: int,
) -> int:
    """Estimates the bytes beside the weights, the larger of a denoising step and of decoding.

    With T tokens (two branches of all images), hidden D, FFN width I, top_k K of E experts and b
    bytes a number, a step holds 12 T D b for streams, norms and attention, and in an FFN the larger
    of 3 T I b (dense) and T K (D + I / E) b (sparse). An FFN that is unpacked or visits the device
    (`is_whole_ffn`) adds its 3 I D b. Decoding holds three maps of the widest layer at full
    resolution.
    """
    hidden = int(source.llm_config["hidden_size"])
    width = int(source.llm_config["intermediate_size"])
    number = source.spec("language_model.model.embed_tokens.weight").dtype.itemsize
    tokens = 2 * images * ((size[0] // 16) * (size[1] // 16) + 2)
    ffn = 3 * tokens * width
    for layout in (own for layers in source.experts.values() for own in layers.values()):
        rows = tokens * (source.top_k or 0)
        ffn = max(ffn, rows * hidden + rows * width // layout.num_experts)
    step = 12 * tokens * hidden + ffn + 3 * width * hidden * is_whole_ffn
    maps = [
        3 * max(spec.shape[:2]) * size[0] * size[1] * spec.dtype.itemsize
        for key, spec in vae.items()
        if key.startswith("decoder.up.0.") and len(spec.shape) == 4
    ]
    return max(step * number, *maps, 0)
