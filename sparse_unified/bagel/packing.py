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
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_unified._common import context
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
        if (self.time is None) != (self.noise is None):
            only = "noise" if self.time is None else "time"
            raise ValueError(f"time and noise must be given together, got only {only}")
        if self.time is not None and not 0 <= self.time <= 1:
            raise ValueError(f"time must be from 0 to 1, got {self.time}")
        if self.noise is not None and self.noise.shape != self.latent.shape:
            raise ValueError(
                f"noise must have the shape of latent, {list(self.latent.shape)}, "
                f"got {list(self.noise.shape)}"
            )


Segment = TextSegment | VitSegment | LatentSegment


# Without slots, as what it holds: between processes, those are copied one by one in Python.
@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Packed sequences. U und tokens, G gen tokens, all tensors on one device.

    Attributes:
        und_ids: [U] int64, ids of text and markers; 0 where a ViT token stands.
        label_rows: [n] int64, rows of the und stream that the text loss is taken at.
        labels: [n] int64, the token that follows each.
        vit_patches: [V, p * p * 3].
        vit_positions: [V] int64, in the tables of the ViT and of the decoder alike.
        vit_lengths: patches of each image.
        latents: [G, p * p * C] fp32, noised.
        latent_positions: [G] int64.
        times: [images] fp32.
        time_rows: [G] int64, the image of each token.
        velocity_rows: [m] int64, gen tokens the loss asks for.
        velocities: [m, p * p * C] fp32.
        packing: rotary positions, groups and masks.
        text_tokens: n.
        image_tokens: m.
        num_tokens: U + G.
        num_sequences: how many.
    """

    und_ids: Tensor
    label_rows: Tensor
    labels: Tensor
    vit_patches: Tensor | None
    vit_positions: Tensor | None
    vit_lengths: tuple[int, ...]
    latents: Tensor | None
    latent_positions: Tensor | None
    times: Tensor | None
    time_rows: Tensor | None
    velocity_rows: Tensor
    velocities: Tensor
    packing: Packing
    text_tokens: int
    image_tokens: int
    num_tokens: int
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


# Kind and number of tokens, without markers, of each segment of a sequence. Texts that follow each
# other are one: they see, and are seen, alike.
_Layout = tuple[tuple[str, int], ...]
_KINDS = _TEXT, _VIT, _CLEAN, _NOISED = "text", "vit", "clean", "noised"
_MARKERS = 2  # around each image

# Padding pays where calls cost more than what they compute: short sequences, little of it.
_MOST_PADDED_TOKENS = 256
_MOST_PADDED_COST = 2.0


class _Streams(NamedTuple):
    """The tokens of a sequence in the und and in the gen stream."""

    und_positions: list[int]  # rotary
    gen_positions: list[int]
    und_tags: list[int]  # the segment, counted from 0, and the kind of each token, as one number
    gen_tags: list[int]
    is_vit: list[bool]  # which und tokens are seen through the ViT; markers around them are not
    vit_lengths: list[int]  # tokens of each image
    latent_lengths: list[int]

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens in each stream."""
        return {UND: len(self.und_tags), GEN: len(self.gen_tags)}


# Few: of an image of 1024 x 1024 pixels the lists are half a megabyte.
@lru_cache(maxsize=64)
def _streams_of(layout: _Layout) -> _Streams:
    """Returns the tokens of a sequence, to be read only."""
    streams = _Streams([], [], [], [], [], [], [])
    und_positions, gen_positions, und_tags, gen_tags, is_vit, vit_lengths, latent_lengths = streams
    position = 0
    for i, (kind, length) in enumerate(layout):
        tag = _tag(i, kind)
        if kind == _TEXT:
            und_positions += range(position, position + length)
            und_tags += [tag] * length
            is_vit += [False] * length
            position += length
            continue
        inside = length if kind == _VIT else 0
        und_positions += [position] * (inside + _MARKERS)
        und_tags += [tag] * (inside + _MARKERS)
        is_vit += [False, *[True] * inside, False]
        if kind == _VIT:
            vit_lengths.append(length)
        else:
            latent_lengths.append(length)
            gen_positions += [position] * length
            gen_tags += [tag] * length
        position += kind != _NOISED
    return streams


def _tag(segment: int, kind: str) -> int:
    return segment * len(_KINDS) + _KINDS.index(kind)


