# SPDX-License-Identifier: Apache-2.0
"""Attention of a mixture of transformers: two sets of projections, one attention over all tokens.

Tokens travel in two streams, und (text, markers, ViT) and gen (VAE latents). Each stream is one
packed tensor that holds its tokens of every sequence, one sequence after the other; the streams
meet only here. Shapes: U und tokens, G gen tokens, H query heads, K key heads, d = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.config import LLMConfig
from sparse_unified.bagel.embeddings import rotary_angles, rotate

GEN = "_moe_gen"


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
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


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


class MoTAttention(nn.Module):
    """Self-attention with separate und and gen projections and per-head norms of queries and keys.

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
        kv_width = config.num_key_value_heads * config.head_dim
        for stream in ("", GEN):
            for name, outputs in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
                linear = nn.Linear(width, outputs, bias=name != "o", device=device, dtype=dtype)
                setattr(self, f"{name}_proj{stream}", linear)
            for name in ("q", "k"):
                norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device, dtype=dtype)
                setattr(self, f"{name}_norm{stream}", norm)

    def forward(
        self, und: Tensor, gen: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor | None]:
        """Lets every sequence attend to its context and to itself.

        Args:
            und: [U, D]; gen: [G, D] or None; packing: how they divide into sequences.

        Returns:
            The two streams after the output projections, shaped as they came.
        """
        und_parts = self._heads(und, "", packing.und_angles, packing.und_lengths)
        if gen is None or packing.gen_lengths is None or packing.gen_angles is None:
            mixed = [
                self._attend(context, q, k, v, packing)
                for context, q, k, v in zip(packing.contexts, *und_parts, strict=True)
            ]
            return self._output(mixed, ""), None
        gen_parts = self._heads(gen, GEN, packing.gen_angles, packing.gen_lengths)
        und_mixed, gen_mixed = [], []
        for context, *parts in zip(packing.contexts, *und_parts, *gen_parts, strict=True):
            q, k, v = (torch.cat(pair) for pair in zip(parts[:3], parts[3:], strict=True))
            num_und = parts[0].shape[0]
            out = self._attend(context, q, k, v, packing)
            und_mixed.append(out[:num_und])
            gen_mixed.append(out[num_und:])
        return self._output(und_mixed, ""), self._output(gen_mixed, GEN)

    def _heads(
        self, x: Tensor, stream: str, angles: tuple[Tensor, Tensor], lengths: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        """Returns rotated queries [n, H, d], keys and values [n, K, d] of each sequence."""
        heads = []
        for name in ("q", "k", "v"):
            out = getattr(self, f"{name}_proj{stream}")(x).unflatten(-1, (-1, self.head_dim))
            if name != "v":
                out = rotate(getattr(self, f"{name}_norm{stream}")(out), angles).to(x.dtype)
            heads.append(out.split(list(lengths)))
        return heads

    def _attend(
        self, context: Context, q: Tensor, k: Tensor, v: Tensor, packing: Packing
    ) -> Tensor:
        key, value = context.joined(self.layer, k.transpose(0, 1), v.transpose(0, 1))
        if packing.extend:
            context.keys[self.layer], context.values[self.layer] = key, value
        return attend(q, key, value, causal=packing.causal)

    def _output(self, parts: Sequence[Tensor], stream: str) -> Tensor:
        return getattr(self, f"o_proj{stream}")(torch.cat(list(parts)))
