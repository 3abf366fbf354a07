# SPDX-License-Identifier: Apache-2.0
"""The training sequences that are made of image-text records.

An image is generated from what comes before it in its sequence; each of these conditions is left
out now and then, so that the model also learns the unconditional contexts of guidance. All
randomness is a function of the seed and of the place in the run, so a run that is resumed, or on
another number of processes, draws the same.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparse_unified._common import naming
from sparse_unified.adapt.config import RunConfig, SequenceConfig
from sparse_unified.adapt.records import (
    IMAGES,
    TEXTS,
    WHERE,
    Records,
    RecordStream,
    opened,
    renamed,
    tasks_of,
)
from sparse_unified.analysis.samples import Task
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.images import ContextImage, ImageTransform, to_pixels
from sparse_unified.bagel.packing import LatentSegment, Segment, TextSegment, VitSegment
from sparse_unified.bagel.pipeline import BagelPipeline
from sparse_unified.checkpoint import safetensors_io
from sparse_unified.checkpoint.files import has_form, replace_file

if TYPE_CHECKING:
    from PIL.Image import Image

_ORDER, _SEQUENCE = 0, 1
# Where a block of a stream begins: epoch, record, and sequence of the run; state of its reader.
_PLACE = {"epoch": (int,), "first": (int,), "position": (int,), "source": (dict, type(None))}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What a loader worker makes of a record, or of the next one that can be read."""

    task: Task | None = None  # None if no record could be read
    texts: dict[str, str] = field(default_factory=dict)
    # Resized: for the VAE, as the record names them; `vit` for the ViT.
    images: dict[str, Image] = field(default_factory=dict)
    damaged: dict[int, str]  # what is wrong with the records that could not be read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads, decodes and resizes records, in the main process or in loader workers."""

    records: Any
    samples: Sequence[tuple[int, Task]]
    for_vae: ImageTransform
    for_vit: ImageTransform
    max_damaged: int

    def __getitem__(self, index: int) -> _Read:
        damaged: dict[int, str] = {}
        for place in range(len(self.samples)):
            number, task = self.samples[(index + place) % len(self.samples)]
            if number in damaged:
                continue
            try:
                return self.resized(self.records.read(number), task, damaged)
            except ValueError as error:
                damaged[number] = str(error)
                if len(damaged) > self.max_damaged:
                    break
        return _Read(damaged=damaged)

    def resized(self, record: Mapping[str, Any], task: Task, damaged: dict[int, str]) -> _Read:
        images = {name: self.for_vae.resize(record[name]) for name in IMAGES if name in record}
        # The ViT sees an image at the size that it has for the VAE.
        if task is not Task.GENERATION:
            seen = images["source" if task is Task.EDITING else "image"]
            images["vit"] = self.for_vit.resize(seen)
        texts = {name: record[name] for name in TEXTS if name in record}
        return _Read(task=task, texts=texts, images=images, damaged=damaged)


class _StreamReader(_Reader):
    """Decodes and resizes records that were read: (number, name, fields, use)."""

    def __getitem__(self, sample: Any) -> _Read:
        number, name, fields, task = sample
        try:
            with naming(name):
                return self.resized(opened(fields), task, {})
        except ValueError as error:
            return _Read(damaged={number: str(error)})


