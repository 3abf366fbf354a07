# SPDX-License-Identifier: Apache-2.0
"""How training sequences are packed into a batch: `pack_training`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.embeddings import grid_positions, rotary_angles
from sparse_unified.bagel.joint_attention import Group, JointPacking
from sparse_unified.bagel.layouts import (
    CLEAN,
    NOISED,
    TEXT,
    VIT,
    Layout,
    make_groups,
    streams_of,
)
from sparse_unified.bagel.segments import (
    LatentSegment,
    Segment,
    TextSegment,
    TrainingBatch,
    VitSegment,
)
from sparse_unified.bagel.vision import patchify


@dataclass(slots=True)
class _Rows:
    """What is collected while sequences are laid out."""

    ids: list[int] = field(default_factory=list)
    und_positions: list[int] = field(default_factory=list)
    gen_positions: list[int] = field(default_factory=list)
    is_vit: list[bool] = field(default_factory=list)
    vit_lengths: list[int] = field(default_factory=list)
    latent_lengths: list[int] = field(default_factory=list)
    label_rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    latents: list[LatentSegment] = field(default_factory=list)

    def add(
        self, config: BagelConfig, layout: Layout, sequences: Sequence[Sequence[Segment]]
    ) -> None:
        """Adds sequences of one layout."""
        streams, count = streams_of(layout), len(sequences)
        self.und_positions += streams.und_positions * count
        self.gen_positions += streams.gen_positions * count
        self.is_vit += streams.is_vit * count
        self.vit_lengths += streams.vit_lengths * count
        self.latent_lengths += streams.latent_lengths * count
        markers = config.special_tokens.start_of_image, config.special_tokens.end_of_image
        start, end = markers
        ids = self.ids
        for sequence in sequences:
            lengths = iter(streams.vit_lengths)
            for segment in sequence:
                if isinstance(segment, TextSegment):
                    if segment.predict:
                        self.label_rows += range(len(ids), len(ids) + len(segment.token_ids) - 1)
                        self.labels += segment.token_ids[1:]
                    ids += segment.token_ids
                elif isinstance(segment, VitSegment):
                    ids += (start, *[0] * next(lengths), end)
                    self.pixels.append(segment.pixels)
                else:
                    ids += markers
                    self.latents.append(segment)


def _layout(
    config: BagelConfig, sequence: Sequence[Segment], known: dict[tuple[str, torch.Size], int]
) -> Layout:
    """Checks a sequence and returns the kinds and lengths of its segments.

    Args:
        known: patches of images that fit, by name and shape; those of this sequence are added.

    Raises:
        ValueError: it is empty, or a segment does not fit the model.
    """
    if not sequence:
        raise ValueError("pack_training: a sequence must have at least one segment, got none")
    vocab_size = config.llm.vocab_size
    layout = []
    text_length = 0
    for segment in sequence:
        if isinstance(segment, TextSegment):
            ids = segment.token_ids
            if not ids:
                raise ValueError("pack_training: token_ids must hold at least one id, got none")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(
                    f"pack_training: token_ids must be from 0 to {vocab_size - 1}, "
                    f"got {min(ids) if min(ids) < 0 else max(ids)}"
                )
            text_length += len(ids)
            continue
        if text_length:
            layout.append((TEXT, text_length))
            text_length = 0
        if isinstance(segment, VitSegment):
            key = ("pixels", segment.pixels.shape)
            if key not in known:
                known[key] = _patches(
                    *key,
                    config.vision.num_channels,
                    config.vision.patch_size,
                    config.vit_max_num_patch_per_side,
                )
            layout.append((VIT, known[key]))
        else:
            key = ("latent", segment.latent.shape)
            if key not in known:
                known[key] = _patches(
                    *key,
                    config.token_channels // config.latent_patch_size**2,
                    config.latent_patch_size,
                    config.max_latent_size,
                )
            layout.append((CLEAN if segment.time is None else NOISED, known[key]))
    if text_length:
        layout.append((TEXT, text_length))
    return tuple(layout)


def _patches(name: str, shape: torch.Size, channels: int, patch: int, side: int) -> int:
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(
            f"pack_training: {name} must have shape [{channels}, height, width], got {list(shape)}"
        )
    height, width = shape[1:]
    if height % patch or width % patch or not 0 < max(height, width) <= side * patch:
        raise ValueError(
            f"pack_training: sides of {name} must be multiples of {patch} up to {side * patch}, "
            f"got {height} x {width}"
        )
    return (height // patch) * (width // patch)


def _patchify_all(images: Sequence[Tensor], patch: int) -> Tensor:
    """Cuts images [C, h, w] into patches, one image after the other: [N, p * p * C]."""
    if len({image.shape for image in images}) == 1:
        # Stacked one below the other, they are one tall image.
        return patchify(torch.stack(list(images), dim=1).flatten(1, 2), patch)
    return torch.cat([patchify(image, patch) for image in images])


def _grids(images: Sequence[Tensor], patch: int, side: int) -> Tensor:
    shapes = [image.shape for image in images]
    grids = {
        shape: grid_positions(shape[1] // patch, shape[2] // patch, side)
        for shape in dict.fromkeys(shapes)
    }
    return torch.cat([grids[shape] for shape in shapes])


def pack_training(
    config: BagelConfig,
    sequences: Sequence[Sequence[Segment]],
    *,
    device: torch.device | str = "cpu",
) -> TrainingBatch:
    """Packs sequences for `training_forward`, on the CPU; those with the same images come to lie
    together.

    Args:
        config: of the model.
        sequences: at least one, each of at least one segment; markers of images are added here.
        device: that the batch is moved to then.

    Raises:
        ValueError: there is no sequence, or one does not fit the model.
    """
    if not sequences:
        raise ValueError("pack_training: sequences must hold at least one sequence, got none")
    by_layout: dict[Layout, list[Sequence[Segment]]] = {}
    known: dict[tuple[str, torch.Size], int] = {}
    for sequence in sequences:
        by_layout.setdefault(_layout(config, sequence, known), []).append(sequence)
    # Those with the same images: a text may be shorter, or left out.
    by_images: dict[tuple[str, ...], dict[Layout, list[Sequence[Segment]]]] = {}
    for layout, members in by_layout.items():
        images = tuple(kind for kind, _ in layout if kind != TEXT)
        by_images.setdefault(images, {})[layout] = members
    rows, groups = _Rows(), []
    for near in by_images.values():
        for layout, members in near.items():
            rows.add(config, layout, members)
        groups += make_groups([(layout, len(members)) for layout, members in near.items()])
    return _batch(config, rows, groups, len(sequences)).to(device)


def _batch(
    config: BagelConfig, rows: _Rows, groups: list[Group], num_sequences: int
) -> TrainingBatch:
    vision, patch = config.vision, config.latent_patch_size
    num_und, num_gen = len(rows.ids), len(rows.gen_positions)

    def integers(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64)

    def angles(positions: list[int]) -> tuple[Tensor, Tensor]:
        return rotary_angles(integers(positions), config.llm.head_dim, config.llm.rope_theta)

    is_vit = torch.tensor(rows.is_vit, dtype=torch.bool)
    clean = [s.latent for s in rows.latents]
    times = torch.tensor([s.time or 0.0 for s in rows.latents])
    time_rows = None
    latents, velocity_rows = None, torch.empty(0, dtype=torch.int64)
    velocities = torch.empty(0, config.token_channels)
    if clean:
        time_rows = torch.arange(len(clean)).repeat_interleave(torch.tensor(rows.latent_lengths))
        asked = torch.tensor([s.time is not None for s in rows.latents])[time_rows]
        data = _patchify_all(clean, patch).float().cpu()
        noise = [torch.zeros_like(s.latent) if s.noise is None else s.noise for s in rows.latents]
        noises = _patchify_all(noise, patch).float().cpu()
        time = times[time_rows][:, None]
        latents = (1 - time) * data + time * noises
        velocity_rows = asked.nonzero()[:, 0]
        velocities = (noises - data)[velocity_rows]
    vit = rows.pixels
    return TrainingBatch(
        und_ids=integers(rows.ids),
        label_rows=integers(rows.label_rows),
        labels=integers(rows.labels),
        vit_patches=_patchify_all(vit, vision.patch_size).float().cpu() if vit else None,
        vit_positions=(
            integers(_grids(vit, vision.patch_size, config.vit_max_num_patch_per_side))
            if vit
            else None
        ),
        vit_lengths=tuple(rows.vit_lengths),
        latents=latents,
        latent_positions=integers(_grids(clean, patch, config.max_latent_size)) if clean else None,
        times=times if clean else None,
        time_rows=time_rows,
        velocity_rows=velocity_rows,
        velocities=velocities,
        packing=JointPacking(
            groups=groups,
            und_angles=angles(rows.und_positions),
            gen_angles=angles(rows.gen_positions) if num_gen else None,
            text_rows=integers((~is_vit).nonzero()[:, 0]) if vit else None,
            vit_rows=integers(is_vit.nonzero()[:, 0]) if vit else None,
        ),
        text_tokens=len(rows.labels),
        image_tokens=len(velocity_rows),
        num_tokens=num_und + num_gen,
        num_sequences=num_sequences,
    )
