# SPDX-License-Identifier: Apache-2.0
"""Small models of the structures that the analysis takes, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moe_cases import GOLDEN
from surgery_models import TensorMLP
from torch import Tensor, nn

from sparse_unified.bagel import Bagel
from sparse_unified.testing import build_model, read_case

HIDDEN, WIDTH, LAYERS, EXPERTS = 16, 24, 3, 4


def bagel(case: str = "t2i_dense") -> Bagel:
    """Our own BAGEL, as recorded."""
    return build_model(read_case(GOLDEN / case))


def qwen(**changes: Any) -> Any:
    """A Qwen2.5-VL of random weights, as transformers builds it from a configuration."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS},
        **{"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]},
    }
    vision = {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2},
        **{"out_hidden_size": HIDDEN, "fullatt_block_indexes": [0]},
    }
    config = Qwen2_5_VLConfig(text_config=text | changes, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class MLP(TensorMLP):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(HIDDEN, width)


class Mixture(nn.Module):
    """Routed experts of which a token takes two, a shared one, and the router's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))
        self.shared_experts = MLP(2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens)
        weights, chosen = logits.softmax(-1).topk(2)
        y = self.shared_experts(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                y = y.index_add(0, rows, weights[rows, slots, None] * expert(tokens[rows]))
        return y.view_as(x), logits


class BailingAttention(nn.Module):
    """Grouped heads out of one projection, and the cache among what it returns."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, HIDDEN // 4
        self.query_key_value = nn.Linear(HIDDEN, 2 * HIDDEN, bias=True)
        self.dense = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(
        self, hidden_states: Tensor, past_key_value: Any = None
    ) -> tuple[Tensor, None, Any]:
        counts = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        heads = self.query_key_value(hidden_states).unflatten(-1, (sum(counts), self.head_dim))
        q, k, v = heads.transpose(1, 2).split(counts, 1)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        length, seen = q.shape[2], k.shape[2]
        mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return self.dense(mixed.transpose(1, 2).flatten(2)), None, past_key_value


class BailingLayer(nn.Module):
    def __init__(self, ffn: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.attention = BailingAttention(layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)
        self.mlp = ffn

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        branch, _, present = self.attention(
            hidden_states=self.input_layernorm(x), past_key_value=past
        )
        x = x + branch
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y[0] if isinstance(y, tuple) else y), present


class Bailing(nn.Module):
    """A decoder as in Ming-Omni: the first FFN is dense, the others are mixtures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.word_embeddings = nn.Embedding(64, HIDDEN)
        self.model.layers = nn.ModuleList(
            BailingLayer(Mixture() if layer else MLP(), layer) for layer in range(LAYERS)
        )
        self.model.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, 64, bias=False)
        self.eval()

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        x = self.model.word_embeddings(ids)
        for layer in self.model.layers:
            x, present = layer(x, cache)
            assert present is cache
        return self.lm_head(self.model.norm(x))


class OfficialLayer(nn.Module):
    """A layer as in the official BAGEL: one packed sequence, rows of the components by index."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = BailingAttention(0)
        for suffix in ("", "_moe_gen"):
            setattr(self, f"mlp{suffix}", MLP())
            setattr(self, f"input_layernorm{suffix}", nn.RMSNorm(HIDDEN))
            setattr(self, f"post_attention_layernorm{suffix}", nn.RMSNorm(HIDDEN))

    def forward(self, x: Tensor, text: Tensor, vae: Tensor) -> Tensor:
        normed = torch.zeros_like(x)
        normed[text] = self.input_layernorm(x[text])
        normed[vae] = self.input_layernorm_moe_gen(x[vae])
        x = x + self.self_attn(normed[None])[0][0]
        out = torch.zeros_like(x)
        out[text] = self.mlp(self.post_attention_layernorm(x[text]))
        out[vae] = self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(x[vae]))
        return x + out


class Official(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.layers = nn.ModuleList(OfficialLayer() for _ in range(LAYERS))
        self.eval()

    def forward(self, x: Tensor, text: Tensor, vae: Tensor) -> Tensor:
        for layer in self.language_model.model.layers:
            x = layer(x, text, vae)
        return x


def pictures(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> list[Path]:
    """Writes pictures of random colours."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize(size).save(path)
    return paths
