# SPDX-License-Identifier: Apache-2.0
"""Image-text records from a folder, parquet files or tar shards, and the sequences made of them.

A record has an image and at least one of: `text`, its caption; `question` and `answer` about it;
`source`, an image that the instruction `text` turns into it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_unified._common import list_some, optional
from sparse_unified.adapt.config import SequenceConfig
from sparse_unified.adapt.sequences import (
    editing_sequence,
    generation_sequence,
    understanding_sequence,
)
from sparse_unified.analysis.samples import IMAGE_SUFFIXES, Task, is_file_name
from sparse_unified.bagel.images import (
    ContextImage,
    ImageProcessor,
    ImageTransform,
    open_image,
    to_rgb,
)
from sparse_unified.bagel.packing import Segment
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint.files import loads_strict, replace_file
from sparse_unified.checkpoint.safetensors_io import (
    as_bytes,
    encode_tensors,
    read_header,
    read_tensor,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_WHERE = "--data"
_TEXTS = ("text", "question", "answer")
_IMAGES = ("image", "source")
# Other names under which the fields are found, tar members by their extensions among them.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": ("file_name", *(suffix[1:] for suffix in IMAGE_SUFFIXES)),
    "source": tuple(f"source{suffix}" for suffix in IMAGE_SUFFIXES),
    "text": ("caption", "prompt", "txt"),
    "question": ("question.txt",),
    "answer": ("answer.txt",),
}
_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One datum; images are opened."""

    image: Image
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    source: Image | None = None


class Records:
    """A fixed number of records, and what each can be used for without opening images.

    Args:
        rows: the fields of each record, images as files, bytes or opened.
        names: returns the name of a record, for messages.
        known: the fields of each record again, where an image may be anything but None.

    Raises:
        ValueError: a record cannot be used for anything.
    """

    def __init__(
        self, rows: Any, names: Callable[[int], str], known: Iterable[Mapping[str, Any]]
    ) -> None:
        self._rows = rows
        self._names = names
        self._tasks = [_tasks(names(number), fields) for number, fields in enumerate(known)]

    def __len__(self) -> int:
        return len(self._rows)

    def tasks(self, index: int) -> tuple[Task, ...]:
        """Returns what a record can be used for."""
        return self._tasks[index]

    def read(self, index: int) -> Record:
        """Returns a record.

        Raises:
            ValueError: an image cannot be read.
        """
        fields = _renamed(self._rows[index])
        values: dict[str, Any] = {name: fields.get(name) for name in _TEXTS}
        for name in _IMAGES:
            if name in fields:
                values[name] = _open(fields[name], self._names(index))
        return Record(**values)


def open_records(data: str | os.PathLike[str]) -> Records:
    """Opens data for training.

    Args:
        data: a folder, a file, or a pattern such as `shards/*.tar`. A folder holds `.parquet` or
            `.tar` shards; or one `.jsonl` file, an object a line, with images named from its
            folder; or images, each with its caption in a `.txt` file of the same name.

    Raises:
        ValueError: there is nothing of that kind, a line or an image is missing, or a record
            cannot be used for anything.
        ImportError: shards are given and the `train` extra is not installed.
    """
    files = _files(os.fspath(data))
    for suffix, builder in _SHARDS.items():
        if shards := [path for path in files if path.suffix == suffix]:
            return _open_shards(shards, builder)
    listed = [path for path in files if path.suffix == ".jsonl"]
    if len(listed) > 1:
        raise ValueError(f"{_WHERE}: {data} must hold one .jsonl file, got {len(listed)}")
    found = _read_lines(listed[0]) if listed else _read_captions(files)
    if not found:
        raise ValueError(
            f"{_WHERE}: {data} must hold .parquet or .tar shards, a .jsonl file, or images with "
            "a .txt file each, got none of them"
        )
    rows = [fields for _, fields in found]
    return Records(rows, lambda number: found[number][0], rows)


def _files(data: str) -> list[Path]:
    path = Path(data)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(data, recursive=True))]  # noqa: PTH207
    if not found:
        raise ValueError(
            f"{_WHERE}: {data} must be a folder, a file or a pattern of some, got none"
        )
    return found


