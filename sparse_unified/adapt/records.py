# SPDX-License-Identifier: Apache-2.0
"""Image-text records from a folder, parquet files or tar shards.

A record has an image and at least one of: `text`, its caption; `question` and `answer` about it;
`source`, an image that the instruction `text` turns into it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unified._common import StrPath, naming, optional
from sparse_unified.analysis import samples
from sparse_unified.analysis.samples import Task
from sparse_unified.bagel.images import open_image, to_rgb
from sparse_unified.checkpoint.files import read_object, read_text

if TYPE_CHECKING:
    from PIL.Image import Image

WHERE = "--data"
TEXTS = ("text", "question", "answer")
IMAGES = ("image", "source")
# Other names under which the fields are found, tar members by their extensions among them.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": ("file_name", *(suffix[1:] for suffix in samples.IMAGE_SUFFIXES)),
    "source": tuple(f"source{suffix}" for suffix in samples.IMAGE_SUFFIXES),
    "text": ("caption", "prompt", "txt"),
    "question": ("question.txt",),
    "answer": ("answer.txt",),
}
_BLOCK = 256  # records of a stream that are shuffled among each other
_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}


class Records:
    """A fixed number of records, images as files or bytes.

    `known` are the fields again, where an image may be anything but None; `names` are for messages.
    `tasks` says what each can be used for, which must be something; `fingerprint` is a hash of
    texts, and of names and sizes of files.
    """

    def __init__(
        self,
        rows: Any,
        names: Callable[[int], str],
        known: Iterable[Mapping[str, Any]],
        shards: Sequence[Path] = (),
    ) -> None:
        self._rows = rows
        self._names = names
        self.tasks: list[tuple[Task, ...]] = []
        digest = _fingerprint(shards)
        for number, fields in enumerate(known):
            self.tasks.append(tasks_of(names(number), fields))
            facts = sorted((name, _name_and_size(value)) for name, value in fields.items())
            digest.update(repr(facts).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def read(self, index: int) -> dict[str, Any]:
        """Returns the fields that are there, images opened in RGB; ValueError if one cannot be."""
        with naming(self._names(index)):
            try:
                fields = renamed(self._rows[index])
            except Exception as error:  # columns of other kinds have decoders
                raise _unreadable("record must be readable", error) from error
            return opened(fields)


def opened(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _open(v) if k in IMAGES else v for k, v in fields.items()}


def _name_and_size(value: Any) -> Any:
    return (value.name, value.stat().st_size) if isinstance(value, Path) else value


def _unreadable(rule: str, error: Exception) -> ValueError:
    reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
    return ValueError(f"{rule}, got {reason:.200}")


class RecordStream:
    """Records of shards in the order of their files, read as they come and not kept on disk.

    `fingerprint` is a hash of names and sizes of the files. What each can be used for is known when
    it is read.
    """

    tasks: Sequence[tuple[Task, ...]] = ()

    def __init__(self, shards: Sequence[Path], builder: str) -> None:
        self._shards, self._builder = shards, builder
        self.num_shards, self.where = len(shards), f"{shards[0].parent}"
        self.fingerprint = _fingerprint(shards).hexdigest()[:16]

    def blocks(
        self, place: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Yields places, plain values that it goes on from, and the records that follow there.

        It begins again after the last record. ValueError if a file cannot be read.
        """
        place = place or {"epoch": 0, "first": 0, "source": None}
        epoch, first, source = place["epoch"], place["first"], place["source"]
        while True:
            with _reading(self._shards, self._builder):
                rows = _load(self._shards, self._builder, streaming=True)
                if source is not None:
                    rows.load_state_dict(source)
                found = iter(rows)
                while block := list(islice(found, _BLOCK)):
                    yield {"epoch": epoch, "first": first, "source": source}, block
                    first, source = first + len(block), rows.state_dict()
            if first == 0:
                raise ValueError(f"{WHERE}: {self.where} must hold a record, got none")
            epoch, first, source = epoch + 1, 0, None


@contextmanager
def _reading(shards: Sequence[Path], builder: str) -> Iterator[None]:
    """Turns what `datasets` raises, errors of many kinds, into ValueError."""
    optional("datasets", extra="train")
    try:
        yield
    except Exception as error:
        more = f"{shards[0]} and {len(shards) - 1} more"
        raise _unreadable(f"{WHERE}: {more} must be readable {builder} shards", error) from error


def _load(shards: Sequence[Path], builder: str, *, streaming: bool) -> Any:
    """Opens shards by the library `datasets`, images as their bytes."""
    datasets = optional("datasets", extra="train")
    files = {"train": [str(path) for path in shards]}
    rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _fingerprint(shards: Sequence[Path]) -> Any:
    return hashlib.sha256(repr([_name_and_size(path) for path in shards]).encode())


