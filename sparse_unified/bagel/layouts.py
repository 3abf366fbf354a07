# SPDX-License-Identifier: Apache-2.0
"""Layouts of training sequences: who sees whom in one, and which are attended to together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_unified.bagel.joint_attention import GEN, UND, Group, Padding

# Kind and number of tokens, without markers, of each segment of a sequence.
Layout = tuple[tuple[str, int], ...]
TEXT, VIT, CLEAN, NOISED = "text", "vit", "clean", "noised"
MARKERS = 2

# Padding pays where calls cost more than what they compute: short sequences, little of it.
_MOST_PADDED_TOKENS = 256
_MOST_PADDED_COST = 2.0


def stream_lengths(layout: Layout) -> dict[str, int]:
    """Returns the tokens of a sequence in each stream."""
    gen = sum(length for kind, length in layout if kind in (CLEAN, NOISED))
    markers = MARKERS * sum(kind != TEXT for kind, _ in layout)
    return {UND: sum(length for _, length in layout) - gen + markers, GEN: gen}


def stream_positions(layout: Layout) -> tuple[list[int], list[int]]:
    """Returns the rotary positions of the tokens of a sequence in the und and the gen stream."""
    und: list[int] = []
    gen: list[int] = []
    position = 0
    for kind, length in layout:
        if kind == TEXT:
            und += range(position, position + length)
            position += length
            continue
        if kind == VIT:
            und += [position] * length
        else:
            gen += [position] * length
        und += [position] * MARKERS
        position += kind != NOISED
    return und, gen


@lru_cache(maxsize=1024)
def _mask(layout: Layout) -> tuple[Tensor | None, bool]:
    """Returns who sees whom ([L, L] bool, und tokens first; None for all), and if it is causal."""
    if all(kind == TEXT for kind, _ in layout):
        return None, True
    segment: list[list[int]] = [[], []]  # of each und, of each gen token
    for i, (kind, length) in enumerate(layout):
        segment[0] += [i] * (length if kind == TEXT else MARKERS)
        if kind == VIT:
            segment[0] += [i] * length
        elif kind in (CLEAN, NOISED):
            segment[1] += [i] * length
    of = torch.tensor(segment[0] + segment[1])
    noised = torch.tensor([kind == NOISED for kind, _ in layout])[of]
    text = torch.tensor([kind == TEXT for kind, _ in layout])[of]
    index = torch.arange(len(of))
    same = of[:, None] == of
    before = (of[:, None] > of) & ~noised
    mask = before | same & (~text[:, None] | (index[:, None] >= index))
    return (None if bool(mask.all()) else mask), False


def make_groups(layouts: Sequence[tuple[Layout, int]], device: torch.device | str) -> list[Group]:
    """Groups sequences of one order of kinds, which lie in the streams as they are given.

    Args:
        layouts: different layouts, each with its number of sequences.
        device: of the masks.

    Returns:
        One padded group, or one group a layout where padding would cost too much.
    """
    lengths = [stream_lengths(layout) for layout, _ in layouts]
    counts = [count for _, count in layouts]
    longest = {stream: max(own[stream] for own in lengths) for stream in (UND, GEN)}
    most = sum(longest.values())
    needed = sum(sum(own.values()) ** 2 * n for own, n in zip(lengths, counts, strict=True))
    pays = most <= _MOST_PADDED_TOKENS and most**2 * sum(counts) <= _MOST_PADDED_COST * needed
    if len(layouts) > 1 and pays:
        return [_padded(layouts, lengths, longest, device)]
    groups = []
    for (layout, count), own in zip(layouts, lengths, strict=True):
        mask, causal = _mask(layout)
        groups.append(
            Group(
                count=count,
                lengths=own,
                mask=None if mask is None else mask.to(device),
                causal=causal,
            )
        )
    return groups


def _padded(
    layouts: Sequence[tuple[Layout, int]],
    lengths: Sequence[dict[str, int]],
    longest: dict[str, int],
    device: torch.device | str,
) -> Group:
    counts = torch.tensor([count for _, count in layouts])
    most = sum(longest.values())
    # Every token sees itself, padding too, so that no row of scores is empty.
    masks = torch.eye(most, dtype=torch.bool).repeat(len(layouts), 1, 1)
    for mask, (layout, _), own in zip(masks, layouts, lengths, strict=True):
        at = torch.cat([torch.arange(own[UND]), longest[UND] + torch.arange(own[GEN])])
        seen, _ = _mask(layout)
        if seen is None:
            seen = torch.ones(len(at), len(at), dtype=torch.bool)
            seen = seen.tril() if all(kind == TEXT for kind, _ in layout) else seen
        mask[at[:, None], at] = seen
    padding = {}
    for stream, length in longest.items():
        own_lengths = torch.tensor([own[stream] for own in lengths]).repeat_interleave(counts)
        is_token = torch.arange(length) < own_lengths[:, None]  # [B, length]
        kept = is_token.flatten().nonzero()[:, 0]
        rows = (is_token.flatten().cumsum(0) - 1).clamp_(min=0)
        padding[stream] = Padding(rows=rows.to(device), kept=kept.to(device))
    return Group(
        count=int(counts.sum()),
        lengths=longest,
        mask=masks.repeat_interleave(counts, dim=0)[:, None].to(device),
        padding=padding,
    )