def _masks(many: Sequence[_Streams], lengths: Mapping[str, int]) -> Tensor:
    """Returns who sees whom in sequences that are padded to so many tokens: [n, L, L] bool.

    Padding is a segment before all others, and a noised one: it sees itself, so that no row of
    scores is empty, and nothing sees it.
    """
    padding = _tag(-1, _NOISED)
    rows = []
    for streams in many:
        und = streams.und_tags + [padding] * (lengths[UND] - len(streams.und_tags))
        gen = streams.gen_tags + [padding] * (lengths[GEN] - len(streams.gen_tags))
        rows.append(und + gen)
    tags = torch.tensor(rows)
    segment, kind = tags // len(_KINDS), tags % len(_KINDS)
    is_text, is_noised = kind == _KINDS.index(_TEXT), kind == _KINDS.index(_NOISED)
    index = torch.arange(tags.shape[1])
    same = segment[:, :, None] == segment[:, None]
    before = (segment[:, :, None] > segment[:, None]) & ~is_noised[:, None]
    return before | same & (~is_text[:, :, None] | (index[:, None] >= index))


def _make_groups(layouts: Sequence[tuple[_Layout, int]]) -> list[Group]:
    """Groups sequences of the same images, which lie in the streams as they are given.

    Args:
        layouts: different layouts, each with its number of sequences.

    Returns:
        One padded group, or one group a layout where padding would cost too much.
    """
    many, counts = [_streams_of(layout) for layout, _ in layouts], [n for _, n in layouts]
    longest = {s: max(streams.lengths[s] for streams in many) for s in (UND, GEN)}
    most = sum(longest.values())
    needed = sum(sum(s.lengths.values()) ** 2 * n for s, n in zip(many, counts, strict=True))
    pays = most <= _MOST_PADDED_TOKENS and most**2 * sum(counts) <= _MOST_PADDED_COST * needed
    if len(layouts) > 1 and pays:
        return [_padded(many, counts, longest)]
    groups = []
    for (layout, count), streams in zip(layouts, many, strict=True):
        causal = all(kind == _TEXT for kind, _ in layout)
        mask = None if causal else _masks([streams], streams.lengths)[0]
        if mask is not None and bool(mask.all()):
            mask = None
        groups.append(Group(count=count, lengths=streams.lengths, causal=causal, mask=mask))
    return groups


def _padded(many: Sequence[_Streams], counts: Sequence[int], longest: Mapping[str, int]) -> Group:
    repeats = torch.tensor(counts)
    padding = {}
    for stream in (UND, GEN):
        own_lengths = torch.tensor([streams.lengths[stream] for streams in many])
        last = own_lengths.repeat_interleave(repeats)[:, None]
        is_token = (torch.arange(longest[stream]) < last).flatten()  # [B * length]
        rows = (is_token.cumsum(0) - 1).clamp_(min=0)
        padding[stream] = Padding(rows=rows, kept=is_token.nonzero()[:, 0])
    masks = _masks(many, longest).repeat_interleave(repeats, dim=0)
    return Group(count=sum(counts), lengths=longest, mask=masks[:, None], padding=padding)


def _layout_of(config: BagelConfig, sequence: Sequence[Segment]) -> _Layout:
    """Checks a sequence and returns the kinds and lengths of its segments."""
    if not sequence:
        raise ValueError("a sequence must have at least one segment, got none")
    vocab_size = config.llm.vocab_size
    layout: list[tuple[str, int]] = []
    for segment in sequence:
        if isinstance(segment, TextSegment):
            ids = segment.token_ids
            if not ids:
                raise ValueError("token_ids must hold at least one id, got none")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(
                    f"token_ids must be from 0 to {vocab_size - 1}, "
                    f"got {min(ids) if min(ids) < 0 else max(ids)}"
                )
            kind, length = _TEXT, len(ids)
            if layout and layout[-1][0] == _TEXT:
                length += layout.pop()[1]
        elif isinstance(segment, VitSegment):
            channels, patch = config.vision.num_channels, config.vision.patch_size
            side = config.vit_max_num_patch_per_side
            kind, length = _VIT, _count("pixels", segment.pixels, channels, patch, side)
        else:
            channels, patch = config.latent_channels, config.latent_patch_size
            kind = _CLEAN if segment.time is None else _NOISED
            length = _count("latent", segment.latent, channels, patch, config.max_latent_size)
        layout.append((kind, length))
    return tuple(layout)


