# SPDX-License-Identifier: Apache-2.0
"""Generated stand-ins of the released sparse checkpoints: their keys, shapes and files."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import write_shards
from safetensors.torch import save_file
from torch import Tensor

from sparse_unified.fixtures import write_tokenizer
from sparse_unified.testing import read_case

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, kw_only=True)
class Released:
    """BAGEL-MoE-7B-GEN-16to8 and -32to16, whole by default, or smaller in the fields given."""

    num_experts: int
    top_k: int
    hidden: int = 3584
    width: int = 18944
    heads: int = 28
    key_heads: int = 4
    layers: int = 28
    sparse: tuple[int, ...] = tuple(range(1, 27))  # the first and the last layer stay dense
    vocabulary: int = 152064
    vit_hidden: int = 1152
    vit_width: int = 4304
    vit_heads: int = 16
    vit_layers: int = 26
    dtype: torch.dtype = torch.bfloat16

    @property
    def expert_width(self) -> int:
        return self.width // self.num_experts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of the file, by key."""
        hidden, head_dim = self.hidden, self.hidden // self.heads
        model = "language_model.model."
        found: dict[str, tuple[int, ...]] = {
            f"{model}embed_tokens.weight": (self.vocabulary, hidden),
            f"{model}norm.weight": (hidden,),
            f"{model}norm_moe_gen.weight": (hidden,),
            "language_model.lm_head.weight": (self.vocabulary, hidden),
        }
        for layer in range(self.layers):
            for branch in ("", "_moe_gen"):
                at, attention = f"{model}layers.{layer}.", f"{model}layers.{layer}.self_attn."
                for name, heads in (
                    ("q", self.heads),
                    ("k", self.key_heads),
                    ("v", self.key_heads),
                ):
                    found[f"{attention}{name}_proj{branch}.weight"] = (heads * head_dim, hidden)
                    found[f"{attention}{name}_proj{branch}.bias"] = (heads * head_dim,)
                found[f"{attention}o_proj{branch}.weight"] = (hidden, hidden)
                found[f"{attention}q_norm{branch}.weight"] = (head_dim,)
                found[f"{attention}k_norm{branch}.weight"] = (head_dim,)
                found[f"{at}input_layernorm{branch}.weight"] = (hidden,)
                found[f"{at}post_attention_layernorm{branch}.weight"] = (hidden,)
            found |= _ffn(f"{at}mlp.", self.width, hidden)
            if layer not in self.sparse:
                found |= _ffn(f"{at}mlp_moe_gen.", self.width, hidden)
                continue
            found[f"{at}mlp_moe_gen.gate.weight"] = (self.num_experts, hidden)
            found[f"{at}mlp_moe_gen.gate_shared.weight"] = (1, hidden)
            for expert in range(self.num_experts):
                found |= _ffn(f"{at}mlp_moe_gen.experts.{expert}.", self.expert_width, hidden)
        return found | self._others()

    def _others(self) -> dict[str, tuple[int, ...]]:
        hidden, vit = self.hidden, self.vit_hidden
        found: dict[str, tuple[int, ...]] = {
            "connector.fc1.weight": (hidden, vit),
            "connector.fc1.bias": (hidden,),
            "connector.fc2.weight": (hidden, hidden),
            "connector.fc2.bias": (hidden,),
            "latent_pos_embed.pos_embed": (64, hidden),
            "vit_pos_embed.pos_embed": (64, hidden),
            "time_embedder.mlp.0.weight": (hidden, 256),
            "time_embedder.mlp.0.bias": (hidden,),
            "time_embedder.mlp.2.weight": (hidden, hidden),
            "time_embedder.mlp.2.bias": (hidden,),
            "vae2llm.weight": (hidden, 16),
            "vae2llm.bias": (hidden,),
            "llm2vae.weight": (16, hidden),
            "llm2vae.bias": (16,),
        }
        at = "vit_model.vision_model."
        found |= {
            f"{at}embeddings.patch_embedding.weight": (vit, 588),
            f"{at}embeddings.patch_embedding.bias": (vit,),
            f"{at}embeddings.position_embedding.weight": (64, vit),
            f"{at}post_layernorm.weight": (vit,),
            f"{at}post_layernorm.bias": (vit,),
        }
        for layer in range(self.vit_layers):
            inside = f"{at}encoder.layers.{layer}."
            sizes = {f"self_attn.{name}": (vit, vit) for name in ("q_proj", "k_proj", "v_proj")}
            sizes |= {
                "self_attn.out_proj": (vit, vit),
                "layer_norm1": (vit,),
                "layer_norm2": (vit,),
            }
            sizes |= {"mlp.fc1": (self.vit_width, vit), "mlp.fc2": (vit, self.vit_width)}
            for name, shape in sizes.items():
                found[f"{inside}{name}.weight"] = shape
                found[f"{inside}{name}.bias"] = shape[:1]
        return found

    def config(self) -> dict[str, Any]:
        """Returns llm_config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_heads,
            "qk_norm": True,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
            "num_experts": self.num_experts,
            "num_shared_experts": 0,
            "top_k": self.top_k,
            "transformed_gen": list(self.sparse),
            "transformed_und": False,
        }

    def vit_config(self) -> dict[str, Any]:
        """Returns vit_config.json, which counts a last layer that is not there."""
        return {
            "hidden_size": self.vit_hidden,
            "image_size": 112,
            "intermediate_size": self.vit_width,
            "model_type": "siglip_vision_model",
            "num_attention_heads": self.vit_heads,
            "num_channels": 3,
            "num_hidden_layers": self.vit_layers + 1,
            "patch_size": 14,
        }


def _ffn(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


SMALL: dict[str, Any] = {
    "hidden": 64,
    "width": 1184,
    "heads": 4,
    "key_heads": 2,
    "vocabulary": 96,
    "vit_hidden": 16,
    "vit_width": 32,
    "vit_heads": 2,
    "vit_layers": 2,
}


def make_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns cheap noise, another for each key: a random block over and over."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    count = math.prod(shape)
    block = torch.randn(min(count, 99991), generator=generator) * shape[-1] ** -0.5
    if "norm" in key and key.endswith("weight"):
        block += 1
    return block.to(dtype).repeat(-(-count // len(block)))[:count].reshape(shape)


def write_released(
    directory: Path, released: Released, *, num_shards: int = 0, part: str = ""
) -> Path:
    """Writes a model directory as the released ones are; with shards, an index goes with them.

    Args:
        part: what a key must contain to be written.
    """
    directory.mkdir(parents=True)
    shapes = {key: shape for key, shape in released.shapes().items() if part in key}
    weights = {key: make_tensor(key, shape, released.dtype) for key, shape in shapes.items()}
    if num_shards:
        write_shards(directory, weights, num_shards)
    else:
        save_file(weights, directory / "ema.safetensors", metadata={"format": "pt"})
    save_file(read_case(GOLDEN / "vae").weights, directory / "ae.safetensors")
    for name, content in (
        ("llm_config.json", released.config()),
        ("vit_config.json", released.vit_config()),
    ):
        (directory / name).write_text(json.dumps(content, indent=2))
    write_tokenizer(directory)
    return directory
