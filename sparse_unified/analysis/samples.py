# SPDX-License-Identifier: Apache-2.0
"""What a model is run on: tasks, prompts, images, reference answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from sparse_unified._common import StrPath, naming
from sparse_unified.bagel.images import open_image
from sparse_unified.checkpoint.files import read_object, read_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Of objects, counts, colours and positions, as text-to-image benchmarks ask for them.
GENERATION_PROMPTS = (
    "a photo of a bench",
    "a photo of a red bicycle and a blue car",
    "a photo of three clocks",
    "a photo of a dog to the left of a chair",
    "a watercolour of a harbour in the rain",
    "a photo of a green cup on a wooden table",
    "a photo of two birds above a boat",
    "a portrait of an old man who reads a newspaper",
)
UNDERSTANDING_PROMPTS = (
    "Which colour does one get from blue and yellow?",
    "Name three animals that live in the sea.",
    "Why does ice float on water?",
    "What is the capital of France, and which river runs through it?",
    "Write one sentence about a bench in the rain.",
    "How many legs do two spiders have together?",
    "Explain in one sentence what a clock is for.",
    "What comes after Monday?",
)
# What is to be done with the images of scenes.zip, a few flat shapes each.
EDITING_PROMPTS = (
    "make the red ball blue",
    "paint the roof of the house green",
    "turn the day into night",
    "remove the small box",
    "add a fourth ball on the right",
    "let the boat sail in the rain",
    "give the cup a handle",
    "switch the traffic light to green",
)


class Task(str, Enum):
    """What the model does while it is probed."""

    GENERATION = "generation"  # text to image
    UNDERSTANDING = "understanding"  # images and text to text
    EDITING = "editing"  # image and text to image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One thing to do.

    Attributes:
        prompt: the text; of editing the instruction, of understanding the question.
        sources: images before it.
        image: the image that generation or editing should lead to; None if there is none.
        answer: the text that understanding should lead to; None if there is none.
        seed: of the noise.
    """

    prompt: str
    sources: tuple[Path, ...] = ()
    image: Path | None = None
    answer: str | None = None
    seed: int = 0

    def fingerprint(self) -> str:
        """Returns a hash of the text, the seed, and the bytes of the images."""
        digest = hashlib.sha256(repr((self.prompt, self.answer, self.seed)).encode())
        for path in (*self.sources, self.image):
            digest.update(b"none" if path is None else hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def built_in_samples(
    task: Task, count: int | None = None, seed: int = 0, *, folder: StrPath | None = None
) -> list[Sample]:
    """Returns samples that come with the package; they are always the same.

    Args:
        task: for which.
        count: see `read_samples`.
        seed: see `read_samples`.
        folder: where the images to edit are put; of editing only. It has to stay for as long as
            the samples are used.

    """
    if task is not Task.EDITING:
        prompts = GENERATION_PROMPTS if task is Task.GENERATION else UNDERSTANDING_PROMPTS
        return _take([Sample(prompt=prompt) for prompt in prompts], count, seed, "--prompts")
    if folder is None:
        raise ValueError("built_in_samples: folder must be given for the images to edit, got none")
    paths = [_folder(folder) / f"{index:02d}.bmp" for index in range(len(EDITING_PROMPTS))]
    pairs = zip(EDITING_PROMPTS, paths, strict=True)
    samples = [Sample(prompt=prompt, sources=(path,)) for prompt, path in pairs]
    samples = _take(samples, count, seed, "--prompts")
    with ZipFile(Path(__file__).with_name("scenes.zip")) as scenes:
        scenes.extractall(folder, [sample.sources[0].name for sample in samples])
    return samples


def read_samples(
    prompts: StrPath,
    images: StrPath | None = None,
    task: Task = Task.GENERATION,
    count: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Reads samples from a file.

    A `.jsonl` file has an object a line: `prompt`, and perhaps `source` (an image before it, or a
    list), `image` (the image to be reached) and `answer`; records as `adapt` takes them do too:
    `text` is the prompt of what is drawn, `question` that of what `image` is looked at for. Any
    other file has a prompt a line; the images of the folder, sorted by name, then belong to the
    lines one by one: what generation should lead to, or what editing and understanding start from.

    Args:
        prompts: the file.
        images: folder of the images; of a .jsonl file, None is the folder of the file.
        task: what the images of a plain file are for.
        count: how many samples, from the top; None is all.
        seed: of the noise of the first sample; counted up from sample to sample.

    """
    path, lines = Path(prompts), read_lines(prompts, "--prompts")
    if path.suffix == ".jsonl":
        folder = path.parent if images is None else _folder(images)
        records = [(_of_training(read_object(line, where), task), where) for where, line in lines]
        samples = [_parse(record, folder, where) for record, where in records if record]
    else:
        samples = [Sample(prompt=line) for _, line in lines]
        if images is not None:
            found = [p for p in _folder(images).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
            if len(found) != len(samples):
                raise ValueError(
                    f"--images: {images} must hold one image ({', '.join(IMAGE_SUFFIXES)}) for "
                    f"each of {len(samples)} prompts, got {len(found)}"
                )
            pairs = zip(samples, sorted(found), strict=True)
            if task is Task.GENERATION:
                samples = [replace(sample, image=picture) for sample, picture in pairs]
            else:
                samples = [replace(sample, sources=(picture,)) for sample, picture in pairs]
    samples = _take(samples, count, seed, f"--prompts: {path}")
    for sample in samples:
        if task is Task.EDITING and not sample.sources:
            raise ValueError(
                f"--prompts: {path}: each line must have an image to edit, "
                f"got none for {sample.prompt!r:.120}"
            )
        for picture in filter(None, (*sample.sources, sample.image)):
            open_image(picture, where="--images")
    return samples


def _take(samples: list[Sample], count: int | None, seed: int, where: str) -> list[Sample]:
    """Returns the first samples, with their seeds."""
    if len(samples) < (count or 1):
        wanted = "at least one prompt" if count is None else f"--samples = {count} prompts"
        raise ValueError(f"{where} must hold {wanted}, got {len(samples)}")
    return [replace(s, seed=(seed + i) % 2**63) for i, s in enumerate(samples[:count])]


def _folder(images: StrPath) -> Path:
    folder = Path(images)
    if not folder.is_dir():
        raise ValueError(f"--images: {folder} must be a folder of images, got none there")
    return folder


def read_lines(path: StrPath, option: str) -> list[tuple[str, str]]:
    """Returns the lines of a text file that are not blank, each with its place for messages."""
    with naming(option):
        lines = read_text(Path(path)).splitlines()
    placed = [(f"{option}: {path}: line {i}", line.strip()) for i, line in enumerate(lines, 1)]
    return [(where, line) for where, line in placed if line]


def is_file_name(value: object) -> bool:
    """Tells whether a JSON value can name a file, there or not, within what file systems take."""
    is_path = isinstance(value, str) and "\0" not in value and len(value) <= 1024
    return is_path and all(len(part.encode()) <= 255 for part in str(value).split("/"))


def _of_training(fields: dict[str, Any], task: Task) -> dict[str, Any] | None:
    """Returns a record as `adapt` takes it under the names of a sample, None if the task has no
    use for it, and others as they are."""
    if "prompt" in fields or not {"text", "question"} & fields.keys():
        return fields
    if task is Task.UNDERSTANDING:
        kept = {name: fields[name] for name in ("answer",) if name in fields}
        asked = {"prompt": fields.get("question"), "source": fields.get("image"), **kept}
        return asked if "question" in fields else None
    return {"prompt": fields["text"], **fields} if "text" in fields else None


def _parse(fields: dict[str, Any], folder: Path, where: str) -> Sample:
    prompt, answer, image = (fields.get(name) for name in ("prompt", "answer", "image"))
    sources = fields.get("source") or []
    sources = [sources] if isinstance(sources, str) else sources
    is_text = {name: isinstance(v, str) and bool(v.strip()) for name, v in fields.items()}
    for name, is_legal, rule in (
        ("prompt", is_text.get("prompt", False), "a text"),
        ("answer", answer is None or is_text["answer"], "a text"),
        ("source", isinstance(sources, list) and all(map(is_file_name, sources)), "a file name"),
        ("image", image is None or is_file_name(image), "a file name"),
    ):
        if not is_legal:
            raise ValueError(f"{where}: {name} must be {rule}, got {fields.get(name)!r:.120}")
    return Sample(
        prompt=str(prompt),
        sources=tuple(folder / name for name in sources),
        image=None if image is None else folder / str(image),
        answer=answer,
    )