def _count(name: str, image: Tensor, channels: int, patch: int, side: int) -> int:
    """Returns the patches of an image that fits the model."""
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(
            f"{name} must have shape [{channels}, height, width], got {list(image.shape)}"
        )
    height, width = image.shape[1:]
    if height % patch or width % patch or not 0 < max(height, width) <= side * patch:
        raise ValueError(
            f"sides of {name} must be multiples of {patch} up to {side * patch}, "
            f"got {height} x {width}"
        )
    return (height // patch) * (width // patch)


def _patchify_all(images: Sequence[Tensor], patch: int) -> Tensor:
    """Cuts images [C, h, w] into patches, one image after the other: [N, p * p * C] fp32."""
    if len({image.shape for image in images}) == 1:
        # Stacked one below the other, they are one tall image.
        patches = patchify(torch.stack(list(images), dim=1).flatten(1, 2), patch)
    else:
        patches = torch.cat([patchify(image, patch) for image in images])
    return patches.float().cpu()


def _grids(images: Sequence[Tensor], patch: int, side: int) -> Tensor:
    sizes = [image.shape[1:] for image in images]
    return torch.cat([grid_positions(h // patch, w // patch, side) for h, w in sizes])


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
    if not sequences:
        raise ValueError("sequences must hold at least one sequence, got none")
    # By their images first: a text may be shorter, or left out.
    near: dict[tuple[str, ...], dict[_Layout, list[Sequence[Segment]]]] = {}
    for sequence in sequences:
        layout = _layout_of(config, sequence)
        images = tuple(kind for kind, _ in layout if kind != _TEXT)
        near.setdefault(images, {}).setdefault(layout, []).append(sequence)
    groups = []
    for layouts in near.values():
        groups += _make_groups([(layout, len(own)) for layout, own in layouts.items()])
    ordered = [pair for layouts in near.values() for pair in layouts.items()]
    return _batch(config, ordered, groups, len(sequences)).to(device)


def _batch(
    config: BagelConfig,
    ordered: Sequence[tuple[_Layout, Sequence[Sequence[Segment]]]],
    groups: list[Group],
    num_sequences: int,
) -> TrainingBatch:
    def repeated(name: str) -> list[Any]:
        return [
            value
            for layout, members in ordered
            for value in getattr(_streams_of(layout), name) * len(members)
        ]

    def angles(positions: list[int]) -> tuple[Tensor, Tensor]:
        return rotary_angles(torch.tensor(positions), config.llm.head_dim, config.llm.rope_theta)

    ids, label_rows, labels = _tokens(config, ordered)
    segments = [s for _, members in ordered for sequence in members for s in sequence]
    vit = [s.pixels for s in segments if isinstance(s, VitSegment)]
    images = [s for s in segments if isinstance(s, LatentSegment)]
    clean = [s.latent for s in images]
    is_vit = torch.tensor(repeated("is_vit"), dtype=torch.bool)
    vit_patch, vit_side = config.vision.patch_size, config.vit_max_num_patch_per_side
    patch, side = config.latent_patch_size, config.max_latent_size
    latents = times = time_rows = None
    velocity_rows = torch.empty(0, dtype=torch.int64)
    velocities = torch.empty(0, config.token_channels)
    if clean:
        times = torch.tensor([s.time or 0.0 for s in images])
        lengths = torch.tensor(repeated("latent_lengths"))
        time_rows = torch.arange(len(clean)).repeat_interleave(lengths)
        asked = torch.tensor([s.time is not None for s in images])[time_rows]
        data = _patchify_all(clean, patch)
        noise = [torch.zeros_like(s.latent) if s.noise is None else s.noise for s in images]
        noises = _patchify_all(noise, patch)
        time = times[time_rows][:, None]
        latents = (1 - time) * data + time * noises
        velocity_rows = asked.nonzero()[:, 0]
        velocities = (noises - data)[velocity_rows]
    return TrainingBatch(
        und_ids=torch.tensor(ids),
        label_rows=torch.tensor(label_rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        vit_patches=_patchify_all(vit, vit_patch) if vit else None,
        vit_positions=_grids(vit, vit_patch, vit_side) if vit else None,
        vit_lengths=tuple(repeated("vit_lengths")),
        latents=latents,
        latent_positions=_grids(clean, patch, side) if clean else None,
        times=times,
        time_rows=time_rows,
        velocity_rows=velocity_rows,
        velocities=velocities,
        packing=Packing(
            groups=groups,
            und_angles=angles(repeated("und_positions")),
            gen_angles=angles(repeated("gen_positions")) if clean else None,
            text_rows=(~is_vit).nonzero()[:, 0] if vit else None,
            vit_rows=is_vit.nonzero()[:, 0] if vit else None,
        ),
        text_tokens=len(labels),
        image_tokens=len(velocity_rows),
        num_tokens=len(ids) + (0 if latents is None else len(latents)),
        num_sequences=num_sequences,
    )


def _tokens(
    config: BagelConfig, ordered: Sequence[tuple[_Layout, Sequence[Sequence[Segment]]]]
) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of the und stream, and the rows and labels of the text loss."""
    ids: list[int] = []
    label_rows: list[int] = []
    labels: list[int] = []
    start, end = config.special_tokens.start_of_image, config.special_tokens.end_of_image
    for layout, members in ordered:
        for sequence in members:
            vit_lengths = iter(_streams_of(layout).vit_lengths)
            for segment in sequence:
                if isinstance(segment, TextSegment):
                    if segment.predict:
                        label_rows += range(len(ids), len(ids) + len(segment.token_ids) - 1)
                        labels += segment.token_ids[1:]
                    ids += segment.token_ids
                else:
                    inside = next(vit_lengths) if isinstance(segment, VitSegment) else 0
                    ids += (start, *[0] * inside, end)
    return ids, label_rows, labels
