# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: headers read strictly, tensors read alone, files written as a stream.

A file is `u64 header length | JSON header | tensor bytes`. The header is believed only if every
tensor lies inside the file, tensors neither overlap nor leave holes, and each takes exactly the
bytes that its shape and dtype say. Nothing is unpickled, and nothing mapped into memory: a file
that another process cuts short is an error, not a crash. A tensor is read only from the file that
its header was read from: one that was replaced or rewritten since is refused.

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import StrPath, context
from sparse_unified.checkpoint import files

# The format allows 100 MB, which is 1.5 million tensors and takes a minute to check.
MAX_HEADER_BYTES = 16_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WIDEST = max(dtype.itemsize for dtype in DTYPES.values())
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies: from byte `start` of `file`, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stamp: files.Stamp | None = None  # of the file when its header was read

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> TensorSpec:
        """Returns where rows `start` to `stop` of the tensor lie, a tensor of their own."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + start * row_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: tensors in the order of their bytes, and the text they were read from."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    text: str


def read_header(path: StrPath) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
        ValueError: the file cannot be opened, is truncated, or its header breaks a rule.
    """
    path = files.to_path(path, "file")
    with files.open_source(path) as stream, context(path):
        stamp = files.stamp_of(os.fstat(stream.fileno()))
        size = stamp[2]
        if size < 8:
            raise ValueError(f"file must hold an 8 byte header length, got {size} bytes")
        length = int.from_bytes(stream.read(8), "little")
        limit = min(size - 8, MAX_HEADER_BYTES)
        if length > limit:
            raise ValueError(
                f"header length must be at most {limit} in a file of {size} bytes, got {length}"
            )
        try:
            text = stream.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"header must be UTF-8, got {error.reason}") from error
    return parse_header(path, text, stamp)


def parse_header(path: Path, text: str, stamp: files.Stamp | None = None) -> Header:
    """Checks header `text` of the file `path`, whose size `stamp` tells; None without a file."""
    with context(path):
        if not text.startswith("{"):
            raise ValueError(f"header must start with '{{', got {text[:8]!r}")
        try:
            entries = files.loads_strict(text, finite=True)
        except ValueError as error:
            raise ValueError(f"header must be JSON with distinct keys, got {error}") from error
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError(f"__metadata__ must map strings to strings, got {metadata!r:.120}")
        start = position = 8 + len(text.encode())
        found = [_parse_entry(key, entry) for key, entry in entries.items()]
        tensors = {}
        # Tensors must tile the data: each starts where the one before it ends.
        for begin, nbytes, key, dtype, shape in sorted(found, key=lambda entry: entry[:2]):
            if start + begin != position:
                overlaps = start + begin < position
                raise ValueError(
                    f"data_offsets of {key!r:.120} must start at {position - start}, got {begin}, "
                    f"which would {'overlap the tensor before it' if overlaps else 'leave a hole'}"
                )
            tensors[key] = TensorSpec(
                dtype=dtype, shape=shape, file=path, start=position, stamp=stamp
            )
            position += nbytes
        if stamp is not None and position != stamp[2]:
            state = "truncated" if stamp[2] < position else "longer than its header says"
            raise ValueError(
                f"file must hold {position} bytes as its header says, got {stamp[2]}; it is {state}"
            )
    return Header(tensors=tensors, metadata=metadata, text=text)


def _parse_entry(key: str, entry: Any) -> tuple[int, int, str, torch.dtype, tuple[int, ...]]:
    """Returns where a tensor begins in the data, its bytes, key, dtype and shape."""

    def refuse(rule: str, value: object) -> NoReturn:
        raise ValueError(f"tensor {key!r:.120}: {rule}, got {value!r:.120}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse("entry must have data_offsets, dtype, shape", entry)
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        refuse(f"dtype must be one of {', '.join(DTYPES)}", name)
    # Sizes past int64 cannot be tensors; refusing them here bounds every later product and message.
    for value in (shape, offsets):
        sizes = isinstance(value, list) and len(value) <= 64
        if not sizes or not all(type(size) is int and 0 <= size < 2**63 for size in value):
            refuse("shape and data_offsets must be lists of sizes", value)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("data_offsets must be [begin, end]", offsets)
    nbytes = math.prod(shape) * DTYPES[name].itemsize
    if offsets[1] - offsets[0] != nbytes:
        expected = f"{nbytes} bytes" if nbytes < 2**63 else "more bytes than there are"
        refuse(f"data_offsets must span {expected} for {name} {shape!r:.120}", offsets)
    if math.prod(max(size, 1) for size in shape) * _WIDEST >= 2**63:
        refuse("shape must have strides below 2^63, empty or not", shape)
    return offsets[0], nbytes, key, DTYPES[name], tuple(shape)


def read_bytes(stream: io.FileIO, start: int, target: np.ndarray) -> None:
    """Fills a contiguous array from byte `start` of an open file; RuntimeError where it ends."""
    view = target.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        try:
            stream.seek(start + done)
            count = stream.readinto(view[done:])
        except OSError as error:
            raise RuntimeError(
                f"{stream.name}: file must stay readable, got {error.strerror}"
            ) from error
        if count == 0:
            raise files.cut_short(stream, start + done)
        done += count


def read_tensor(spec: TensorSpec) -> Tensor:
    """Returns the tensor of `spec` on the CPU, in memory of its own."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    with files.open_source(spec.file, spec.stamp) as stream:
        read_bytes(stream, spec.start, as_bytes(tensor))
    return tensor


def read_words(spec: TensorSpec) -> np.ndarray:
    """Returns a tensor as words of its element size: its bits, whatever they stand for."""
    return as_bytes(read_tensor(spec)).view(WORDS[spec.dtype.itemsize]).reshape(spec.shape)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Returns the memory of a contiguous CPU tensor as a flat uint8 array, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def build_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Returns the header text of a file that holds `(key, dtype, shape)` in this order, padded so
    that the tensors start at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, dtype, shape in entries:
        end = position + math.prod(shape) * dtype.itemsize
        name = DTYPE_NAMES[dtype]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def encode_header(text: str) -> bytes:
    """Returns the bytes in front of the tensors of a file: the length of a header and its text."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns a whole safetensors file of CPU tensors, widest element types first.

    The same tensors and metadata give the same bytes, which the safetensors package does not
    promise for metadata of several entries.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered]
    header = encode_header(build_header(entries, metadata))
    data = (as_bytes(tensor.contiguous()).tobytes() for _, tensor in ordered)
    return b"".join([header, *data])


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file of CPU tensors, complete or not at all, over one that was there."""
    files.replace_file(path, encode_tensors(tensors, metadata))


def load_tensors(path: StrPath, *, kind: str, version: str) -> Header:
    """Reads the header of a file whose metadata must say `format` and `format_version`."""
    header = read_header(path)
    form = header.metadata.get("format"), header.metadata.get("format_version")
    if form != (kind, version):
        raise ValueError(f"{path}: format must be {kind} {version}, got {form!r:.120}")
    return header
