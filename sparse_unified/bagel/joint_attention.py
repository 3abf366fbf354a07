# SPDX-License-Identifier: Apache-2.0
"""Attention of whole sequences at once, without a past: what training runs.

Sequences of one layout (the same kinds of segments, of the same lengths) lie next to each other in
both streams, so that a layer attends to all of them in one call, on views. Short sequences
with the same images are padded to one layout, for this call alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

UND, GEN = "", "_moe_gen"


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How the rows of a group become sequences of one length, and back.

    Attributes:
        rows: [B * length] int64, the row, in the group, of every token; any for padding.
        kept: [n] int64, the token of every row of the group.
    """

    rows: Tensor
    kept: Tensor


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sequences that are attended to in one call.

    Attributes:
        count: B, sequences.
        lengths: tokens of one sequence in the und and in the gen stream, padding included.
        mask: [L, L], or [B, 1, L, L] with padding, bool: row i sees column j; und tokens first,
            then gen tokens. None where every token sees all, or where `causal` says it all.
        causal: token i sees the tokens up to i.
        padding: by stream, where the sequences are not equally long.
    """

    count: int
    lengths: Mapping[str, int]
    mask: Tensor | None = None
    causal: bool = False
    padding: Mapping[str, Padding] | None = None

    def num_rows(self, stream: str) -> int:
        """Rows of a stream that belong to the group."""
        if self.padding is not None:
            return len(self.padding[stream].kept)
        return self.count * self.lengths[stream]

    def span(self, stream: str) -> slice:
        """Rows, and columns, of the mask that belong to a stream."""
        start = 0 if stream == UND else self.lengths[UND]
        return slice(start, start + self.lengths[stream])

    def is_part(self, streams: Sized) -> bool:
        """Whether one of the streams that have tokens here does not take part."""
        return len(streams) == 1 and all(self.lengths.values())

    def gathered(self, stream: str, rows: Tensor) -> Tensor:
        """Brings rows [n, ...] of the group to sequences [B, length, ...]."""
        if self.padding is not None:
            rows = rows.index_select(0, self.padding[stream].rows)
        return rows.unflatten(0, (self.count, self.lengths[stream]))

    def scattered(self, stream: str, sequences: Tensor) -> Tensor:
        """Undoes `gathered`."""
        rows = sequences.flatten(0, 1)
        if self.padding is not None:
            rows = rows.index_select(0, self.padding[stream].kept)
        return rows


@dataclass(frozen=True, kw_only=True)
class JointPacking:
    """Where the sequences of a batch lie in the two streams, and who sees whom.

    Attributes:
        groups: in the order in which they lie in the streams.
        und_angles, gen_angles: rotary cosines and sines of each token; None without gen tokens.
        text_rows, vit_rows: rows of the und stream of text and of ViT tokens; None when all are
            text.
        rows: rows of each group, by stream.
        masks: of the groups, 0 and -inf in the dtype of the queries, once they are `recording`.
        routed: takes the router logits [T, E] of the sparse blocks of a layer, by component.
    """

    groups: Sequence[Group]
    und_angles: tuple[Tensor, Tensor]
    gen_angles: tuple[Tensor, Tensor] | None = None
    text_rows: Tensor | None = None
    vit_rows: Tensor | None = None
    masks: Sequence[Tensor | None] = ()
    routed: dict[str, Tensor] | None = None
    rows: Mapping[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        rows = {s: [group.num_rows(s) for group in self.groups] for s in (UND, GEN)}
        object.__setattr__(self, "rows", rows)

    def recording(self, dtype: torch.dtype) -> JointPacking:
        """Returns the same with an empty `routed`, and masks to add to scores of `dtype`.

        Attention would turn a mask of bools into such a one in every layer.
        """
        masks = [
            None
            if group.mask is None
            else torch.zeros_like(group.mask, dtype=dtype).masked_fill_(~group.mask, -math.inf)
            for group in self.groups
        ]
        return replace(self, masks=masks, routed={})


def attend_jointly(
    heads: Mapping[str, Tensor],
    reads: Mapping[str, Sequence[int]],
    num_key_heads: int,
    packing: JointPacking,
) -> dict[str, Tensor]:
    """Lets every sequence attend to itself.

    Args:
        heads: queries, keys and values [N, H + 2 K, d] of each stream that takes part.
        reads: key heads that the queries of a stream read.
        num_key_heads: K.
        packing: how the streams divide into sequences; with masks, see `JointPacking.recording`.

    Returns:
        The mixed values [N, H * d] of each stream.
    """
    # One split: the gradients of slices would each be a tensor of the whole stream.
    split = [(stream, x.split(packing.rows[stream])) for stream, x in heads.items()]
    are_alike = all(len(read) == num_key_heads for read in reads.values())
    mixed: dict[str, list[Tensor]] = {stream: [] for stream in heads}
    for i, (group, mask) in enumerate(zip(packing.groups, packing.masks, strict=True)):
        own = {}
        for stream, parts in split:
            if group.lengths[stream]:
                own[stream] = group.gathered(stream, parts[i])
        if not own:
            continue
        outs = (
            _attend_alike(own, num_key_heads, group, mask)
            if are_alike
            else _attend_apart(own, reads, num_key_heads, group, mask)
        )
        for stream, out in outs.items():
            mixed[stream].append(group.scattered(stream, out))
    return {
        stream: parts[0] if len(parts) == 1 else torch.cat(parts) for stream, parts in mixed.items()
    }


def _attend_alike(
    own: Mapping[str, Tensor], num_key_heads: int, group: Group, mask: Tensor | None
) -> dict[str, Tensor]:
    """Returns the mixed values [B, n, H * d] of each stream of a group, all of which read all key
    heads.

    Args:
        own: queries, keys and values [B, n, H + 2 K, d] of each stream.
        mask: of the group.
    """
    parts = list(own.values())
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if mask is not None and group.is_part(own):
        columns = torch.cat([mask[..., group.span(stream)] for stream in own], dim=-1)
        mask = torch.cat([columns[..., group.span(stream), :] for stream in own], dim=-2)
    out = _mix(*_divided(joined, num_key_heads), mask=mask, causal=group.causal)
    if len(parts) == 1:
        return dict.fromkeys(own, out)
    return dict(zip(own, out.split([group.lengths[stream] for stream in own], dim=1), strict=True))


def _attend_apart(
    own: Mapping[str, Tensor],
    reads: Mapping[str, Sequence[int]],
    num_key_heads: int,
    group: Group,
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """Returns what `_attend_alike` does where a stream reads some of the key heads."""
    queries, keys, values = zip(*(_divided(x, num_key_heads) for x in own.values()), strict=True)
    key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    if mask is not None and group.is_part(own):
        mask = torch.cat([mask[..., group.span(stream)] for stream in own], dim=-1)
    mixed = {}
    for stream, query in zip(own, queries, strict=True):
        # Stacked views: an index would have to be copied to the device.
        own_key, own_value = (
            torch.stack([x[:, head] for head in reads[stream]], dim=1) for x in (key, value)
        )
        rows = None if mask is None else mask[..., group.span(stream), :]
        mixed[stream] = _mix(query, own_key, own_value, mask=rows, causal=group.causal)
    return mixed


def _divided(heads: Tensor, num_key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes [B, n, H + 2 K, d] apart: queries [B, H, n, d], keys and values [B, K, n, d]."""
    sizes = [heads.shape[2] - 2 * num_key_heads, num_key_heads, num_key_heads]
    query, key, value = heads.transpose(1, 2).split(sizes, dim=1)
    return query, key, value


def _mix(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of queries [B, H, n, d] to keys and values [B, K, m, d]: [B, n, H * d]."""
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(2)
