# SPDX-License-Identifier: Apache-2.0
"""The decoder: layers of mixed attention and one FFN per stream, dense or sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from sparse_unified.bagel.attention import COMPONENTS, MoTAttention, Packing, RMSNorm
from sparse_unified.bagel.config import LLMConfig
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn import SparseMoE, SwiGLU


def _ffn(config: LLMConfig, layer: int, component: str, **factory: Any) -> nn.Module | None:
    ffn = config.layer(layer, component).ffn
    if not isinstance(ffn, ExpertLayout):
        return SwiGLU(config.hidden_size, ffn, **factory) if ffn else None
    assert config.top_k is not None
    return SparseMoE(
        config.hidden_size,
        ffn.intermediate_size,
        ffn.num_experts,
        config.top_k,
        ffn.num_shared_experts,
        shared_intermediate_size=ffn.shared_width,
        gate_img=component == "und",
        gate_time=ffn.time_router,
        **factory,
    )


# Up to as many rows visit weights in host memory, as the two markers of an image do in every step;
# for more of them, the weights visit the device for the call.
MAX_HOST_ROWS = 64


def run_ffn(
    ffn: nn.Module,
    x: Tensor,
    packing: Packing | None = None,
    times: Tensor | None = None,
    *,
    on_host: bool = False,
) -> Tensor:
    """Runs a dense or sparse FFN on x [T, D], whose tokens have `times` of denoising, [T] or [1].

    With weights `on_host`, few rows visit the host and the weights visit many."""
    named: dict[str, Tensor] = {}
    # Rows are named only to a block that routes text and ViT tokens apart, as the official code
    # does. Not getattr: to a module that lacks it, torch makes an error with a text each time.
    has_two_routers = ffn._modules.get("gate_img") is not None
    if packing is not None and packing.vit_rows is not None and has_two_routers:
        # With several devices, layers get rows on theirs and the packing on the first one.
        named["packed_vit_token_indexes"] = packing.vit_rows.to(x.device)
        if packing.text_rows is not None:
            named["packed_text_indexes"] = packing.text_rows.to(x.device)
    if times is not None and ffn._modules.get("gate_time") is not None:
        named["times"] = times.to(x.device)
    if not on_host:
        out = ffn(x, **named)
    elif len(x) > MAX_HOST_ROWS:
        visiting = {name: weight.to(x.device) for name, weight in ffn.named_parameters()}
        out = functional_call(ffn, visiting, (x,), named)
    else:
        out = ffn(x.cpu(), **{name: rows.cpu() for name, rows in named.items()})
    # A sparse block returns its router logits too.
    y: Tensor = out[0] if isinstance(out, tuple) else out
    return y.to(x.device) if on_host else y


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), each stream with its own weights.

    A part that a stream skips is None, its norm with it: nothing of it runs.
    """

    # What `sparse_unified.surgery` asks for before it takes an attention out of a layer, or puts in
    # experts that are chosen by time.
    takes_absent_parts = True
    gives_times = True

    mlp: nn.Module | None
    mlp_moe_gen: nn.Module | None
    input_layernorm: RMSNorm | None
    input_layernorm_moe_gen: RMSNorm | None
    post_attention_layernorm: RMSNorm | None
    post_attention_layernorm_moe_gen: RMSNorm | None

    def __init__(self, config: LLMConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        self.und_on_host = False  # the weights of `mlp` stay in host memory, see `run_ffn`
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = MoTAttention(config, layer, **factory)
        for component, stream in COMPONENTS.items():
            shape = config.layer(layer, component)
            self.register_module(f"mlp{stream}", _ffn(config, layer, component, **factory))
            before = {"input": shape.has_attention, "post_attention": bool(shape.width)}
            for part, is_there in before.items():
                norm = RMSNorm(width, eps, **factory) if is_there else None
                self.register_module(f"{part}_layernorm{stream}", norm)

    def forward(
        self, und: Tensor, gen: Tensor | None, packing: Packing, times: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Maps the streams und [U, D] and gen [G, D] (or None) to streams of the same shapes.

        `times` are those of denoising of the gen tokens, fp32 [G], or [1] of all of them."""
        und_norm, gen_norm = self.input_layernorm, self.input_layernorm_moe_gen
        und_mixed, gen_mixed = self.self_attn(
            None if und_norm is None else und_norm(und),
            None if gen_norm is None or gen is None else gen_norm(gen),
            packing,
        )
        if und_mixed is not None:
            und = und + und_mixed
        norm, ffn = self.post_attention_layernorm, self.mlp
        if norm is not None and ffn is not None:
            und = und + run_ffn(ffn, norm(und), packing, on_host=self.und_on_host)
        if gen is None:
            return und, None
        if gen_mixed is not None:
            gen = gen + gen_mixed
        norm, ffn = self.post_attention_layernorm_moe_gen, self.mlp_moe_gen
        if norm is not None and ffn is not None:
            gen = gen + run_ffn(ffn, norm(gen), packing, times)
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
        self, und: Tensor, gen: Tensor | None, packing: Packing, times: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs embedded streams und [U, D] and gen [G, D] (or None) through all layers."""
        for layer in self.layers:
            und, gen = layer(und, gen, packing, times)
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen)


class LanguageModel(nn.Module):
    """The decoder and the head that turns und states into logits."""

    def __init__(self, config: LLMConfig, **factory: Any) -> None:
        super().__init__()
        self.model = Decoder(config, **factory)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
