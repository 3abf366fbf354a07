# SPDX-License-Identifier: Apache-2.0
"""Strict reading of safetensors headers, and reading of tensor bytes, without any unpickling.

A file is `u64 header length | JSON header | tensor bytes`. The header is believed only if every
tensor lies inside the file, tensors neither overlap nor leave holes, and each takes exactly the
bytes that its shape and dtype say.

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sparse_unified.checkpoint import strict_json

MAX_HEADER_BYTES = 100_000_000

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
_WIDEST = max(dtype.itemsize for dtype in DTYPES.values())
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies: `nbytes` bytes from byte `start` of `file`, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def rows(self, start: int, stop: int) -> TensorSpec:
        """Returns where rows `start` to `stop` of the tensor lie, a tensor of their own."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return TensorSpec(
            dtype=self.dtype,
            shape=(stop - start, *self.shape[1:]),
            file=self.file,
            start=self.start + start * row_bytes,
            nbytes=(stop - start) * row_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: tensors in the order of their bytes, and the text they were read from."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    text: str


def require_regular(path: Path) -> None:
    """Raises ValueError for what never ends or waits for a writer: devices, pipes and sockets.

    Links are followed, as those of a hub's cache are; OSError where there is nothing to follow.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: file must be a regular file, got {stat.filemode(mode)}")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a safetensors file.

    Returns:
        the tensors in the order of their bytes, the metadata, and the header text as it stands.

    Raises:
        ValueError: the file cannot be opened, is truncated, or its header breaks a rule of the
            format; the message names the rule and what was found.
    """
    path = Path(path)
    try:
        require_regular(path)
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            text = _read_text(path, stream, size)
    except OSError as error:
        raise ValueError(f"{path}: file must be readable, got {error.strerror}") from error
    return parse_header(path, text, data_bytes=size - 8 - len(text.encode()))


def parse_header(path: Path, text: str, *, data_bytes: int | None = None) -> Header:
    """Checks header `text` of the file `path`, whose tensors take `data_bytes` bytes.

    Without `data_bytes` the size of the data is believed as the header gives it.
    """
    entries = _parse_json(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(
            f"{path}: __metadata__ must map strings to strings, got {_short(metadata)}"
        )
    data_start = 8 + len(text.encode())
    tensors = {key: _parse_entry(path, key, entry, data_start) for key, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))

    # Tensors must tile the data: each starts where the one before it ends.
    position = data_start
    for key, spec in tensors.items():
        if spec.start != position:
            what = "overlap the tensor before it" if spec.start < position else "leave a hole"
            raise ValueError(
                f"{path}: data_offsets of {_short(key)} must start at {position - data_start}, "
                f"got {spec.start - data_start}, which would {what}"
            )
        position += spec.nbytes
    if data_bytes is not None and position - data_start != data_bytes:
        state = "truncated" if data_bytes < position - data_start else "longer than its header says"
        raise ValueError(
            f"{path}: file must hold {position - data_start} bytes of tensors as its header says, "
            f"got {data_bytes}; it is {state}"
        )
    return Header(tensors=tensors, metadata=metadata, text=text)


def read_bytes(stream: BinaryIO, start: int, target: np.ndarray, *, what: str) -> None:
    """Fills `target`, a contiguous array, from byte `start` of an open file.

    Raises:
        RuntimeError: the file ends early, as it does when another process cuts it short.
    """
    view = target.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        count = os.preadv(stream.fileno(), [view[done:]], start + done)
        if count == 0:
            raise RuntimeError(
                f"{what}: file must not change while it is read, got its end at byte {start + done}"
            )
        done += count


def read_tensor(spec: TensorSpec, *, what: str) -> Tensor:
    """Returns the tensor of `spec` on the CPU, in memory of its own."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    with spec.file.open("rb") as stream:
        read_bytes(stream, spec.start, as_bytes(tensor), what=what)
    return tensor


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Returns the memory of a contiguous CPU tensor as a flat uint8 array, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _read_text(path: Path, stream: BinaryIO, size: int) -> str:
    if size < 8:
        raise ValueError(f"{path}: file must hold an 8 byte header length, got {size} bytes")
    length = int.from_bytes(stream.read(8), "little")
    limit = min(size - 8, MAX_HEADER_BYTES)
    if length > limit:
        raise ValueError(
            f"{path}: header length must be at most {limit} in a file of {size} bytes, got {length}"
        )
    try:
        return stream.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: header must be UTF-8, got {error.reason}") from error


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    if not text.startswith("{"):
        raise ValueError(f"{path}: header must start with '{{', got {_short(text[:8])}")
    try:
        entries = strict_json.loads(text, finite=True)
    except ValueError as error:
        raise ValueError(f"{path}: header must be JSON with distinct keys, got {error}") from error
    assert isinstance(entries, dict)
    return entries


def _parse_entry(path: Path, key: str, entry: object, data_start: int) -> TensorSpec:
    where = f"{path}: tensor {_short(key)}"
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ValueError(
            f"{where}: entry must have {', '.join(sorted(fields))}, got {_short(entry)}"
        )
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {_short(name)}")
    if not _is_sizes(shape):
        raise ValueError(f"{where}: shape must be a list of sizes, got {_short(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets must be [begin, end], got {_short(offsets)}")
    dtype = DTYPES[name]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{where}: data_offsets must span {_short(nbytes)} bytes for {name} {_short(shape)}, "
            f"got {offsets[1] - offsets[0]}"
        )
    if math.prod(max(size, 1) for size in shape) * _WIDEST >= 2**63:
        raise ValueError(
            f"{where}: shape must have strides below 2^63, empty or not, got {_short(shape)}"
        )
    return TensorSpec(
        dtype=dtype, shape=tuple(shape), file=path, start=data_start + offsets[0], nbytes=nbytes
    )


def _is_sizes(value: object) -> bool:
    # Sizes past int64 cannot be tensors; refusing them here bounds every later product and message.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
