# SPDX-License-Identifier: Apache-2.0
"""Training sequences from records, with the transforms, autoencoder and tokenizer of a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_unified._common import list_some
from sparse_unified.adapt.records import WHERE, Records
from sparse_unified.adapt.sequences import (
    SequenceConfig,
    editing_sequence,
    generation_sequence,
    understanding_sequence,
)
from sparse_unified.analysis.samples import Task
from sparse_unified.bagel.images import ContextImage, ImageProcessor, ImageTransform, to_rgb
from sparse_unified.bagel.packing import Segment
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.checkpoint.atomic import replace_file
from sparse_unified.checkpoint.safetensors_file import as_bytes, read_header, read_tensor
from sparse_unified.checkpoint.writer import encode_tensors

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureDataset:
    """A training sequence for each thing that a record can be used for.

    Args:
        records: pictures and texts.
        pictures: the transforms and the autoencoder of the model.
        tokenizer: of the model.
        config: how times, noise and dropout are drawn.
        tasks: which uses are trained; None is all.
        max_side: longest side of a picture in pixels; None is what the model takes.
        latent_cache: a directory in which latents are kept, so that each is encoded once.

    Raises:
        ValueError: no record can be used, or `max_side` is too small for a token.
    """

    def __init__(
        self,
        records: Records,
        pictures: ImageProcessor,
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
        self.samples = [
            (index, task)
            for index in range(len(records))
            for task in records.tasks(index)
            if task in wanted
        ]
        if not self.samples:
            names = ", ".join(sorted(task.value for task in wanted))
            raise ValueError(
                f"{WHERE}: a record must be of use for {names}, got none of {len(records)}"
            )
        self._records = records
        self._pictures = pictures
        self._tokenizer = tokenizer
        self._config = config or SequenceConfig()
        self._for_vae = _limited(pictures.for_vae, max_side)
        self._for_vit = _limited(pictures.for_vit, max_side)
        self._cache = latent_cache

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def autoencoder(self) -> AutoEncoder:
        """What encodes pictures into latents."""
        return self._pictures.vae

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns the sequence of one use of one record; see `SequenceDataset`."""
        number, task = self.samples[index]
        record = self._records.read(number)
        special = self._tokenizer.special_tokens
        if task is Task.UNDERSTANDING:
            return understanding_sequence(
                special,
                [self._for_vit(self._resized(record.image))],
                self._encode(record.question),
                self._encode(record.answer),
            )
        latent, ids = self._latent(self._resized(record.image)), self._encode(record.text)
        if record.source is None or task is Task.GENERATION:
            return generation_sequence(special, ids, latent, generator, self._config)
        image = self._resized(record.source)
        source = ContextImage(latent=self._latent(image), vit_pixels=self._for_vit(image))
        return editing_sequence(special, [source], ids, latent, generator, self._config)

    def _encode(self, text: str | None) -> list[int]:
        return self._tokenizer.encode(text.strip()) if text else []

    def _resized(self, image: Image) -> Image:
        """Returns the picture at its size for the VAE, which is what the ViT sees too."""
        return self._for_vae.resize(to_rgb(image))

    def _latent(self, image: Image) -> Tensor:
        pixels = self._for_vae(image)
        if self._cache is None:
            return self._pictures.vae.encode(pixels[None])[0].float().cpu()
        digest = hashlib.sha256(f"{list(pixels.shape)}".encode())
        digest.update(as_bytes(pixels.contiguous()).tobytes())
        path = self._cache / f"{digest.hexdigest()}.safetensors"
        if path.exists():
            specs = read_header(path).tensors
            if set(specs) != {"latent"}:
                raise ValueError(f"{path}: tensors must be one latent, got {list_some(specs)}")
            return read_tensor(specs["latent"], what=str(path))
        latent = self._pictures.vae.encode(pixels[None])[0].float().cpu()
        self._cache.mkdir(parents=True, exist_ok=True)
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
