# SPDX-License-Identifier: Apache-2.0
"""Attention of a mixture of transformers: two sets of projections, one attention over all tokens.

Tokens travel in two streams, und (text, markers, ViT) and gen (VAE latents). Each stream is one
packed tensor that holds its tokens of every sequence, one sequence after the other; the streams
meet only here. Shapes: U und tokens, G gen tokens, H query heads, K key heads, d = head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.config import LLMConfig
from sparse_unified.bagel.embeddings import rotary_angles, rotate
from sparse_unified.bagel.joint_attention import GEN, UND, JointPacking, attend_jointly
from sparse_unified.nn import QueryProjection, key_heads_read

__all__ = ["GEN", "MoTAttention", "Packing", "RMSNorm", "attend", "pack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where each sequence lies in the two streams, and how it may look.

    Args:
        contexts: the past of each sequence.
        und_lengths: und tokens of each sequence.
        gen_lengths: gen tokens of each sequence; None when there is no gen stream.
        und_angles, gen_angles: rotary cosines and sines of each token of the streams.
        causal: a token sees itself and what comes before it; otherwise all of its sequence.
        extend: contexts take up the new keys and values.
        text_rows, vit_rows: rows of the und stream that hold text and ViT tokens, for FFNs that
            route the two apart; None when all are text.
    """

    contexts: Sequence[Context]
    und_lengths: Sequence[int]
    und_angles: tuple[Tensor, Tensor]
    gen_lengths: Sequence[int] | None = None
    gen_angles: tuple[Tensor, Tensor] | None = None
    causal: bool = False
    extend: bool = False
    text_rows: Tensor | None = None
    vit_rows: Tensor | None = None

    # A pass that reads and writes keeps no router logits; `JointPacking` does.
    routed: None = None


