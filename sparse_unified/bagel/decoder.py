# SPDX-License-Identifier: Apache-2.0
"""The decoder: layers of mixed attention and one FFN per stream, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_unified.bagel.attention import MoTAttention, Packing, RMSNorm
from sparse_unified.bagel.config import ExpertConfig, LLMConfig
from sparse_unified.nn import SparseMoE, SwiGLU


def _ffn(
    config: LLMConfig, experts: Mapping[int, ExpertConfig], layer: int, *, und: bool, **factory: Any
) -> nn.Module:
    if layer not in experts:
        return SwiGLU(config.hidden_size, config.intermediate_size, **factory)
    expert = experts[layer]
    return SparseMoE(
        config.hidden_size,
        expert.intermediate_size,
        expert.num_experts,
        expert.top_k,
        expert.num_shared_experts,
        shared_intermediate_size=expert.shared_width,
        gate_img=und,
        **factory,
    )


def run_ffn(ffn: nn.Module, x: Tensor, packing: Packing | None = None) -> Tensor:
    """Runs a dense or sparse FFN on x [T, D] and drops router logits if it returns them.

    Rows of text and of ViT tokens are named only to a block that routes the two apart, as the
    official code does in the pass over a ViT image.
    """
    routed = getattr(ffn, "gate_img", None) is not None
    if routed and packing is not None and packing.vit_rows is not None:
        out = ffn(
            x,
            packed_text_indexes=packing.text_rows,
            packed_vit_token_indexes=packing.vit_rows,
        )
    else:
        out = ffn(x)
    return out[0] if isinstance(out, tuple) else out


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), each stream with its own weights."""

    def __init__(self, config: LLMConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = MoTAttention(config, layer, **factory)
        self.mlp = _ffn(config, config.sparse_und, layer, und=True, **factory)
        self.mlp_moe_gen = _ffn(config, config.sparse_gen, layer, und=False, **factory)
        self.input_layernorm = RMSNorm(width, eps, **factory)
        self.input_layernorm_moe_gen = RMSNorm(width, eps, **factory)
        self.post_attention_layernorm = RMSNorm(width, eps, **factory)
        self.post_attention_layernorm_moe_gen = RMSNorm(width, eps, **factory)

    def forward(
        self, und: Tensor, gen: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor | None]:
        """Maps the streams und [U, D] and gen [G, D] (or None) to streams of the same shapes."""
        und_mixed, gen_mixed = self.self_attn(
            self.input_layernorm(und),
            None if gen is None else self.input_layernorm_moe_gen(gen),
            packing,
        )
        und = und + und_mixed
        und = und + run_ffn(self.mlp, self.post_attention_layernorm(und), packing)
        if gen is not None:
            gen = gen + gen_mixed
            gen = gen + run_ffn(self.mlp_moe_gen, self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class Decoder(nn.Module):
    """Token embeddings, the layers, and the final norm of each stream."""

    def __init__(self, config: LLMConfig, **factory: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, **factory) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)

    def forward(
        self, und: Tensor, gen: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor | None]:
        """Runs embedded streams und [U, D] and gen [G, D] (or None) through all layers."""
        for layer in self.layers:
            und, gen = layer(und, gen, packing)
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen)


class LanguageModel(nn.Module):
    """The decoder and the head that turns und states into logits."""

    def __init__(self, config: LLMConfig, **factory: Any) -> None:
        super().__init__()
        self.model = Decoder(config, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
