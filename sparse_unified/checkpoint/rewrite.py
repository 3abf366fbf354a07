# SPDX-License-Identifier: Apache-2.0
"""A model directory from another one, as a stream: tensors are copied, cut, joined, split or new.

What changes is data: `{key of the source: Edit}`. Files are written front to back. Bytes that stay
are copied in the kernel; of what is cut or reordered one tensor at most is in memory.
"""

from __future__ import annotations

import math
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from sparse_unified._common import Progress, StrPath
from sparse_unified.checkpoint import files, safetensors_io
from sparse_unified.checkpoint.model_dir import INDEX_SUFFIX, Checkpoint
from sparse_unified.checkpoint.safetensors_io import Header, TensorSpec

# Rows handled at once: enough to amortise a read, few enough to stay in cache.
_BLOCK_BYTES = 4 << 20

Entry = tuple[str, torch.dtype, tuple[int, ...]]
# Bytes of the result, in order: of a file, or in memory.
Blocks = Iterable[TensorSpec | np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What takes the place of one tensor.

    Attributes:
        entries: (key, dtype, shape) of each new tensor, in the order of their bytes; none where
            the tensor is left out.
        blocks: gives the bytes of all of them; called when they are written.
    """

    entries: tuple[Entry, ...]
    blocks: Callable[[], Blocks]


GONE = Edit(entries=(), blocks=tuple)
Edits = Mapping[str, Edit]


def rewrite(
    source: Checkpoint,
    out: StrPath,
    edits: Edits,
    texts: Mapping[str, str],
    *,
    headers: Mapping[str, Header] | None = None,
    rename: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    finish: Callable[[Path], object] = lambda partial: None,
    progress: Progress | None = None,
) -> int:
    """Writes a directory with edited tensors and texts and everything else copied, or nothing.

    The indices of sharded weights are not touched; see `index_texts`.

    Args:
        source, out: the directory that is read, and the one to make, which must not exist.
        edits: by key; keys that are not named are copied.
        texts: files with new contents, by name.
        headers: the weight files of the result where they are not those of the source, byte for
            byte, and with them the keys to write. Without them, a file that is left without tensors
            is not written.
        rename, skip: new names of files directly inside the source, and those left out.
        finish: called with the directory before it gets its name.
        progress: called with (bytes written, bytes in all).

    Returns:
        the bytes that were copied and written, texts left out.

    Raises:
        ValueError: the target exists or has no parent.
        RuntimeError: reading or writing failed, there is no room, or the source changed meanwhile;
            nothing is left under `out`.
    """
    weights: dict[str, tuple[str, list[Edit]]] = {}  # name -> header text and what comes after it
    for name, header in (headers or source.headers).items():
        parts = []
        for key in header.tensors:
            if (edit := edits.get(key)) is None:
                spec = source.spec(key)
                entries = ((key, spec.dtype, spec.shape),)
                edit = Edit(entries=entries, blocks=partial(tuple, [spec]))
            parts.append(edit)
        written = [entry for own in parts for entry in own.entries]
        if headers is not None:
            weights[name] = header.text, parts
        elif written or not header.tensors:
            weights[name] = safetensors_io.build_header(written, header.metadata), parts
    found = files.list_files(source.directory)
    left_out = {*source.headers, *weights, *texts, *skip}
    others = {name: status for name, status in found.items() if name not in left_out}
    total = sum(status.st_size for status in others.values())
    for text, parts in weights.values():
        total += 8 + len(text.encode())
        total += sum(_size(entry) for own in parts for entry in own.entries)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    def mode(name: str) -> int:
        """Permissions: those of the file of the source, and the owner may always change it."""
        return stat.S_IMODE(found[name].st_mode) & 0o777 | 0o600 if name in found else 0o666

    directory_mode = stat.S_IMODE(source.directory.stat().st_mode) & 0o777
    with files.atomic_directory(out, mode=directory_mode) as unfinished:
        free = shutil.disk_usage(unfinished).free
        if free < total:
            raise RuntimeError(
                f"{unfinished.parents[1]} must have {total:,} bytes free, got {free:,}"
            )
        for name, status in others.items():
            path = unfinished / (rename or {}).get(name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                files.open_source(source.directory / name, files.stamp_of(status)) as stream,
                files.create_file(path, mode=mode(name)) as target,
            ):
                files.copy_range(stream, 0, status.st_size, target, advance)
        for name, (text, parts) in weights.items():
            with files.create_file(unfinished / name, mode=mode(name)) as target:
                files.write_all(target, safetensors_io.encode_header(text), advance)
                for block in (block for own in parts for block in own.blocks()):
                    if isinstance(block, TensorSpec):
                        with files.open_source(block.file, block.stamp) as stream:
                            files.copy_range(stream, block.start, block.nbytes, target, advance)
                    else:
                        files.write_all(target, block, advance)
        for name, text in texts.items():
            files.write_text(unfinished / name, text, mode=mode(name))
        finish(unfinished)
        source.refuse_change()
    return done


def _size(entry: Entry) -> int:
    return math.prod(entry[2]) * entry[1].itemsize


def gather(
    specs: Sequence[TensorSpec], dim: int, indices: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields the bits of chosen rows (dim 0) or columns (dim 1) of a tensor, in blocks.

    Args:
        specs: the parts of the tensor, joined along `dim`; together they are in memory.
        dim: the dimension that `indices` are of.
        indices: of the joined tensor, int64, for each tensor of the result.
    """
    first = specs[0]
    bounds = np.cumsum([0, *(spec.shape[dim] for spec in specs)])
    shape = (*first.shape[:dim], bounds[-1], *first.shape[dim + 1 :])
    joined = np.empty(shape, dtype=safetensors_io.WORDS[first.dtype.itemsize])
    for spec, own in zip(specs, pairwise(bounds), strict=True):
        part = slice(*own)
        joined[part if dim == 0 else (slice(None), part)] = safetensors_io.read_words(spec)
    for index in indices:
        num_rows = len(index) if dim == 0 else len(joined)
        for top, bottom in row_blocks(first, num_rows):
            if dim == 0:
                yield joined[index[top:bottom]]
            else:
                yield np.take(joined[top:bottom], index, axis=1)


def row_blocks(spec: TensorSpec, num_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields consecutive row ranges of about 4 MB each, of all rows or of another number."""
    step = max(1, _BLOCK_BYTES // max(1, math.prod(spec.shape[1:]) * spec.dtype.itemsize))
    num_rows = spec.shape[0] if num_rows is None else num_rows
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def index_texts(source: Checkpoint, edits: Edits) -> dict[str, str]:
    """Returns the new text of every `*.safetensors.index.json` that speaks of edited tensors.

    Besides the index that names the shards this can be one that lies next to a single weight file.
    """
    renamed = {key: [entry[0] for entry in edit.entries] for key, edit in edits.items()}
    added = sum(_size(entry) for edit in edits.values() for entry in edit.entries)
    added -= sum(source.spec(key).nbytes for key in edits)
    texts: dict[str, str] = {}
    for path in sorted(source.directory.glob(f"*{INDEX_SUFFIX}")):
        index = files.read_json(path)
        old = index.get("weight_map")
        if not isinstance(old, dict) or not any(key in source.specs for key in old):
            continue
        index["weight_map"] = {
            new: name
            for key, name in old.items()
            for new in (renamed.get(key, [key]) if name in source.headers else [key])
        }
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and type(metadata.get("total_size")) is int:
            metadata["total_size"] += added
        if index["weight_map"] != old or added:
            texts[path.name] = files.json_text(index)
    return texts
