# SPDX-License-Identifier: Apache-2.0
"""Image-text records from a folder, from parquet files, or from tar shards.

A record has a picture and at least one of: `text`, its caption; `question` and `answer` about it;
`source`, a picture that the instruction `text` turns into it.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparse_unified._common import optional
from sparse_unified.analysis.samples import PICTURE_SUFFIXES, Task, is_file_name
from sparse_unified.bagel.images import open_image
from sparse_unified.checkpoint import strict_json

if TYPE_CHECKING:
    from PIL.Image import Image

WHERE = "--data"
_TEXTS = ("text", "question", "answer")
_PICTURES = ("image", "source")
# Other names under which the fields are found, tar members by their extensions among them.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": ("file_name", *(suffix[1:] for suffix in PICTURE_SUFFIXES)),
    "source": tuple(f"source{suffix}" for suffix in PICTURE_SUFFIXES),
    "text": ("caption", "prompt", "txt"),
    "question": ("question.txt",),
    "answer": ("answer.txt",),
}
_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One datum; pictures are opened."""

    image: Image
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    source: Image | None = None


class Records(Protocol):
    """A fixed number of records, and what each can be used for without opening pictures."""

    def __len__(self) -> int: ...

    def tasks(self, index: int) -> tuple[Task, ...]: ...

    def read(self, index: int) -> Record: ...


def open_records(data: str | os.PathLike[str]) -> Records:
    """Opens data for training.

    Args:
        data: a folder, a file, or a pattern such as `shards/*.tar`. A folder holds `.parquet` or
            `.tar` shards; or one `.jsonl` file, an object a line, with pictures named from its
            folder; or pictures, each with its caption in a `.txt` file of the same name.

    Raises:
        ValueError: there is nothing of that kind, a line or a picture is missing, or a record
            cannot be used for anything.
        ImportError: shards are given and the `train` extra is not installed.
    """
    files = _files(os.fspath(data))
    for suffix, builder in _SHARDS.items():
        shards = [path for path in files if path.suffix == suffix]
        if shards:
            return _ShardRecords(shards, builder)
    listed = [path for path in files if path.suffix == ".jsonl"]
    if len(listed) > 1:
        raise ValueError(f"{WHERE}: {data} must hold one .jsonl file, got {len(listed)}")
    found = _read_lines(listed[0]) if listed else _read_captions(files)
    if not found:
        raise ValueError(
            f"{WHERE}: {data} must hold .parquet or .tar shards, a .jsonl file, or pictures with "
            "a .txt file each, got none of them"
        )
    return _FolderRecords(found)


def _files(data: str) -> list[Path]:
    path = Path(data)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(data, recursive=True))]  # noqa: PTH207
    if not found:
        raise ValueError(f"{WHERE}: {data} must be a folder, a file or a pattern of some, got none")
    return found


def _read_captions(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in files:
        caption = path.with_suffix(".txt")
        if path.suffix.lower() in PICTURE_SUFFIXES and caption.exists():
            fields = {"image": path, "text": _read_text(caption).strip()}
            found.append((str(path), fields))
    return found


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = strict_json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: line must be a JSON object, got {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: line must be a JSON object, got {line.strip():.80}")
        named = _named(fields)
        for name in _PICTURES:
            if named.get(name) is not None:
                if not is_file_name(named[name]):
                    raise ValueError(f"{where}: {name} must be a path, got {named[name]!r:.80}")
                named[name] = path.parent / named[name]
                if not named[name].is_file():
                    raise ValueError(f"{where}: {name} must be a file, got {named[name]}")
        found.append((where, named))
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{WHERE}: {path} must be readable text, got {reason}") from error


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields under our own names; those of a JSON member of a shard among them."""
    inner = fields.get("json")
    merged = {**inner, **fields} if isinstance(inner, Mapping) else dict(fields)
    named = {}
    for name, others in _ALIASES.items():
        key = next((k for k in (name, *others) if merged.get(k) is not None), None)
        if key is not None:
            named[name] = merged[key]
    return named


def _tasks(where: str, fields: Mapping[str, Any]) -> tuple[Task, ...]:
    for name in _TEXTS:
        if fields.get(name) is not None and not (
            isinstance(fields[name], str) and fields[name].strip()
        ):
            raise ValueError(f"{where}: {name} must be a text, got {fields[name]!r:.80}")
    if fields.get("image") is None:
        raise ValueError(f"{where}: record must have an image, got {sorted(fields)}")
    tasks = []
    if fields.get("text") is not None:
        tasks.append(Task.EDITING if fields.get("source") is not None else Task.GENERATION)
    if fields.get("answer") is not None:
        tasks.append(Task.UNDERSTANDING)
    if not tasks:
        raise ValueError(
            f"{where}: record must have text, or question and answer, got {sorted(fields)}"
        )
    return tuple(tasks)


def _record(where: str, fields: Mapping[str, Any]) -> Record:
    pictures = {
        name: _open(fields[name], where) for name in _PICTURES if fields.get(name) is not None
    }
    values: dict[str, Any] = {**pictures, **{name: fields.get(name) for name in _TEXTS}}
    return Record(**values)


def _open(value: Any, where: str) -> Image:
    if isinstance(value, Path):
        return open_image(value, where=where)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return open_image(value, where=where)
    if not isinstance(value, bytes):
        image: Image = value  # decoded already
        return image
    try:
        image = optional("PIL.Image").open(io.BytesIO(value))
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: image must be a readable image, got {error}") from error
    return image


class _FolderRecords:
    """Records whose pictures are files."""

    def __init__(self, found: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._found = found
        self._tasks = [_tasks(where, fields) for where, fields in found]

    def __len__(self) -> int:
        return len(self._found)

    def tasks(self, index: int) -> tuple[Task, ...]:
        return self._tasks[index]

    def read(self, index: int) -> Record:
        where, fields = self._found[index]
        return _record(where, fields)


class _ShardRecords:
    """Records in shards, which the library `datasets` reads into its cache and maps from there."""

    def __init__(self, shards: Sequence[Path], builder: str) -> None:
        datasets = optional("datasets", extra="train")
        try:
            rows = datasets.load_dataset(
                builder, data_files={"train": [str(path) for path in shards]}, split="train"
            )
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"{WHERE}: {shards[0]} and {len(shards) - 1} more must be readable {builder} "
                f"shards, got {reason}"
            ) from error
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        self._rows = rows
        self._where = f"{shards[0].parent}"
        self._tasks = [
            _tasks(f"{self._where}: record {number}", fields)
            for number, fields in enumerate(self._scan())
        ]

    def _scan(self) -> Iterator[dict[str, Any]]:
        """Yields the fields of all records; of pictures only whether they are there."""
        pictures = {
            name: self._rows.data.column(name).is_valid()
            for name in self._rows.column_names
            if any(name in (own, *_ALIASES[own]) for own in _PICTURES)
        }
        texts = self._rows.remove_columns(list(pictures)) if pictures else self._rows
        valid = {name: column.to_pylist() for name, column in pictures.items()}
        for number in range(len(self._rows)):
            fields = texts[number] if texts.column_names else {}
            yield _named({**fields, **{name: True for name, own in valid.items() if own[number]}})

    def __len__(self) -> int:
        return len(self._rows)

    def tasks(self, index: int) -> tuple[Task, ...]:
        return self._tasks[index]

    def read(self, index: int) -> Record:
        return _record(f"{self._where}: record {index}", _named(self._rows[index]))
