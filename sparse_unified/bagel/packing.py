# SPDX-License-Identifier: Apache-2.0
"""Training sequences: the segments they consist of, and how a batch of them is packed.

A sequence is a list of segments. Text is causal; an image attends to all of itself; both attend to
what comes before them in their sequence, except noised latents, which nothing after them sees.
Rotary positions are those of inference: a token of text takes one, an image takes one for all its
tokens, and a noised image leaves its position to what follows.

Source: the packed training sequences of BAGEL (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import context, require
from sparse_unified.bagel.attention import GEN, UND, Group, Packing, Padding, rotary_angles
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.vision import grid_positions, patchify


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSegment:
    """Text, as token ids with bos and eos.

    Attributes:
        token_ids: at least one id.
        predict: the loss asks for every token after the first.
    """

    token_ids: Sequence[int]
    predict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VitSegment:
    """An image seen through the ViT: normalised pixels [3, H, W]."""

    pixels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSegment:
    """An image as its scaled VAE latent.

    Attributes:
        latent: [C, h, w], clean.
        time: None for an image that is looked at (time 0); else what the loss asks for: the
            velocity noise - latent at (1 - time) * latent + time * noise.
        noise: [C, h, w], with a time only.
    """

    latent: Tensor
    time: float | None = None
    noise: Tensor | None = None

    @context("LatentSegment")
    def __post_init__(self) -> None:
        are_together = (self.time is None) == (self.noise is None)
        found = "only noise" if self.time is None else "only time"
        require(are_together, "time and noise must be given together", found)
        if self.time is not None and self.noise is not None:
            require(0 <= self.time <= 1, "time must be from 0 to 1", self.time)
            wanted, own = list(self.latent.shape), list(self.noise.shape)
            require(own == wanted, f"noise must have the shape of latent, {wanted}", own)


Segment = TextSegment | VitSegment | LatentSegment


# Without slots, as what it holds: between processes, those are copied one by one in Python.
@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Packed sequences. U und tokens, G gen tokens, all tensors on one device."""

    und_ids: Tensor  # [U] int64, ids of text and markers; 0 where a ViT token stands
    label_rows: Tensor  # [n] int64, rows of the und stream that the text loss is taken at
    labels: Tensor  # [n] int64, the token that follows each
    vit_patches: Tensor | None  # [V, p * p * 3]
    vit_positions: Tensor | None  # [V] int64, in the tables of the ViT and of the decoder alike
    vit_lengths: tuple[int, ...]  # patches of each image
    latents: Tensor | None  # [G, p * p * C] fp32, noised
    latent_positions: Tensor | None  # [G] int64
    times: Tensor | None  # [images] fp32
    time_rows: Tensor | None  # [G] int64, the image of each token
    velocity_rows: Tensor  # [m] int64, gen tokens the loss asks for
    velocities: Tensor  # [m, p * p * C] fp32
    packing: Packing  # rotary positions, groups and masks
    text_tokens: int  # n
    image_tokens: int  # m
    num_tokens: int  # U + G
    num_sequences: int

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Returns the same on a device."""
        if self.und_ids.device == torch.device(device):
            return self
        moved: TrainingBatch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init}
        return replace(value, **own)
    return value


_KINDS = _TEXT, _VIT, _CLEAN, _NOISED = range(4)
# Padding pays where calls cost more than what they compute: short sequences, little of it.
_MOST_PADDED_TOKENS = 256
_MOST_PADDED_COST = 2.0


class _Tokens:
    """A checked sequence: its tokens in either stream, and what the text loss asks for."""

    def __init__(self, config: BagelConfig, sequence: Sequence[Segment]) -> None:
        require(sequence, "a sequence must have at least one segment", "none")
        self.segments = sequence
        # Kind and number of tokens of each segment, without markers. Texts that follow each other
        # are one: they see, and are seen, alike.
        self.layout: list[tuple[int, int]] = []
        self.ids: list[int] = []  # -1 where a ViT token stands
        self.label_rows: list[int] = []
        self.labels: list[int] = []
        self.positions: dict[str, list[int]] = {UND: [], GEN: []}  # rotary
        # The segment of each token, counted from 0, and its kind, as one number.
        self.tags: dict[str, list[int]] = {UND: [], GEN: []}
        marks, position = config.special_tokens, 0
        ids: Sequence[int]
        for segment in sequence:
            kind, length = _measure(config, segment)
            before = 0
            if isinstance(segment, TextSegment):
                if segment.predict:
                    self.label_rows += range(len(self.ids), len(self.ids) + length - 1)
                    self.labels += segment.token_ids[1:]
                if self.layout and self.layout[-1][0] == _TEXT:
                    before = self.layout.pop()[1]
                ids = segment.token_ids
                self.positions[UND] += range(position, position + length)
            else:
                inside = length if kind == _VIT else 0
                ids = [marks.start_of_image, *[-1] * inside, marks.end_of_image]
                self.positions[UND] += [position] * len(ids)
            tag = len(self.layout) * len(_KINDS) + kind
            self.layout.append((kind, before + length))
            self.ids += ids
            self.tags[UND] += [tag] * len(ids)
            if kind in (_CLEAN, _NOISED):
                self.positions[GEN] += [position] * length
                self.tags[GEN] += [tag] * length
            position += {_TEXT: length, _NOISED: 0}.get(kind, 1)

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens in each stream."""
        return {stream: len(tags) for stream, tags in self.tags.items()}