def _read_captions(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    return [
        (str(path), {"image": path, "text": _read_text(caption).strip()})
        for path in images
        if (caption := path.with_suffix(".txt")).exists()
    ]


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = loads_strict(line)
        except ValueError as error:
            raise ValueError(f"{where}: line must be a JSON object, got {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: line must be a JSON object, got {line.strip():.80}")
        named = _renamed(fields)
        for name in _IMAGES:
            if name in named:
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
        raise ValueError(f"{_WHERE}: {path} must be readable text, got {reason}") from error


def _open_shards(shards: Sequence[Path], builder: str) -> Records:
    """Opens shards, which the library `datasets` reads into its cache and maps from there."""
    datasets = optional("datasets", extra="train")
    try:
        rows = datasets.load_dataset(
            builder, data_files={"train": [str(path) for path in shards]}, split="train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"{_WHERE}: {shards[0]} and {len(shards) - 1} more must be readable {builder} "
            f"shards, got {reason}"
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Records(rows, lambda number: f"{shards[0].parent}: record {number}", _scan(rows))


def _scan(rows: Any) -> Iterator[dict[str, Any]]:
    """Yields the fields of all rows; of images only whether they are there."""
    images = {
        name: rows.data.column(name).is_valid().to_pylist()
        for name in rows.column_names
        if any(name in (own, *_ALIASES[own]) for own in _IMAGES)
    }
    texts = rows.remove_columns(list(images)) if images else rows
    for number in range(len(rows)):
        fields = texts[number] if texts.column_names else {}
        yield _renamed(
            {**fields, **{name: True for name, valid in images.items() if valid[number]}}
        )


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are there, under our names; those of a JSON member among them."""
    inner = fields.get("json")
    merged = {**inner, **fields} if isinstance(inner, Mapping) else fields
    found = {}
    for name, others in _ALIASES.items():
        for key in (name, *others):
            if merged.get(key) is not None:
                found[name] = merged[key]
                break
    return found


def _tasks(where: str, fields: Mapping[str, Any]) -> tuple[Task, ...]:
    for name in _TEXTS:
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


def _open(value: Any, where: str) -> Image:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return open_image(io.BytesIO(value), where=where)
    if not isinstance(value, (Path, str)):
        raise ValueError(f"{where}: image must be a file or its bytes, got {value!r:.80}")
    return open_image(value, where=where)


class ImageDataset:
    """A training sequence for each thing that a record can be used for.

    Args:
        records: images and texts.
        images: the transforms and the autoencoder of the model.
        tokenizer: of the model.
        config: how times, noise and dropout are drawn.
        tasks: which uses are trained (None: all).
        max_side: longest side of an image in pixels (None: what the model takes).
        latent_cache: a directory in which latents are kept, so that each is encoded once.

    Raises:
        ValueError: no record can be used, or `max_side` is too small for a token.

    Attributes:
        samples: (index of the record, its use) of every sequence.
        autoencoder: what encodes images into latents.
    """

    def __init__(
        self,
        records: Records,
        images: ImageProcessor,
        tokenizer: Tokenizer,
        config: SequenceConfig | None = None,
        *,
        tasks: Collection[Task | str] | None = None,
        max_side: int | None = None,
        latent_cache: Path | None = None,
    ) -> None:
        legal = {task.value: task for task in Task}
        if unknown := [task for task in tasks or () if task not in legal]:
            raise ValueError(f"--tasks: name must be one of {', '.join(legal)}, got {unknown[0]!r}")
        wanted = set(Task) if tasks is None else {Task(task) for task in tasks}
        every = ((n, task) for n in range(len(records)) for task in records.tasks(n))
        self.samples = [(number, task) for number, task in every if task in wanted]
        if not self.samples:
            names = ", ".join(sorted(task.value for task in wanted))
            raise ValueError(
                f"{_WHERE}: a record must be of use for {names}, got none of {len(records)}"
            )
        self.autoencoder: AutoEncoder = images.vae
        self._records = records
        self._tokenizer = tokenizer
        self._config = config or SequenceConfig()
        self._for_vae = _limited(images.for_vae, max_side)
        self._for_vit = _limited(images.for_vit, max_side)
        self._cache = latent_cache

    def __len__(self) -> int:
        return len(self.samples)

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns the sequence of one use of one record; see `SequenceDataset`."""
        number, task = self.samples[index]
        record = self._records.read(number)
        special = self._tokenizer.special_tokens
        image = self._resized(record.image)
        if task is Task.UNDERSTANDING:
            question, answer = self._encode(record.question), self._encode(record.answer)
            return understanding_sequence(special, [self._for_vit(image)], question, answer)
        latent, ids = self._latent(image), self._encode(record.text)
        if record.source is None or task is Task.GENERATION:
            return generation_sequence(special, ids, latent, generator, self._config)
        before = self._resized(record.source)
        source = ContextImage(latent=self._latent(before), vit_pixels=self._for_vit(before))
        return editing_sequence(special, [source], ids, latent, generator, self._config)

    def _encode(self, text: str | None) -> list[int]:
        return self._tokenizer.encode(text.strip()) if text else []

    def _resized(self, image: Image) -> Image:
        """Returns the image at its size for the VAE, which is what the ViT sees too."""
        return self._for_vae.resize(to_rgb(image))

    def _latent(self, image: Image) -> Tensor:
        pixels = self._for_vae(image)
        path = None
        if self._cache is not None:
            digest = hashlib.sha256(f"{list(pixels.shape)}".encode())
            digest.update(as_bytes(pixels.contiguous()).tobytes())
            path = self._cache / f"{digest.hexdigest()}.safetensors"
            if path.exists():
                specs = read_header(path).tensors
                if set(specs) != {"latent"}:
                    raise ValueError(f"{path}: tensors must be one latent, got {list_some(specs)}")
                return read_tensor(specs["latent"], what=str(path))
        latent = self.autoencoder.encode(pixels[None])[0].float().cpu()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, encode_tensors({"latent": latent}))
        return latent


def _limited(transform: ImageTransform, max_side: int | None) -> ImageTransform:
    """Returns the transform with a lower limit of the sides, a multiple of its stride."""
    if max_side is None:
        return transform
    if max_side < transform.stride:
        raise ValueError(
            f"--max-side: side must be at least {transform.stride} pixels, got {max_side}"
        )
    limit = min(transform.max_side, max_side // transform.stride * transform.stride)
    return dataclasses.replace(transform, max_side=limit, min_side=min(transform.min_side, limit))