def open_stream(data: StrPath) -> RecordStream:
    """Opens shards to read them as they come; ValueError if there are none."""
    for suffix, builder in _SHARDS.items():
        if shards := [file for file in _find(data) if file.suffix == suffix]:
            return RecordStream(shards, builder)
    raise ValueError(f"{WHERE}: {data} must hold .parquet or .tar shards to be streamed, got none")


def _find(data: StrPath) -> list[Path]:
    path = Path(data)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    pattern = glob.escape(str(path)) if path.is_file() else os.fspath(data)
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def open_records(data: StrPath) -> Records:
    """Opens data for training: a folder, a file, or a pattern such as `shards/*.tar`.

    A folder holds `.parquet` or `.tar` shards; or one `.jsonl` file, an object a line, with images
    named from its folder; or images, each with its caption in a `.txt` file of the same name.
    ValueError if there is nothing of that kind, or a record cannot be used for anything.
    """
    files = _find(data)
    for suffix, builder in _SHARDS.items():
        if shards := [file for file in files if file.suffix == suffix]:
            return _open_shards(shards, builder)
    listed = [file for file in files if file.suffix == ".jsonl"]
    if len(listed) > 1:
        raise ValueError(f"{WHERE}: {data} must hold one .jsonl file, got {len(listed)}")
    if listed:
        found = _read_listed(listed[0])
    else:
        found = [
            (f"{WHERE}: {file}", {"image": file, "text": read_text(caption).strip()})
            for file in files
            if file.suffix.lower() in samples.IMAGE_SUFFIXES
            if (caption := file.with_suffix(".txt")).exists()
        ]
    if not found:
        raise ValueError(
            f"{WHERE}: {data} must hold .parquet or .tar shards, a .jsonl file, or images with "
            f"a .txt file each, got none of them in {len(files)} files"
        )
    rows = [fields for _, fields in found]
    return Records(rows, [where for where, _ in found].__getitem__, rows)


def _read_listed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for where, line in samples.read_lines(path, WHERE):
        fields = renamed(read_object(line, where))
        for name in fields.keys() & IMAGES:
            if not samples.is_file_name(fields[name]):
                raise ValueError(f"{where}: {name} must be a path, got {fields[name]!r:.80}")
            fields[name] = path.parent / fields[name]
            if not fields[name].is_file():
                raise ValueError(f"{where}: {name} must be a file, got {fields[name]}")
        found.append((where, fields))
    return found


def _open_shards(shards: Sequence[Path], builder: str) -> Records:
    """Opens shards, which the library `datasets` reads into its cache and maps from there."""
    names = {name for own in IMAGES for name in (own, *_ALIASES[own])}
    with _reading(shards, builder):
        rows = _load(shards, builder, streaming=False)
        # Of images only whether they are there.
        images = {
            name: rows.data.column(name).is_valid().to_pylist()
            for name in names.intersection(rows.column_names)
        }
        texts = rows.remove_columns(list(images))
        known = []
        for number in range(len(rows)):
            fields = texts[number] if texts.column_names else {}
            fields |= {name: True for name, valid in images.items() if valid[number]}
            known.append(renamed(fields))
    return Records(rows, f"{shards[0].parent}: record {{}}".format, known, shards)


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are there, under our names; those of a JSON member among them."""
    inner = fields.get("json")
    merged = {**inner, **fields} if isinstance(inner, Mapping) else fields
    given = {
        name: [merged[key] for key in (name, *others) if merged.get(key) is not None]
        for name, others in _ALIASES.items()
    }
    return {name: values[0] for name, values in given.items() if values}


def tasks_of(where: str, fields: Mapping[str, Any]) -> tuple[Task, ...]:
    for name in TEXTS:
        text = fields.get(name)
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"{where}: {name} must be a text, got {text!r:.80}")
    if "image" not in fields:
        raise ValueError(f"{where}: record must have an image, got {sorted(fields)}")
    tasks = []
    if "text" in fields:
        tasks.append(Task.EDITING if "source" in fields else Task.GENERATION)
    if "answer" in fields:
        tasks.append(Task.UNDERSTANDING)
    if not tasks:
        raise ValueError(
            f"{where}: record must have text, or question and answer, got {sorted(fields)}"
        )
    return tuple(tasks)


def _open(value: Any) -> Image:
    """Opens an image: a file that was listed, or bytes out of a shard."""
    if isinstance(value, Mapping):
        value = value.get("bytes")  # a path beside them could be of any file of the machine
    if not isinstance(value, (Path, bytes)):
        raise ValueError(f"image must be held as its bytes, got {value!r:.80}")
    return to_rgb(open_image(value if isinstance(value, Path) else io.BytesIO(value), where="data"))
