# SPDX-License-Identifier: Apache-2.0
"""Files say what they hold and no more is believed; the keys decide what is sparse."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import LAYER, edit_config, edit_weights, make_dense
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor

from sparse_unified.checkpoint import Checkpoint, convert
from sparse_unified.checkpoint.files import create_file, write_all
from sparse_unified.checkpoint.safetensors_io import (
    DTYPES,
    build_header,
    encode_header,
    read_header,
    read_tensor,
)
from sparse_unified.experts import ExpertLayout

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    convert(make_dense(root / "dense"), root / "sparse", num_experts=4, top_k=2)
    return root / "sparse"


@pytest.fixture
def sparse(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "sparse"))


def test_ema_is_preferred_to_other_weight_files(tmp_path: Path) -> None:
    directory = make_dense(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(b"not read")
    assert list(Checkpoint(directory).headers) == ["ema.safetensors"]
    (directory / "model.safetensors").unlink()
    (directory / "ema.safetensors").rename(directory / "model.safetensors")
    assert list(Checkpoint(directory).headers) == ["model.safetensors"]


def test_the_keys_say_which_layers_are_sparse(sparse: Path) -> None:
    edit_config(sparse, num_experts_per_tok=None, transformed_und=False)  # as the released ones
    checkpoint = Checkpoint(sparse)
    layout = ExpertLayout(intermediate_size=96, num_experts=4, shared_intermediate_size=0)
    assert checkpoint.experts == {"gen": {1: layout, 2: layout}}
    assert checkpoint.top_k == 2
    assert checkpoint.shapes["gen"][1].ffn == layout
    assert checkpoint.shapes["gen"][0].ffn == checkpoint.shapes["und"][1].ffn == 96


def test_transformed_true_means_every_layer(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    convert(dense, tmp_path / "s", num_experts=4, top_k=2, layers="all")
    edit_config(tmp_path / "s", transformed_gen=True)
    assert list(Checkpoint(tmp_path / "s").experts["gen"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 3}, "top_k must .*got 3, 2"),
        ({"top_k": 50, "num_experts_per_tok": None}, "top_k must .*got 50"),
        ({"top_k": 0, "num_experts_per_tok": 0}, "top_k must .*got 0"),
        ({"top_k": True, "num_experts_per_tok": True}, "top_k must .*got True"),
        ({"top_k": None, "num_experts_per_tok": None}, "top_k must .*got none"),
        ({"num_experts": 8}, "num_experts must be 4.*got 8"),
        ({"num_experts": None}, "num_experts must be 4.*got nothing"),
        ({"num_shared_experts": 1}, "num_shared_experts must give the 0 .*got 1"),
        ({"num_shared_experts": None}, "num_shared_experts must .*got nothing"),
        ({"transformed_gen": None}, r"transformed_gen must be \[1, 2\].*got nothing"),
        ({"transformed_gen": True}, r"transformed_gen must be \[1, 2\].*got True"),
        ({"transformed_gen": [1]}, r"transformed_gen must be \[1, 2\].*got \[1\]"),
        ({"transformed_gen": "1-2"}, r"transformed_gen must be \[1, 2\].*got '1-2'"),
        ({"transformed_gen": [1, 2.0]}, r"transformed_gen must be \[1, 2\].*got \[1, 2.0\]"),
        ({"transformed_und": [1]}, r"transformed_und must be false or absent.*got \[1\]"),
        ({"intermediate_size": 95}, "intermediate_size .*got 96 neurons in layer 0, not 95"),
        ({"hidden_size": 8}, "hidden_size must .*16, got 8"),
        ({"num_hidden_layers": 3}, "num_hidden_layers .*got 96 neurons in layer 3, not 0"),
        ({"num_hidden_layers": 6}, "num_hidden_layers .*got 0 neurons in layer 4, not 96"),
    ],
)
def test_a_config_that_disagrees_with_the_keys_is_refused(
    fields: dict[str, Any], message: str, sparse: Path
) -> None:
    edit_config(sparse, **fields)
    with pytest.raises(ValueError, match=message):
        _ = Checkpoint(sparse).experts


def _drop(*names: str) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        for name in names:
            del weights[LAYER + name]

    return edit


def _set(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Weights], None]:
    return lambda weights: weights.update({LAYER + name: torch.zeros(*shape, dtype=dtype)})


def _rename(old: str, new: str) -> Callable[[Weights], None]:
    return lambda weights: weights.update({LAYER + new: weights.pop(LAYER + old)})


EXPERT_3 = [f"experts.3.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop(*EXPERT_3), "gate.weight must have a row for each of the 3 experts .* got 4"),
        (_drop(EXPERT_3[1]), "must be those of 4 experts, got no experts.3.up_proj.weight"),
        (_drop("gate.weight"), "gate.weight must be a matrix .* got nothing"),
        (_drop("gate_shared.weight"), "got no gate_shared.weight"),
        (_rename(EXPERT_3[0], "experts.03.gate_proj.weight"), "got no experts.3.gate_proj.weight"),
        (_rename("gate_shared.weight", "router.weight"), "got .* router.weight too"),
        (_set("experts.999999.up_proj.weight", 24, 16), "for each of the 5 experts .* got 4"),
        (_set("gate_img.weight", 4, 16), "got gate_img.weight too"),
        (_set("shared_expert.up_proj.weight", 9, 16), "got shared_expert.up_proj.weight too"),
        (_set("experts.3.up_proj.weight", 23, 16), r"\[23, 16\], not \[24, 16\]"),
        (_set("experts.3.up_proj.weight", 24, 16, dtype=torch.float16), "share one floating dtype"),
        (_set("gate.weight", 5, 16), "for each of the 4 experts .* got 5"),
        (_set("gate.weight", 0, 16), r"gate.weight must be a matrix .* got shape \[0, 16\]"),
        (_set("gate_shared.weight", 2, 16), r"\[2, 16\], not \[1, 16\]"),
    ],
)
def test_missing_extra_and_renamed_tensors_are_named(
    edit: Callable[[Weights], None], message: str, sparse: Path
) -> None:
    edit_weights(sparse, edit)
    with pytest.raises(ValueError, match=message):
        _ = Checkpoint(sparse).experts


def test_an_index_and_its_shards_have_to_agree(tmp_path: Path) -> None:
    directory = make_dense(tmp_path / "m", num_shards=2)
    index = directory / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    first, file = next(iter(whole.items()))
    for weight_map, message in [
        ({**whole, "ghost": file}, "got 'ghost' not in"),
        ({k: f for k, f in whole.items() if k != first}, f"got {first!r} in"),
        ({**whole, "ghost": "gone.safetensors"}, "file must be readable"),
        ({}, "weight_map must map keys to files"),
        *(
            ({**whole, first: name}, "must be a plain name in the same directory")
            for name in ("../m/ema.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "", 3, None)
        ),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(message, Checkpoint, directory)


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, match in (
        (tmp_path, r"must hold ema\.safetensors or model\.safetensors or one"),
        (tmp_path / "nothing", "checkpoint must be a directory, got nothing there"),
        (tmp_path / "file", "checkpoint must be a directory, got a file"),
    ):
        refused(match, Checkpoint, path)


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b"[" * 100_000])
def test_a_broken_config_is_refused(text: bytes, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_dense(tmp_path / "m"))
    (tmp_path / "m" / "llm_config.json").write_bytes(text)
    refused(r"llm_config.json: file must", lambda: checkpoint.experts)


# Safetensors files

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
    refused("header length must be at most 2 in a file of 10 bytes", read_header, path)
    os.truncate(path, 1 << 40)
    if length > 3:
        refused("header length must be at most 16000000 in a file", read_header, path)


def test_what_is_no_file_with_a_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234567")
    for path, message in (
        (tmp_path / "x", "must hold an 8 byte header length"),
        (tmp_path / "nothing", "file must be readable"),
        (tmp_path, "file must be readable"),
    ):
        refused(message, read_header, path)


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