def pack(
    config: LLMConfig,
    contexts: Sequence[Context],
    und_lengths: Sequence[int],
    *,
    gen_lengths: Sequence[int] | None = None,
    causal: bool = False,
    extend: bool = False,
    text_rows: Tensor | None = None,
    vit_rows: Tensor | None = None,
    device: torch.device | str,
) -> Packing:
    """Builds the packing of sequences that go on from `contexts`.

    Causal tokens take consecutive positions; otherwise (an image) all share the next one.
    """

    def angles(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        starts = torch.tensor([context.position for context in contexts])
        positions = starts.repeat_interleave(torch.tensor(lengths))
        if causal:
            positions += torch.cat([torch.arange(length) for length in lengths])
        return rotary_angles(positions.to(device), config.head_dim, config.rope_theta)

    return Packing(
        contexts=contexts,
        und_lengths=und_lengths,
        und_angles=angles(und_lengths),
        gen_lengths=gen_lengths,
        gen_angles=None if gen_lengths is None else angles(gen_lengths),
        causal=causal,
        extend=extend,
        text_rows=text_rows,
        vit_rows=vit_rows,
    )


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean in fp32, over the last dimension."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        # Rounded before it is weighted, as the official code does: so the weight is not passed on.
        return weight * F.rms_norm(x, weight.shape, eps=self.eps)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Scaled dot product attention of one sequence, with grouped keys.

    Args:
        query: [L, H, d]; key, value: [K, P + L, d], the past first.
        causal: query i sees the keys up to P + i; otherwise all.

    Returns:
        [L, H * d].
    """
    length, past = query.shape[0], key.shape[1] - query.shape[0]
    mask = None
    if causal and past and length > 1:
        mask = torch.ones(length, key.shape[1], dtype=torch.bool, device=query.device).tril(past)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=causal and not past,
        enable_gqa=query.shape[1] != key.shape[0],
    )
    return out[0].transpose(0, 1).flatten(1)


class _Parts(NamedTuple):
    """Names of the modules of a stream."""

    query: str
    key: str
    value: str
    query_norm: str
    key_norm: str
    output: str


_NAMES = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
_PARTS = {stream: _Parts(*(f"{name}{stream}" for name in _NAMES)) for stream in (UND, GEN)}


class MoTAttention(nn.Module):
    """Self-attention with separate und and gen projections and per-head norms of queries and keys.

    Every component has its own query heads; the key heads are shared. A component whose attention
    is skipped has no projections here: its tokens neither ask nor are seen in this layer. One that
    lost query heads reads the key heads that its `QueryProjection` names.

    Source: the inference path of BAGEL's packed mixture-of-transformers attention.
    """

    def __init__(
        self,
        config: LLMConfig,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        for stream in ("", GEN):
            held = config.held(layer, gen=stream == GEN)
            q_width = held.num_attention_heads * config.head_dim
            kv_width = held.num_key_value_heads * config.head_dim
            sizes = {
                "q": (width, q_width),
                "k": (width, kv_width),
                "v": (width, kv_width),
                "o": (q_width, width),
            }
            for name, (inputs, outputs) in sizes.items():
                factory: Any = {"bias": name != "o", "device": device, "dtype": dtype}
                linear: nn.Linear | None = None
                if q_width and name == "q" and held.key_heads is not None:
                    linear = QueryProjection(inputs, outputs, key_heads=held.key_heads, **factory)
                elif q_width:
                    linear = nn.Linear(inputs, outputs, **factory)
                self.register_module(f"{name}_proj{stream}", linear)
            for name in ("q", "k"):
                norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device, dtype=dtype)
                self.register_module(f"{name}_norm{stream}", norm if q_width else None)

    def forward(
        self, und: Tensor | None, gen: Tensor | None, packing: Packing | JointPacking
    ) -> tuple[Tensor | None, Tensor | None]:
        """Lets every sequence attend to its context, if it has one, and to itself.

        Args:
            und: [U, D]; gen: [G, D]; None where there are no such tokens, or they skip this
                attention. packing: how they divide into sequences.

        Returns:
            The two streams after the output projections, shaped as they came.
        """
        streams = {}
        num_key_heads = 0
        if und is not None:
            streams[UND], num_key_heads = self._heads(und, _PARTS[UND], packing.und_angles)
        if gen is not None and packing.gen_angles is not None:
            streams[GEN], num_key_heads = self._heads(gen, _PARTS[GEN], packing.gen_angles)
        if not streams:
            return None, None
        part: Any = self._modules
        reads = {}
        for stream in streams:
            reads[stream] = key_heads_read(part[_PARTS[stream].query], num_key_heads)
        if isinstance(packing, JointPacking):
            mixed = attend_jointly(streams, reads, num_key_heads, packing)
        else:
            mixed = self._attend_to_contexts(streams, reads, num_key_heads, packing)
        return (
            part[_PARTS[UND].output](mixed[UND]) if UND in mixed else None,
            part[_PARTS[GEN].output](mixed[GEN]) if GEN in mixed else None,
        )

    def _heads(self, x: Tensor, names: _Parts, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """Returns rotated queries, rotated keys, and values of a stream, [N, H + 2 K, d], and K."""
        part: Any = self._modules
        heads = (-1, self.head_dim)
        query = part[names.query_norm](part[names.query](x).unflatten(-1, heads))
        key = part[names.key_norm](part[names.key](x).unflatten(-1, heads))
        value = part[names.value](x).unflatten(-1, heads)
        turned = rotate(torch.cat([query, key], dim=1), angles).to(x.dtype)
        return torch.cat([turned, value], dim=1), value.shape[1]

    def _attend_to_contexts(
        self,
        streams: Mapping[str, Tensor],
        reads: Mapping[str, Sequence[int]],
        num_key_heads: int,
        packing: Packing,
    ) -> dict[str, Tensor]:
        """Returns the mixed values [N, H * d] of each stream, sequence by sequence."""
        lengths = {UND: packing.und_lengths, GEN: packing.gen_lengths or ()}
        split = {}
        for stream, heads in streams.items():
            sizes = [heads.shape[1] - 2 * num_key_heads, num_key_heads, num_key_heads]
            own = heads.split(list(lengths[stream]))
            split[stream] = [x.split(sizes, dim=1) for x in own]
        mixed: dict[str, list[Tensor]] = {stream: [] for stream in streams}
        for i, context in enumerate(packing.contexts):
            own = {stream: heads[i] for stream, heads in split.items()}
            for stream, out in self._attend(context, own, reads, packing).items():
                mixed[stream].append(out)
        return {stream: torch.cat(parts) for stream, parts in mixed.items()}

    def _attend(
        self,
        context: Context,
        own: Mapping[str, Sequence[Tensor]],
        reads: Mapping[str, Sequence[int]],
        packing: Packing,
    ) -> dict[str, Tensor]:
        """Returns the mixed values [n, H * d] of the und and gen tokens of one sequence."""
        k, v = (torch.cat([heads[i] for heads in own.values()]).transpose(0, 1) for i in (1, 2))
        key, value = context.joined(self.layer, k, v)
        if packing.extend:
            context.keys[self.layer], context.values[self.layer] = key, value
        lengths = [len(heads[0]) for heads in own.values()]
        if all(len(heads) == len(key) for heads in reads.values()):
            q = torch.cat([heads[0] for heads in own.values()])
            out = attend(q, key, value, causal=packing.causal)
            return dict(zip(own, out.split(lengths), strict=True))
        mixed = {}
        end = key.shape[1] - sum(lengths)
        for (stream, (q, _, _)), length in zip(own.items(), lengths, strict=True):
            end += length
            seen = end if packing.causal else key.shape[1]
            # Stacked views: an index would have to be copied to the device.
            own_key, own_value = (
                torch.stack([x[head, :seen] for head in reads[stream]]) for x in (key, value)
            )
            mixed[stream] = attend(q, own_key, own_value, causal=packing.causal)
        return mixed
