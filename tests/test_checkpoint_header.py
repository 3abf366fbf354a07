# SPDX-License-Identifier: Apache-2.0
"""The safetensors reader believes nothing that the file does not hold."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_unified.checkpoint.files import create_file, write_all
from sparse_unified.checkpoint.safetensors_io import (
    DTYPES,
    build_header,
    encode_header,
    read_header,
    read_tensor,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.empty(0, 5, dtype=torch.float16),
    "scalar": torch.tensor(3, dtype=torch.int64),
}
F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_official_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(TENSORS)
    for key, spec in header.tensors.items():
        tensor = read_tensor(spec)
        assert tensor.dtype == TENSORS[key].dtype
        assert torch.equal(tensor, TENSORS[key])


def test_the_official_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()]
    with create_file(path) as target:
        write_all(target, encode_header(build_header(entries, {"ключ": "é\n"})))
        for tensor in TENSORS.values():
            write_all(target, tensor.reshape(-1).view(torch.uint8).numpy())
    loaded = load_file(path)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())
    assert read_header(path).metadata == {"ключ": "é\n"}


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    data = bytes(range(dtype.itemsize)) if name != "BOOL" else b"\1"
    entry = {"dtype": name, "shape": [1], "data_offsets": [0, dtype.itemsize]}
    path = write_raw(tmp_path / "x", {"t": entry}, data)
    tensor = read_tensor(read_header(path).tensors["t"])
    assert tensor.dtype == dtype
    assert tensor.view(torch.uint8).numpy().tobytes() == data


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "must start with"),
        (b"{", b"", "must be JSON"),
        (b'{"a": NaN}', b"", "must be JSON"),
        (b'{"a": 1, "a": 1}', b"", "key 'a' twice"),
        (b"{" + b'"a":{' * 100_000, b"", "must be JSON"),
        (b'{"\xff": 1}', b"", "must be UTF-8"),
        ({"a": 1}, b"", "entry must have"),
        ({"a": {**F32_2, "strides": [1]}}, b"12345678", "entry must have"),
        ({"a": {**F32_2, "dtype": "F31"}}, b"12345678", "dtype must be one of"),
        ({"a": {**F32_2, "shape": [-2]}}, b"12345678", "must be lists of sizes"),
        ({"a": {**F32_2, "shape": [True, 2]}}, b"12345678", "must be lists of sizes"),
        ({"a": {**F32_2, "shape": [2**80]}}, b"12345678", "must be lists of sizes"),
        ({"a": {**F32_2, "shape": [2**62] * 60}}, b"12345678", "data_offsets must span"),
        ({"a": {**F32_2, "shape": [3]}}, b"12345678", "data_offsets must span 12 bytes"),
        ({"a": {**F32_2, "data_offsets": [8, 0]}}, b"12345678", "data_offsets must be"),
        ({"a": {**F32_2, "data_offsets": [4, 12]}}, b"123456789012", "leave a hole"),
        ({"a": F32_2, "b": F32_2}, b"12345678", "overlap"),
        ({"a": F32_2}, b"1234567", "truncated"),
        ({"a": F32_2}, b"123456789", "longer than its header says"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings"),
    ],
)
def test_a_broken_header_is_refused(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [3, 16_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused_unread(
    length: int, tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "x", b"{}", length=length)
    with pytest.raises(ValueError, match="header length must be at most 2 in a file of 10 bytes"):
        read_header(path)
    os.truncate(path, 1 << 40)
    if length > 3:
        with pytest.raises(ValueError, match="header length must be at most 16000000 in a file"):
            read_header(path)


def test_what_is_no_file_with_a_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234567")
    for path, message in (
        (tmp_path / "x", "must hold an 8 byte header length"),
        (tmp_path / "nothing", "file must be readable"),
        (tmp_path, "file must be readable"),
    ):
        with pytest.raises(ValueError, match=message):
            read_header(path)


def test_tensors_far_into_a_large_file_are_found(tmp_path: Path) -> None:
    nbytes = 6 << 30  # a hole: takes no room on the disk
    rows = nbytes // 4096
    entries = [("first", torch.float16, (rows, 2048)), ("second", torch.float32, (rows, 1024))]
    head = encode_header(build_header(entries))
    path = tmp_path / "x.safetensors"
    path.write_bytes(head)
    os.truncate(path, len(head) + 2 * nbytes)
    specs = read_header(path).tensors
    assert [spec.start - len(head) for spec in specs.values()] == [0, nbytes]
    row = read_tensor(specs["second"].rows(rows - 1, rows))
    assert torch.equal(row, torch.zeros(1, 1024))
