# SPDX-License-Identifier: Apache-2.0
"""Whether everything that a conversion leaves alone is the same in two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sparse_unified._common import Progress, list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.layout import CONFIG
from sparse_unified.checkpoint.model_dir import VAE_FILE, Checkpoint
from sparse_unified.checkpoint.safetensors_io import CHUNK_BYTES, TensorSpec, read_bytes

# ? import ByteCounter

_MOE_FIELDS = {"num_experts", "num_shared_experts", "top_k", "num_experts_per_tok"}
_MOE_FIELDS |= set(keys.TRANSFORMED.values())
# Files besides the weights that decide what the model answers; those of the tokenizer go by the
# names that transformers gives the files of a Qwen2 tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MODEL_FILES = (VAE_FILE, "vit_config.json", "config.json", *_TOKENIZER_FILES)


class ByteCounter:
    """Counts compared bytes and tells a progress callback (done, total)."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        """Adds bytes that were compared."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total)


def compare_specs(got: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yields a sentence for missing and extra keys and for each other dtype or shape."""
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing:
        yield f"keys: all tensors beside the FFNs must be there, got no {list_some(missing)}"
    if extra:
        yield f"keys: tensors must be those of the dense checkpoint, got {list_some(extra)} too"
    for key in sorted(wanted.keys() & got.keys()):
        a, b = got[key], wanted[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{key}: must be {b.dtype} {list(b.shape)}, got {a.dtype} {list(a.shape)}"


def compare_tensors(
    got: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], counter: ByteCounter
) -> Iterator[str]:
    """Yields a sentence for each tensor of the same dtype and shape whose bytes differ."""
    for key in sorted(wanted.keys() & got.keys()):
        a, b = got[key], wanted[key]
        if a.nbytes != b.nbytes:
            continue
        first = _first_difference(a.file, a.start, b.file, b.start, a.nbytes)
        if first is not None:
            element = first // a.dtype.itemsize
            yield f"{key}: must be equal, got another value at element {element}"
        counter.advance(a.nbytes)


def compare_files(got: Checkpoint, wanted: Checkpoint) -> Iterator[str]:
    """Yields a sentence for each model file beside the weights that differs or only one has."""
    for name in _MODEL_FILES:
        a, b = got.directory / name, wanted.directory / name
        if not (a.exists() and b.exists()):
            if b.exists():
                yield f"{name}: file must be there as in {wanted.directory}, got nothing"
            elif a.exists():
                yield f"{name}: file must be absent as in {wanted.directory}, got one"
            continue
        sizes = a.stat().st_size, b.stat().st_size
        if sizes[0] != sizes[1]:
            yield f"{name}: file must have {sizes[1]} bytes, got {sizes[0]}"
        elif (first := _first_difference(a, 0, b, 0, sizes[0])) is not None:
            yield f"{name}: file must be equal, got another value at byte {first}"


def compare_configs(got: Checkpoint, wanted: Checkpoint) -> Iterator[str]:
    """Yields a sentence for each field of llm_config.json that differs beside those of the MoE."""
    a, b = got.llm_config, wanted.llm_config
    for field in sorted((a.keys() | b.keys()) - _MOE_FIELDS):
        left, right = a.get(field, "nothing"), b.get(field, "nothing")
        if left != right:
            yield f"{CONFIG}: {field} must be {right!r:.120}, got {left!r:.120}"


def _first_difference(a: Path, a_start: int, b: Path, b_start: int, nbytes: int) -> int | None:
    with a.open("rb", buffering=0) as left, b.open("rb", buffering=0) as right:
        buffers = [np.empty(min(nbytes, CHUNK_BYTES), dtype=np.uint8) for _ in range(2)]
        for start in range(0, nbytes, CHUNK_BYTES):
            x, y = (buffer[: min(CHUNK_BYTES, nbytes - start)] for buffer in buffers)
            read_bytes(left, a_start + start, x, what=str(a))
            read_bytes(right, b_start + start, y, what=str(b))
            if x.data != y.data:
                return start + int(np.flatnonzero(x != y)[0])
    return None
