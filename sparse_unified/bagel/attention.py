# SPDX-License-Identifier: Apache-2.0
"""Attention of a mixture of transformers: two sets of projections, one attention over all tokens.

Tokens travel in two streams, und (text, markers, ViT) and gen (VAE latents). A stream is one packed
tensor that holds its tokens of every sequence, one sequence after the other; a `Packing` says where
each sequence lies and what it attends to. The streams meet only here. Shapes: U und tokens, G gen
tokens, B sequences of a group, H query heads, K KV heads, d = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.bagel.config import LLMConfig
from sparse_unified.nn import QueryProjection, key_heads_read

# The streams, by the suffix that their modules have in official keys.
UND, GEN = "", "_moe_gen"
COMPONENTS = {"und": UND, "gen": GEN}
_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class KVCache:
    """The KV cache of one sequence: keys and values [num_kv_heads, length, head_dim] per layer,
    which are replaced and never written to, so a fork costs nothing and shares them."""

    __slots__ = ("keys", "length", "position", "values")

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.length = 0  # tokens
        self.position = 0  # the next rotary position

    def fork(self) -> KVCache:
        """Returns a cache of the same past that grows on its own."""
        copy = KVCache(len(self.keys))
        copy.keys, copy.values = list(self.keys), list(self.values)
        copy.length, copy.position = self.length, self.position
        return copy

    def joined(
        self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], *, extend: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the past of a layer followed by `keys` and `values`, parts [1, n, num_kv_heads,
        head_dim], as [1, num_kv_heads, length, head_dim]; `extend` keeps them as the next past."""
        joined = []
        for past, parts in ((self.keys, keys), (self.values, values)):
            rows = tuple(part.transpose(1, 2) for part in parts)
            if (before := past[layer]) is not None:
                rows = (before[None], *rows)
            joined.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=2))
            if extend:  # not as a view, which would keep the queries beside it
                past[layer] = joined[-1][0].contiguous()
        key, value = joined
        return key, value

    def same_past(self, other: KVCache) -> bool:
        """Tells whether both are forks of one cache that nothing was added to."""
        return (
            self.length == other.length
            and self.position == other.position
            and all(mine is theirs for mine, theirs in zip(self.keys, other.keys, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How the rows of a group become sequences of one length, and back."""

    rows: Tensor  # [B * length] int64, the row, in the group, of every token; any for padding
    kept: Tensor  # [n] int64, the token of every row of the group


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sequences that are attended to in one call; one, where there is a KV cache."""

    count: int  # B, sequences
    lengths: Mapping[str, int]  # tokens of one sequence in each stream, padding included
    causal: bool = False  # token i sees the tokens up to i; else, without a mask, all
    # [L, L], or [B, 1, L, L] with padding: row i sees column j; und tokens first, then gen tokens.
    # bool, or 0 and -inf once it is `Packing.additive`.
    mask: Tensor | None = None
    padding: Mapping[str, Padding] | None = None  # by stream, where lengths are not equal
    cache: KVCache | None = None  # the past of the sequence

    def span(self, stream: str) -> slice:
        """Rows, and columns, of the mask that belong to a stream."""
        return slice(self.lengths[UND]) if stream == UND else slice(self.lengths[UND], None)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where sequences lie in the two streams, and what they attend to."""

    groups: Sequence[Group]  # in the order in which they lie in the streams
    und_angles: tuple[Tensor, Tensor]  # rotary cosines and sines of each und token
    gen_angles: tuple[Tensor, Tensor] | None = None  # of each gen token
    extend: bool = False  # KV caches take up the new keys and values
    # Rows of the und stream that hold text (None: all) and ViT tokens (None: none), for FFNs that
    # route the two apart.
    text_rows: Tensor | None = None
    vit_rows: Tensor | None = None
    rows: Mapping[str, list[int]] = field(init=False)  # of each group, by stream

    def __post_init__(self) -> None:
        rows = {
            stream: [
                len(group.padding[stream].kept)
                if group.padding is not None
                else group.count * group.lengths[stream]
                for group in self.groups
            ]
            for stream in (UND, GEN)
        }
        object.__setattr__(self, "rows", rows)

    def additive(self, dtype: torch.dtype) -> Packing:
        """Returns the same with masks to add to scores of `dtype`, made once for all layers."""
        groups = list(self.groups)
        for i, group in enumerate(groups):
            if (mask := group.mask) is not None:
                added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
                groups[i] = replace(group, mask=added)
        return replace(self, groups=groups)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns what heads at `positions` [n] are rotated by: cosines and sines, [n, 1, head_dim]
    fp32; the sines of the first half are negated."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**steps)
    angles = torch.cat([-angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def pack(
    config: LLMConfig,
    caches: Sequence[KVCache],
    und_lengths: Sequence[int],
    *,
    gen_lengths: Sequence[int] | None = None,
    causal: bool = False,
    extend: bool = False,
    text_rows: Tensor | None = None,
    vit_rows: Tensor | None = None,
    device: torch.device | str,
) -> Packing:
    """Packs sequences that follow what is in their KV caches. Causal tokens take consecutive
    positions; otherwise (an image) all share the next one."""

    def angles(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        starts = torch.tensor([cache.position for cache in caches])
        positions = starts.repeat_interleave(torch.tensor(lengths))
        if causal:
            positions += torch.cat([torch.arange(length) for length in lengths])
        return rotary_angles(positions.to(device), config.head_dim, config.rope_theta)

    lengths = zip(und_lengths, gen_lengths or [0] * len(caches), strict=True)
    return Packing(
        groups=[
            Group(count=1, lengths={UND: und, GEN: gen}, causal=causal, cache=cache)
            for cache, (und, gen) in zip(caches, lengths, strict=True)
        ],
        und_angles=angles(und_lengths),
        gen_angles=None if gen_lengths is None else angles(gen_lengths),
        extend=extend,
        text_rows=text_rows,
        vit_rows=vit_rows,
    )


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions to heads x [n, heads, head_dim]; computes and returns fp32."""
    cos, sin = angles
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1) * sin)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean in fp32, over the last dimension."""

    def __init__(self, width: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        # Rounded before it is weighted, as the official code does: so the weight is not passed on.
        return weight * F.rms_norm(x, weight.shape, eps=self.eps)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of grouped query heads [B, H, n, d] to keys and values [B, K, P + n, d], the past
    first: [B, n, H * d]; `mask` and `causal` as of a `Group`."""
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    if causal and past and length > 1:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(past)
    grouped = query.shape[1] != key.shape[1]
    is_causal = causal and not past
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


class MoTAttention(nn.Module):
    """Self-attention with separate und and gen projections and per-head norms of queries and keys.

    Every component has its own query heads; the KV heads are shared. A component whose attention
    is skipped has no projections here: its tokens neither attend nor are attended to in this layer.
    One that lost query heads reads the KV heads that its `QueryProjection` names.

    Source: the inference path of BAGEL's packed mixture-of-transformers attention.
    """

    def __init__(self, config: LLMConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        group = config.num_attention_heads // config.num_key_value_heads * config.head_dim
        for component, stream in COMPONENTS.items():
            shape = config.layer(layer, component)
            q_width, kv_width = group * len(shape.query_groups), self.head_dim * len(shape.kv_heads)
            parts: dict[str, nn.Module | None] = dict.fromkeys(_NAMES)
            if q_width:
                query: Any = nn.Linear
                if shape.query_groups != shape.kv_heads:
                    query = partial(QueryProjection, key_heads=shape.query_places)
                parts = {
                    "q_proj": query(width, q_width, **factory),
                    "k_proj": nn.Linear(width, kv_width, **factory),
                    "v_proj": nn.Linear(width, kv_width, **factory),
                    "o_proj": nn.Linear(q_width, width, bias=False, **factory),
                    "q_norm": RMSNorm(self.head_dim, config.rms_norm_eps, **factory),
                    "k_norm": RMSNorm(self.head_dim, config.rms_norm_eps, **factory),
                }
            for name, part in parts.items():
                self.register_module(f"{name}{stream}", part)

    def forward(
        self, und: Tensor | None, gen: Tensor | None, packing: Packing
    ) -> tuple[Tensor | None, Tensor | None]:
        """Lets every sequence attend to its KV cache, if it has one, and to itself; a stream, und
        [U, D] or gen [G, D], is None where it has no tokens, or they skip this attention."""
        part: Any = self._modules
        heads = (-1, self.head_dim)
        split: dict[str, tuple[tuple[Tensor, ...], ...]] = {}  # queries, keys, values of each group
        reads: dict[str, Sequence[int]] = {}
        mixed: dict[str, list[Tensor]] = {}  # what each group attends to
        for stream, x, angles in ((UND, und, packing.und_angles), (GEN, gen, packing.gen_angles)):
            if x is None or angles is None:
                continue
            q_proj, k_proj, v_proj, _, q_norm, k_norm = (part[f"{own}{stream}"] for own in _NAMES)
            query = q_norm(q_proj(x).unflatten(-1, heads))
            key = k_norm(k_proj(x).unflatten(-1, heads))
            value = v_proj(x).unflatten(-1, heads)
            turned = rotate(torch.cat([query, key], dim=1), angles).to(x.dtype)
            num_kv_heads = value.shape[1]
            # Splits: the gradients of slices would each be a tensor of the whole stream.
            query, key = turned.split([query.shape[1], num_kv_heads], dim=1)
            rows = packing.rows[stream]
            split[stream] = tuple(part.split(rows) for part in (query, key, value))
            mixed[stream], reads[stream] = [], key_heads_read(q_proj, num_kv_heads)
        for i, group in enumerate(packing.groups):
            own = {}
            for stream, parts in split.items():
                if group.lengths[stream]:
                    mine = tuple(part[i] for part in parts)
                    if group.padding is not None:
                        places = group.padding[stream].rows
                        mine = tuple(part.index_select(0, places) for part in mine)
                    sizes = (group.count, group.lengths[stream])
                    own[stream] = tuple(part.unflatten(0, sizes) for part in mine)
            if own:
                self._attend(own, reads, group, packing.extend, mixed)
        outs: dict[str, Tensor] = {}
        for stream, found in mixed.items():
            x = found[0] if len(found) == 1 else torch.cat(found)
            outs[stream] = part[f"o_proj{stream}"](x)
        return outs.get(UND), outs.get(GEN)

    def _attend(
        self,
        own: Mapping[str, Sequence[Tensor]],
        reads: Mapping[str, Sequence[int]],
        group: Group,
        extend: bool,
        mixed: Mapping[str, list[Tensor]],
    ) -> None:
        """Adds to `mixed` of each stream the values [n, H * d] of a group, of `own`, its queries
        [B, n, H, d], keys and values [B, n, K, d], which read the KV heads `reads`."""
        queries, keys, values = zip(*own.values(), strict=True)
        # Streams that read all KV heads are one; otherwise each reads its own of the joined ones.
        are_alike = all(len(reads[stream]) == keys[0].shape[2] for stream in own)
        if are_alike and len(own) > 1:
            runs = [(tuple(own), torch.cat(queries, dim=1))]
        else:
            runs = list(zip(zip(own, strict=True), queries, strict=True))
        if group.cache is not None:
            key, value = group.cache.joined(self.layer, keys, values, extend=extend)
        else:
            key, value = (
                (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)
                for parts in (keys, values)
            )
        mask = group.mask
        if mask is not None and len(own) == 1:
            mask = mask[..., group.span(*own)]  # columns
        for streams, query in runs:
            rows = mask
            seen: tuple[Tensor, ...] = (key, value)
            if mask is not None and len(streams) == 1:
                rows = mask[..., group.span(*streams), :]
            if not are_alike:
                # Stacked views: an index would have to be copied to the device.
                heads = reads[streams[0]]
                seen = tuple(torch.stack([x[:, i] for i in heads], dim=1) for x in seen)
            out = attend(query.transpose(1, 2), *seen, mask=rows, causal=group.causal)
            outs = out.split(tuple(group.lengths[stream] for stream in streams), dim=1)
            for stream, found in zip(streams, outs, strict=True):
                found = found.flatten(0, 1)
                if group.padding is not None:
                    found = found.index_select(0, group.padding[stream].kept)
                mixed[stream].append(found)