def _start_worker(_: int) -> None:
    """Lets a loader worker end with the process that it works for, whatever ends that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class ImageDataset:
    """A training sequence for each thing that a record can be used for.

    Latents are kept in `latent_cache`, where one is given, so that each is encoded once. ValueError
    if no record can be used, or `run.max_side` is too small for a token.

    Attributes:
        samples: (index of the record, its use) of every sequence.
        vae: what encodes images into latents.
        damaged: what is wrong with each record that was skipped, by its index.
    """

    _reader_of: type[_Reader] = _Reader

    def __init__(
        self,
        records: Records | RecordStream,
        pipeline: BagelPipeline,
        run: RunConfig,
        latent_cache: Path | None = None,
    ) -> None:
        self._records: Any = records
        self._run, self._cache, self._tokenizer = run, latent_cache, pipeline.tokenizer
        self._wanted = run.tasks or tuple(Task)
        every = ((number, task) for number, own in enumerate(records.tasks) for task in own)
        self.samples = [(number, task) for number, task in every if task in self._wanted]
        if isinstance(records, Records) and not self.samples:
            self._refuse_useless(len(records.tasks))
        self.damaged: dict[int, str] = {}
        images = pipeline.image_processor
        self.vae = images.vae
        self._reader = self._reader_of(
            records=records,
            samples=self.samples,
            for_vae=_limited(images.for_vae, run.max_side),
            for_vit=_limited(images.for_vit, run.max_side),
            max_damaged=run.max_damaged,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def _refuse_useless(self, num_records: int) -> NoReturn:
        names = ", ".join(sorted(task.value for task in self._wanted))
        raise ValueError(f"{WHERE}: a record must be of use for {names}, got none of {num_records}")

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns the sequence of one use of one record; see `SequenceDataset`.

        In the place of a record that cannot be read comes the next one that can; ValueError if more
        than `max_damaged` cannot.
        """
        return self._assemble(self._reader[index], generator)

    def in_order(
        self, seed: int, batch_size: int, places: Sequence[int], step: int
    ) -> Iterator[Sequence[Segment]]:
        """Yields what stands at some places of every step, from one on, without an end.

        Loader workers read, decode and resize the images of the next step meanwhile.
        """
        workers = self._run.workers
        order, ahead = tee((number, place) for number in count(step) for place in places)
        loader: Any = DataLoader(
            self._reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._order(seed, (number * batch_size + place for number, place in ahead)),
            num_workers=workers,
            prefetch_factor=max(2, -(-len(places) // workers)) if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of seeds that nothing draws from
        )
        for (number, place), read in zip(order, loader, strict=False):
            yield self._assemble(read, sequence_generator(seed, number, place))

    def _order(self, seed: int, positions: Iterator[int]) -> Iterator[Any]:
        """Yields what the reader takes for the positions of a run."""
        return (data_index(len(self), seed, position) for position in positions)

    def place(self, position: int) -> Any:
        """Returns what a state has to keep beside the position of a run that goes on there."""
        return None

    def go_on(self, place: Any) -> None:
        """Goes on from a place that was kept."""

    def _skip(self, number: int, message: str) -> None:
        """Notes that a record is damaged; ValueError if these are too many."""
        if number not in self.damaged:
            self.damaged[number] = message
            _log.warning("%s; skipped", message)
        if len(self.damaged) > self._run.max_damaged:
            raise ValueError(
                f"{message}; {self._run.max_damaged} such records are skipped (--max-damaged)"
            )

    def _replacement(self) -> _Read:
        raise ValueError(f"{WHERE}: a record must be readable, got none of {len(self)}")

    def _assemble(self, read: _Read, generator: torch.Generator) -> Sequence[Segment]:
        for number, message in read.damaged.items():
            self._skip(number, message)
        if read.task is None:
            read = self._replacement()
        special = self._tokenizer.special_tokens
        ids = {name: self._tokenizer.encode(text.strip()) for name, text in read.texts.items()}
        if read.task is Task.UNDERSTANDING:
            pixels = [to_pixels(read.images["vit"])]
            return understanding_sequence(special, pixels, ids.get("question", ()), ids["answer"])
        latent, sources = self._latent(read.images["image"]), []
        if read.task is Task.EDITING:
            before, seen = self._latent(read.images["source"]), to_pixels(read.images["vit"])
            sources = [ContextImage(latent=before, vit_pixels=seen)]
        config = self._run.sequences
        return generation_sequence(special, ids["text"], latent, generator, config, sources=sources)

    def _latent(self, image: Image) -> Tensor:
        pixels, path = to_pixels(image), None
        if self._cache is not None:
            digest = hashlib.sha256(f"{list(pixels.shape)}".encode())
            digest.update(safetensors_io.as_bytes(pixels.contiguous()).tobytes())
            path = self._cache / f"{digest.hexdigest()}.safetensors"
            if path.exists():
                return safetensors_io.read_tensor(
                    safetensors_io.read_header(path).tensors["latent"]
                )
        latent = self.vae.encode(pixels[None])[0].float().cpu()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, safetensors_io.encode_tensors({"latent": latent}))
        return latent

    def check(self) -> None:
        """Reads every record that is used; raises ValueError that names the first damaged one."""
        for number in dict(self.samples):
            try:
                self._records.read(number)
            except ValueError as error:
                self.damaged[number] = str(error)
        self._refuse_damaged()

    def _refuse_damaged(self) -> None:
        if self.damaged:
            first = self.damaged[min(self.damaged)]
            of = len({*dict(self.samples), *self.damaged})
            raise ValueError(f"{first}; {len(self.damaged)} of {of} are damaged")


class ImageStream(ImageDataset):
    """The same of records that are read as they come, in blocks that are shuffled.

    Every process reads the whole stream, and decodes what it trains on. Its length is that of its
    shards, as no other is known; `check` finds `samples`.
    """

    _reader_of = _StreamReader

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._places: list[dict[str, Any]] = []  # of the blocks that are at work

    def __len__(self) -> int:
        return int(self._records.num_shards)

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns the sequence of a place in the files, which is slow far behind the first."""
        sample = next(islice(self._once(), index, None))
        return self._assemble(self._reader[sample], generator)

    def check(self) -> None:
        """Reads every record; raises ValueError that names the first damaged one."""
        self.samples.clear()
        for sample in self._once():
            self.samples.append((sample[0], sample[-1]))
            self.damaged |= self._reader[sample].damaged
        self._refuse_damaged()

    def place(self, position: int) -> Any:
        while len(self._places) > 1 and self._places[1]["position"] <= position:
            del self._places[0]
        return self._places[0] if self._places else None

    def go_on(self, place: Any) -> None:
        if place is not None and not has_form(place, _PLACE):
            raise ValueError(f"{WHERE}: place must be one of a stream, got {place!r:.80}")
        self._places = [place] if place else []

    def _order(self, seed: int, positions: Iterator[int]) -> Iterator[Any]:
        wanted = next(positions)
        start = self._places[0] if self._places else None
        position = start["position"] if start else 0
        self._places.clear()
        for place, block in self._blocks(start):
            self._places.append({**place, "position": position})
            draws = _generator(seed, _ORDER, place["epoch"], place["first"])
            for index in torch.randperm(len(block), generator=draws).tolist():
                if position == wanted:
                    yield block[index]
                    wanted = next(positions)
                position += 1

    def _blocks(self, place: Any = None) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Yields places in the stream and the samples there; skips what is of no use."""
        epoch, of_use, num_records = place["epoch"] if place else 0, place is not None, 0
        for here, block in self._records.blocks(place):
            if here["epoch"] > epoch:
                if not of_use:
                    self._refuse_useless(num_records)
                epoch, of_use = here["epoch"], False
            found = []
            for number, row in enumerate(block, here["first"]):
                name, num_records = f"{self._records.where}: record {number}", number + 1
                try:
                    fields = renamed(row)
                    tasks = [task for task in tasks_of(name, fields) if task in self._wanted]
                except ValueError as error:
                    self._skip(number, str(error))
                    continue
                found += [(number, name, fields, task) for task in tasks]
            of_use = of_use or bool(found)
            yield here, found

    def _once(self) -> Iterator[Any]:
        """Yields all samples, in the order of the files."""
        for place, block in self._blocks():
            if place["epoch"] > 0:
                return
            yield from block

    @cached_property
    def _first(self) -> _Read:
        for sample in self._once():
            if (read := self._reader[sample]).task is not None:
                return read
        raise ValueError(f"{WHERE}: a record must be readable, got none")

    def _replacement(self) -> _Read:
        """Returns the first record that can be read, which stands for all that cannot."""
        return self._first


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


def sequence_generator(seed: int, step: int, place: int) -> torch.Generator:
    """Returns what the sequence at a place of the batch of a step draws from."""
    return _generator(seed, _SEQUENCE, step, place)


def _generator(*numbers: int) -> torch.Generator:
    """Returns a CPU generator whose seed is a hash of the numbers."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def data_index(length: int, seed: int, position: int) -> int:
    """Returns which datum stands at a position of a run: a new permutation of all every epoch."""
    epoch, place = divmod(position, length)
    return _permutation(length, seed, epoch)[place]


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=_generator(seed, _ORDER, epoch)).tolist()
    return order


def in_order(
    dataset: Any, seed: int, batch_size: int, places: Sequence[int], step: int
) -> Iterator[Sequence[Segment]]:
    """Yields the sequences of a dataset that stand at some places of every step, from one on."""
    for number in count(step):
        for place in places:
            index = data_index(len(dataset), seed, number * batch_size + place)
            yield dataset.sequence(index, sequence_generator(seed, number, place))


def generation_sequence(
    special_tokens: SpecialTokens,
    prompt_ids: Sequence[int],
    latent: Tensor,
    generator: torch.Generator,
    config: SequenceConfig | None = None,
    *,
    sources: Sequence[ContextImage] = (),
) -> list[Segment]:
    """Returns a text and an image to generate from it, or from the images before it.

    Args:
        special_tokens: markers of the model.
        prompt_ids: of the text, without bos and eos.
        latent: scaled latent [C, h, w] of the image.
        generator: of time, noise and dropout, drawn as `config` says, in a fixed order and number.
        sources: images to edit, each through the VAE, the ViT, or both, in this order.
    """
    config = config or SequenceConfig()
    drawn = torch.randn((), generator=generator, dtype=torch.float64)
    time, shift = torch.sigmoid(drawn).item(), config.timestep_shift
    time = shift * time / (1 + (shift - 1) * time)
    noise = torch.randn(latent.shape, generator=generator)
    text_chance, vit_chance, vae_chance = torch.rand(3, generator=generator).tolist()
    segments: list[Segment] = []
    for source in sources:
        if source.latent is not None and vae_chance >= config.vae_dropout:
            segments.append(LatentSegment(latent=source.latent))
        if source.vit_pixels is not None and vit_chance >= config.vit_dropout:
            segments.append(VitSegment(pixels=source.vit_pixels))
    if text_chance >= config.text_dropout:
        segments.append(_text(special_tokens, prompt_ids, predict=False))
    return [*segments, LatentSegment(latent=latent, time=time, noise=noise)]


def understanding_sequence(
    special_tokens: SpecialTokens,
    images: Sequence[Tensor],
    question_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> list[Segment]:
    """Returns images [3, H, W] for the ViT, a question, which may be empty, and its answer."""
    segments: list[Segment] = [VitSegment(pixels=pixels) for pixels in images]
    if question_ids:
        segments.append(_text(special_tokens, question_ids, predict=False))
    return [*segments, _text(special_tokens, answer_ids, predict=True)]


def _text(special: SpecialTokens, ids: Sequence[int], *, predict: bool) -> TextSegment:
    """Returns a text between bos and eos; `predict` trains the model to write it and its eos."""
    return TextSegment(token_ids=[special.bos, *ids, special.eos], predict=predict)
