# SPDX-License-Identifier: Apache-2.0
"""Layouts of training sequences: who sees whom in one, and which are attended to together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_unified.bagel.joint_attention import GEN, UND, Group, Padding

# Kind and number of tokens, without markers, of each segment of a sequence. Texts that follow each
# other are one: they see, and are seen, alike.
Layout = tuple[tuple[str, int], ...]
TEXT, VIT, CLEAN, NOISED = "text", "vit", "clean", "noised"
MARKERS = 2
_KINDS = (TEXT, VIT, CLEAN, NOISED)

# Padding pays where calls cost more than what they compute: short sequences, little of it.
_MOST_PADDED_TOKENS = 256
_MOST_PADDED_COST = 2.0


class Streams(NamedTuple):
    """The tokens of a sequence in the und and in the gen stream.

    Attributes:
        und_positions, gen_positions: rotary positions.
        und_tags, gen_tags: the segment, counted from 0, and the kind of each token, as one number.
        is_vit: which und tokens are seen through the ViT; the markers around them are not.
        vit_lengths, latent_lengths: tokens of each image.
    """

    und_positions: list[int]
    gen_positions: list[int]
    und_tags: list[int]
    gen_tags: list[int]
    is_vit: list[bool]
    vit_lengths: list[int]
    latent_lengths: list[int]

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens in each stream."""
        return {UND: len(self.und_tags), GEN: len(self.gen_tags)}


# Few: of an image of 1024 x 1024 pixels the lists are half a megabyte.
@lru_cache(maxsize=64)
def streams_of(layout: Layout) -> Streams:
    """Returns the tokens of a sequence, to be read only."""
    streams = Streams([], [], [], [], [], [], [])
    und_positions, gen_positions, und_tags, gen_tags, is_vit, vit_lengths, latent_lengths = streams
    position = 0
    for i, (kind, length) in enumerate(layout):
        tag = _tag(i, kind)
        if kind == TEXT:
            und_positions += range(position, position + length)
            und_tags += [tag] * length
            is_vit += [False] * length
            position += length
            continue
        if kind == VIT:
            und_positions += [position] * (length + MARKERS)
            und_tags += [tag] * (length + MARKERS)
            is_vit += [False, *[True] * length, False]
            vit_lengths.append(length)
        else:
            und_positions += [position] * MARKERS
            und_tags += [tag] * MARKERS
            is_vit += [False] * MARKERS
            latent_lengths.append(length)
            gen_positions += [position] * length
            gen_tags += [tag] * length
        position += kind != NOISED
    return streams


def _tag(segment: int, kind: str) -> int:
    return segment * len(_KINDS) + _KINDS.index(kind)


def _masks(many: Sequence[Streams], lengths: Mapping[str, int]) -> Tensor:
    """Returns who sees whom in sequences that are padded to so many tokens: [n, L, L] bool.

    Row i sees column j; und tokens come first. Padding is a segment before all others, and a noised
    one: it sees itself, so that no row of scores is empty, and nothing sees it.
    """
    padding = _tag(-1, NOISED)
    tags = torch.tensor(
        [
            [
                *streams.und_tags,
                *[padding] * (lengths[UND] - len(streams.und_tags)),
                *streams.gen_tags,
                *[padding] * (lengths[GEN] - len(streams.gen_tags)),
            ]
            for streams in many
        ]
    )
    segment, kind = tags // len(_KINDS), tags % len(_KINDS)
    is_text, is_noised = kind == _KINDS.index(TEXT), kind == _KINDS.index(NOISED)
    index = torch.arange(tags.shape[1])
    same = segment[:, :, None] == segment[:, None]
    before = (segment[:, :, None] > segment[:, None]) & ~is_noised[:, None]
    return before | same & (~is_text[:, :, None] | (index[:, None] >= index))


def _mask(layout: Layout) -> tuple[Tensor | None, bool]:
    """Returns who sees whom ([L, L] bool, und tokens first; None for all), and if it is causal."""
    if all(kind == TEXT for kind, _ in layout):
        return None, True
    streams = streams_of(layout)
    mask = _masks([streams], streams.lengths)[0]
    return (None if bool(mask.all()) else mask), False


def make_groups(layouts: Sequence[tuple[Layout, int]]) -> list[Group]:
    """Groups sequences of the same images, which lie in the streams as they are given.

    Args:
        layouts: different layouts, each with its number of sequences.

    Returns:
        One padded group, or one group a layout where padding would cost too much.
    """
    many = [streams_of(layout) for layout, _ in layouts]
    counts = [count for _, count in layouts]
    longest = {
        UND: max(len(streams.und_tags) for streams in many),
        GEN: max(len(streams.gen_tags) for streams in many),
    }
    most = sum(longest.values())
    needed = sum(
        (len(streams.und_tags) + len(streams.gen_tags)) ** 2 * count
        for streams, count in zip(many, counts, strict=True)
    )
    pays = most <= _MOST_PADDED_TOKENS and most**2 * sum(counts) <= _MOST_PADDED_COST * needed
    if len(layouts) > 1 and pays:
        return [_padded(many, counts, longest)]
    groups = []
    for (layout, count), streams in zip(layouts, many, strict=True):
        mask, causal = _mask(layout)
        groups.append(
            Group(
                count=count,
                lengths=streams.lengths,
                mask=mask,
                causal=causal,
            )
        )
    return groups


def _padded(
    many: Sequence[Streams],
    counts: Sequence[int],
    longest: Mapping[str, int],
) -> Group:
    repeats = torch.tensor(counts)
    padding = {}
    for stream, own_lengths in (
        (UND, [len(streams.und_tags) for streams in many]),
        (GEN, [len(streams.gen_tags) for streams in many]),
    ):
        last = torch.tensor(own_lengths).repeat_interleave(repeats)[:, None]
        is_token = torch.arange(longest[stream]) < last  # [B, length]
        kept = is_token.flatten().nonzero()[:, 0]
        rows = (is_token.flatten().cumsum(0) - 1).clamp_(min=0)
        padding[stream] = Padding(rows=rows, kept=kept)
    masks = _masks(many, longest).repeat_interleave(repeats, dim=0)
    return Group(count=sum(counts), lengths=longest, mask=masks[:, None], padding=padding)