def _measure(config: BagelConfig, segment: Segment) -> tuple[int, int]:
    """Returns the kind of a segment that fits the model, and its tokens without markers."""
    if isinstance(segment, TextSegment):
        ids, most = segment.token_ids, config.llm.vocab_size - 1
        require(ids, "token_ids must hold at least one id", "none")
        found = min(ids) if min(ids) < 0 else max(ids)
        require(0 <= found <= most, f"token_ids must be from 0 to {most}", found)
        return _TEXT, len(ids)
    if isinstance(segment, VitSegment):
        kind, name, image, channels = _VIT, "pixels", segment.pixels, config.vision.num_channels
        patch, side = config.vision.patch_size, config.vit_max_num_patch_per_side
    else:
        kind, name = _CLEAN if segment.time is None else _NOISED, "latent"
        image, channels = segment.latent, config.latent_channels
        patch, side = config.latent_patch_size, config.max_latent_size
    shape = list(image.shape)
    rule = f"{name} must have shape [{channels}, height, width]"
    require(len(shape) == 3 and shape[0] == channels, rule, shape)
    height, width = shape[1:]
    is_whole = height % patch == 0 and width % patch == 0
    fits = is_whole and 0 < max(height, width) <= side * patch
    rule = f"sides of {name} must be multiples of {patch} up to {side * patch}"
    require(fits, rule, f"{height} x {width}")
    return kind, (height // patch) * (width // patch)


def _masks(many: Sequence[_Tokens], lengths: Mapping[str, int]) -> Tensor:
    """Returns who sees whom in sequences that are padded to so many tokens: [n, L, L] bool."""
    # Padding is a segment before all others, and a noised one: it sees itself, so that no row of
    # scores is empty, and nothing sees it.
    padding = _NOISED - len(_KINDS)
    rows = []
    for tokens in many:
        padded = [own + [padding] * (lengths[s] - len(own)) for s, own in tokens.tags.items()]
        rows.append(padded[0] + padded[1])
    tags = torch.tensor(rows)
    segment, kind = tags // len(_KINDS), tags % len(_KINDS)
    is_text, is_noised = kind == _TEXT, kind == _NOISED
    index = torch.arange(tags.shape[1])
    same = segment[:, :, None] == segment[:, None]
    before = (segment[:, :, None] > segment[:, None]) & ~is_noised[:, None]
    return before | same & (~is_text[:, :, None] | (index[:, None] >= index))


def _groups(alike: Sequence[Sequence[_Tokens]]) -> list[Group]:
    """Groups sequences of the same images, those of one layout together: one padded group, or one
    a layout where padding would cost too much."""
    firsts, counts = [own[0] for own in alike], [len(own) for own in alike]
    longest = {s: max(tokens.lengths[s] for tokens in firsts) for s in (UND, GEN)}
    most = sum(longest.values())
    needed = sum(len(own) * sum(own[0].lengths.values()) ** 2 for own in alike)
    pays = most <= _MOST_PADDED_TOKENS and most**2 * sum(counts) <= _MOST_PADDED_COST * needed
    if len(alike) > 1 and pays:
        repeats = torch.tensor(counts)
        padding: dict[str, Padding] = {}
        for stream, length in longest.items():
            last = torch.tensor([tokens.lengths[stream] for tokens in firsts])
            is_token = torch.arange(length) < last.repeat_interleave(repeats)[:, None]
            is_token = is_token.flatten()  # [B * length]
            rows = (is_token.cumsum(0) - 1).clamp_(min=0)
            padding[stream] = Padding(rows=rows, kept=is_token.nonzero()[:, 0])
        masks = _masks(firsts, longest).repeat_interleave(repeats, dim=0)
        return [Group(count=sum(counts), lengths=longest, mask=masks[:, None], padding=padding)]
    groups = []
    for tokens, count in zip(firsts, counts, strict=True):
        causal = all(kind == _TEXT for kind, _ in tokens.layout)
        mask = None if causal else _masks([tokens], tokens.lengths)[0]
        if mask is not None and bool(mask.all()):
            mask = None
        groups.append(Group(count=count, lengths=tokens.lengths, causal=causal, mask=mask))
    return groups


def _cut(images: Sequence[Tensor], patch: int, side: int) -> tuple[Tensor, Tensor]:
    """Cuts images into patches, one image after the other: [N, p * p * C] fp32; and returns their
    places in a table of `side` x `side`."""
    grids = [(image.shape[1] // patch, image.shape[2] // patch, side) for image in images]
    patches = torch.cat([patchify(image, patch) for image in images])
    return patches.float().cpu(), torch.cat([grid_positions(*grid) for grid in grids])


@context("pack_training")
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
    """
    require(sequences, "sequences must hold at least one sequence", "none")
    # By their images first: a text may be shorter, or left out.
    near: dict[tuple[int, ...], dict[tuple[tuple[int, int], ...], list[_Tokens]]] = {}
    for sequence in sequences:
        tokens = _Tokens(config, sequence)
        images = tuple(kind for kind, _ in tokens.layout if kind != _TEXT)
        near.setdefault(images, {}).setdefault(tuple(tokens.layout), []).append(tokens)
    groups = [group for alike in near.values() for group in _groups(list(alike.values()))]
    ordered = [own for alike in near.values() for members in alike.values() for own in members]
    return _batch(config, ordered, groups).to(device)


def _batch(config: BagelConfig, ordered: Sequence[_Tokens], groups: list[Group]) -> TrainingBatch:
    def angles(stream: str) -> tuple[Tensor, Tensor]:
        positions = torch.tensor([n for own in ordered for n in own.positions[stream]])
        return rotary_angles(positions, config.llm.head_dim, config.llm.rope_theta)

    listed: list[int] = []
    label_rows: list[int] = []
    for own in ordered:
        label_rows += [len(listed) + row for row in own.label_rows]
        listed += own.ids
    ids = torch.tensor(listed)
    labels = [label for own in ordered for label in own.labels]
    layout = [part for own in ordered for part in own.layout]
    segments = [segment for own in ordered for segment in own.segments]
    vit = [s.pixels for s in segments if isinstance(s, VitSegment)]
    images = [s for s in segments if isinstance(s, LatentSegment)]
    vit_patches = vit_positions = latents = latent_positions = times = time_rows = None
    velocity_rows = torch.empty(0, dtype=torch.int64)
    velocities = torch.empty(0, config.token_channels)
    if vit:
        sizes = config.vision.patch_size, config.vit_max_num_patch_per_side
        vit_patches, vit_positions = _cut(vit, *sizes)
    if images:
        sizes = config.latent_patch_size, config.max_latent_size
        data, latent_positions = _cut([s.latent for s in images], *sizes)
        noise = [torch.zeros_like(s.latent) if s.noise is None else s.noise for s in images]
        noises = _cut(noise, *sizes)[0]
        times = torch.tensor([s.time or 0.0 for s in images])
        lengths = torch.tensor([length for kind, length in layout if kind in (_CLEAN, _NOISED)])
        time_rows = torch.arange(len(images)).repeat_interleave(lengths)
        time = times[time_rows][:, None]
        latents = (1 - time) * data + time * noises
        asked = torch.tensor([s.time is not None for s in images])[time_rows]
        velocity_rows = asked.nonzero()[:, 0]
        velocities = (noises - data)[velocity_rows]
    return TrainingBatch(
        und_ids=ids.clamp(min=0),
        label_rows=torch.tensor(label_rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        vit_patches=vit_patches,
        vit_positions=vit_positions,
        vit_lengths=tuple(length for kind, length in layout if kind == _VIT),
        latents=latents,
        latent_positions=latent_positions,
        times=times,
        time_rows=time_rows,
        velocity_rows=velocity_rows,
        velocities=velocities,
        packing=Packing(
            groups=groups,
            und_angles=angles(UND),
            gen_angles=angles(GEN) if images else None,
            text_rows=(ids >= 0).nonzero()[:, 0] if vit else None,
            vit_rows=(ids < 0).nonzero()[:, 0] if vit else None,
        ),
        text_tokens=len(labels),
        image_tokens=len(velocity_rows),
        num_tokens=len(ids) + (0 if latents is None else len(latents)),
        num_sequences=len(ordered),
    )
