# SPDX-License-Identifier: Apache-2.0
"""How much memory a model directory takes on a device, in each way of loading it, computed.

Weights are those of the headers, byte for byte. What a step and the decoding of an image need
besides is estimated from the shapes of their largest tensors, see `working_bytes`; no part of the
table was measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_unified._common import Report, format_bytes, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_header

BUDGETS = (12, 16, 24, 32, 48, 80)  # GB of 10^9 bytes, of cards one can buy
_TEXT_TO_IMAGE_LACKS = ("vit_model.", "connector.", "vit_pos_embed.", "language_model.lm_head.")
_ROUTERS = ("gate.", "gate_shared.", "gate_img.")
_PACKED_SCALE_BYTES = 5  # of a row stored as int8: a scale and a zero point


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One way to load a model.

    Attributes:
        options: of `from_pretrained`.
        weights: bytes on the device, the autoencoder included. working: bytes beside them at the
            peak. host: bytes that stay in host memory.
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

    def to_text(self) -> str:
        headings = ("from_pretrained(...)", "weights", "working", "peak", "host")
        budgets = [f"{budget} GB" for budget in self.budgets]
        table: list[Sequence[object]] = [(*headings, *budgets)]
        for row in self.rows:
            peak = row.weights + row.working
            sizes = [format_bytes(n) for n in (row.weights, row.working, peak, row.host)]
            marks = ["fits" if budget in row.fits else "-" for budget in self.budgets]
            table.append((row.options, *sizes, *marks))
        what = f"{self.images} image{'s' * (self.images > 1)} of {self.size[0]} x {self.size[1]}"
        return f"memory for {what} with text guidance, computed, not measured\n" + format_table(
            table, header=True
        )


def memory(
    directory: str | os.PathLike[str],
    *,
    size: tuple[int, int] = (1024, 1024),
    images: int = 1,
    budgets: Sequence[int] = BUDGETS,
) -> MemoryReport:
    """Computes what a model directory takes on a device in each way of loading it.

    Args:
        size: height and width of the images, in pixels. images: drawn together.
        budgets: memories of devices, in GB of 10^9 bytes.

    Raises:
        ValueError: the directory is no readable model, or an argument is below 1.
    """
    for name, value in (("size", min(size)), ("images", images), ("budgets", min(budgets))):
        if value < 1:
            raise ValueError(f"memory: {name} must be at least 1, got {value}")
    source = Checkpoint(directory)
    vae = read_header(source.vae_file).tensors if source.vae_file.exists() else {}
    rows = []
    for task in ("all", "image"):
        for offload in ("none", "und"):
            for storage in (None, "int8"):
                rows.append(_row(source, vae, task, offload, storage, size=size, images=images))
    return MemoryReport(
        directory=str(directory),
        size=size,
        images=images,
        budgets=tuple(budgets),
        rows=tuple(_with_fits(row, budgets) for row in rows),
    )


def _row(
    source: Checkpoint,
    vae: dict[str, TensorSpec],
    task: str,
    offload: str,
    storage: str | None,
    *,
    size: tuple[int, int],
    images: int,
) -> MemoryRow:
    weights = sum(spec.nbytes for spec in vae.values())
    host = 0
    last = source.num_layers - 1
    lacks = (*_TEXT_TO_IMAGE_LACKS, *keys.module_prefixes(last, keys.ffn_modules("und")))
    for key, spec in source.specs.items():
        if task == "image" and key.startswith(lacks):
            continue
        ffn = keys.find_ffn_key(key)
        nbytes = spec.nbytes
        if ffn is not None and storage is not None and not ffn[2].startswith(_ROUTERS):
            nbytes = math.prod(spec.shape) + spec.shape[0] * _PACKED_SCALE_BYTES
        if ffn is not None and offload == "und" and ffn[0] == "und":
            host += nbytes
        else:
            weights += nbytes
    given = {"task": task, "offload": offload, "storage": storage}
    defaults = {"task": "all", "offload": "none", "storage": None}
    options = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
    return MemoryRow(
        options=", ".join(options) or "as it is",
        weights=weights,
        working=working_bytes(source, vae, storage, offload, size=size, images=images),
        host=host,
        fits=(),
    )


def working_bytes(
    source: Checkpoint,
    vae: dict[str, TensorSpec],
    storage: str | None,
    offload: str,
    *,
    size: tuple[int, int],
    images: int,
) -> int:
    """Estimates the bytes beside the weights, the larger of a denoising step and of decoding.

    With T tokens (two branches of all images), hidden D, FFN width I, top_k K of E experts and b
    bytes a number, a step holds 12 T D b for streams, norms and attention, and in an FFN the larger
    of 3 T I b (dense) and T K (D + I / E) b (sparse). An FFN that is unpacked or visits the device
    adds its 3 I D b. Decoding holds three maps of the widest layer at full resolution.
    """
    hidden = int(source.llm_config["hidden_size"])
    width = int(source.llm_config["intermediate_size"])
    embedding = source.specs["language_model.model.embed_tokens.weight"]
    number = embedding.dtype.itemsize
    tokens = 2 * images * ((size[0] // 16) * (size[1] // 16) + 2)
    ffn = 3 * tokens * width
    for layout in (own for layers in source.experts.values() for own in layers.values()):
        rows = tokens * (source.top_k or 0)
        ffn = max(ffn, rows * hidden + rows * width // layout.num_experts)
    step = 12 * tokens * hidden + ffn
    if storage is not None or offload == "und":
        step += 3 * width * hidden
    maps = [
        (max(spec.shape[:2]), spec.dtype.itemsize)
        for key, spec in vae.items()
        if key.startswith("decoder.up.0.") and len(spec.shape) == 4
    ]
    decode = max((3 * c * size[0] * size[1] * b for c, b in maps), default=0)
    return max(step * number, decode)


def _with_fits(row: MemoryRow, budgets: Sequence[int]) -> MemoryRow:
    peak = row.weights + row.working
    return MemoryRow(
        options=row.options,
        weights=row.weights,
        working=row.working,
        host=row.host,
        fits=tuple(budget for budget in budgets if peak <= budget * 10**9),
    )
