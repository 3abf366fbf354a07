# SPDX-License-Identifier: Apache-2.0
"""Attention of whole sequences at once, without a past: what training runs.

Sequences of one layout (the same kinds of segments, of the same lengths) lie next to each other in
both streams, so that a layer attends to all of them in one call, on views. Short sequences of
nearly one layout are padded to one, for this call alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

UND, GEN = "", "_moe_gen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How the rows of a group become sequences of one length, and back.

    Attributes:
        rows: [B * length] int64, the row, in the group, of every token; any for padding.
        kept: [n] int64, the token of every row of the group.
    """

    rows: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences that are attended to in one call.

    Attributes:
        count: B, sequences.
        lengths: tokens of one sequence in the und and in the gen stream, padding included.
        mask: [L, L], or [B, 1, L, L] with padding, row i sees column j; und tokens first, then gen
            tokens. Bool, or 0 and -inf in the dtype of the queries. None where every token sees
            all, or where `causal` says it all.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPacking:
    """Where the sequences of a batch lie in the two streams, and who sees whom.

    Attributes:
        groups: in the order in which they lie in the streams.
        und_angles, gen_angles: rotary cosines and sines of each token; None without gen tokens.
        text_rows, vit_rows: rows of the und stream of text and of ViT tokens; None when all are
            text.
        routed: takes the router logits [T, E] of the sparse blocks of a layer, by component.
    """

    groups: Sequence[Group]
    und_angles: tuple[Tensor, Tensor]
    gen_angles: tuple[Tensor, Tensor] | None = None
    text_rows: Tensor | None = None
    vit_rows: Tensor | None = None
    routed: dict[str, Tensor] | None = None

    def recording(self, dtype: torch.dtype) -> JointPacking:
        """Returns the same with an empty `routed`, and masks to add to scores of `dtype`.

        Attention would turn a mask of bools into such a one in every layer.
        """
        groups = [
            group
            if group.mask is None
            else replace(
                group,
                mask=torch.zeros_like(group.mask, dtype=dtype).masked_fill_(~group.mask, -math.inf),
            )
            for group in self.groups
        ]
        return replace(self, groups=groups, routed={})


def attend_jointly(
    heads: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    reads: Mapping[str, Sequence[int]],
    groups: Sequence[Group],
) -> dict[str, Tensor]:
    """Lets every sequence attend to itself.

    Args:
        heads: queries [N, H, d], keys and values [N, K, d] of each stream that takes part.
        reads: key heads that the queries of a stream read.
        groups: how the streams divide into sequences.

    Returns:
        The mixed values [N, H * d] of each stream.
    """
    # One split a tensor: the gradients of slices would each be a tensor of the whole stream.
    split = {}
    for stream, parts in heads.items():
        rows = [group.num_rows(stream) for group in groups]
        split[stream] = [x.split(rows) for x in parts]
    mixed: dict[str, list[Tensor]] = {stream: [] for stream in heads}
    for i, group in enumerate(groups):
        own = {
            stream: [group.gathered(stream, x[i]) for x in parts]
            for stream, parts in split.items()
            if group.lengths[stream]
        }
        for stream, out in _attend(own, reads, group).items():
            mixed[stream].append(group.scattered(stream, out))
    return {stream: torch.cat(parts) for stream, parts in mixed.items()}


def _attend(
    own: Mapping[str, Sequence[Tensor]], reads: Mapping[str, Sequence[int]], group: Group
) -> dict[str, Tensor]:
    """Returns the mixed values [B, n, H * d] of each stream of a group."""
    if not own:
        return {}
    queries, keys, values = zip(*own.values(), strict=True)
    key, value = (torch.cat(parts, dim=1).transpose(1, 2) for parts in (keys, values))
    mask = group.mask
    # Of a group with tokens of both streams, one may not take part in this layer.
    is_part = mask is not None and key.shape[2] < mask.shape[-1]
    if mask is not None and is_part:
        mask = torch.cat([mask[..., group.span(stream)] for stream in own], dim=-1)
    if all(len(reads[stream]) == key.shape[1] for stream in own):
        if mask is not None and is_part:
            mask = torch.cat([mask[..., group.span(stream), :] for stream in own], dim=-2)
        out = _mix(torch.cat(queries, dim=1), key, value, mask, group.causal)
        lengths = [group.lengths[stream] for stream in own]
        return dict(zip(own, out.split(lengths, dim=1), strict=True))
    mixed = {}
    for stream, (query, _, _) in own.items():
        # Stacked views: an index would have to be copied to the device.
        own_key, own_value = (
            torch.stack([x[:, head] for head in reads[stream]], dim=1) for x in (key, value)
        )
        rows = None if mask is None else mask[..., group.span(stream), :]
        mixed[stream] = _mix(query, own_key, own_value, rows, group.causal)
    return mixed


def _mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of queries [B, n, H, d] to keys and values [B, K, m, d]: [B, n, H * d]."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[2] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(2)
