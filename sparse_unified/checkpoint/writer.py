# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors files as a stream, and copying files and byte ranges within the kernel."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import Progress
from sparse_unified.checkpoint.safetensors_file import DTYPE_NAMES, TensorSpec, as_bytes

CHUNK_BYTES = 8 << 20
# One call of the kernel copies at most this much, so that progress and Ctrl-C get their turn.
RANGE_BYTES = 64 << 20
_NO_RANGE_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}


class ByteCounter:
    """Counts written bytes and tells a progress callback (done, total)."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        """Adds bytes that were written."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total)


def build_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Returns the header text of a file that holds `(key, dtype, shape)` in this order.

    The text is padded with spaces so that the tensors start at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, dtype, shape in entries:
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns a whole safetensors file of CPU tensors, widest element types first.

    The same tensors and metadata give the same bytes, which the safetensors package does not
    promise for metadata of several entries.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header = build_header(
        [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered], metadata
    ).encode()
    data = (as_bytes(tensor.contiguous()).tobytes() for _, tensor in ordered)
    return b"".join([len(header).to_bytes(8, "little"), header, *data])


class FileWriter:
    """Writes one safetensors file front to back: the header, then tensors in its order.

    Nothing is buffered beyond what one call is given. Leaving the `with` block syncs the file.

    Args:
        path: the file to create.
        header: its header text.
        advance: called with the number of bytes after each piece that is written.
    """

    def __init__(self, path: Path, header: str, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._path = path
        self._stream: BinaryIO = path.open("xb", buffering=0)
        encoded = header.encode()
        self.write(np.frombuffer(len(encoded).to_bytes(8, "little") + encoded, dtype=np.uint8))

    def write(self, data: np.ndarray) -> None:
        """Appends the bytes of a contiguous array."""
        view = data.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), RANGE_BYTES):
            piece = view[start : start + RANGE_BYTES]
            done = 0
            while done < len(piece):
                done += os.write(self._stream.fileno(), piece[done:])
            self._advance(len(piece))

    def copy(self, spec: TensorSpec) -> None:
        """Appends the bytes of a tensor of another file."""
        with spec.file.open("rb", buffering=0) as source:
            copy_range(source, spec.start, spec.nbytes, self._stream, self._advance)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                os.fsync(self._stream.fileno())
        except OSError as failure:
            failure.filename = str(self._path)
            raise
        finally:
            self._stream.close()


def copy_range(
    source: BinaryIO,
    start: int,
    nbytes: int,
    target: BinaryIO,
    advance: Callable[[int], None],
) -> None:
    """Appends `nbytes` bytes of `source` from `start` to `target`, in the kernel where it can.

    Raises:
        RuntimeError: the source ends early.
    """
    position = start
    end = start + nbytes
    in_kernel = hasattr(os, "copy_file_range")
    while position < end:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(
                    source.fileno(),
                    target.fileno(),
                    min(end - position, RANGE_BYTES),
                    offset_src=position,
                )
            except OSError as error:
                if error.errno not in _NO_RANGE_COPY:
                    raise
            # Some file systems answer 0 where they cannot; reading decides whether it is the end.
            in_kernel = count > 0
        if count == 0:
            data = os.pread(source.fileno(), min(end - position, CHUNK_BYTES), position)
            if not data:
                raise RuntimeError(
                    f"{source.name}: file must not change while it is read, "
                    f"got its end at byte {position}"
                )
            view = memoryview(data)
            while view:
                view = view[os.write(target.fileno(), view) :]
            count = len(data)
        position += count
        advance(count)


def copy_file(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Copies the bytes of one file and syncs them."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        copy_range(reader, 0, os.fstat(reader.fileno()).st_size, writer, advance)
        os.fsync(writer.fileno())


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file, byte for byte as given, and syncs it."""
    with path.open("xb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
