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
from checkpoint_files import bagel_config, write_weights
from moe_cases import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

from sparse_unified.bagel import Bagel, LLMConfig, VisionConfig
from sparse_unified.fixtures import write_tokenizer
from sparse_unified.testing import read_case


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

    def sizes(self) -> dict[str, Any]:
        return {
            **{"hidden_size": self.hidden, "intermediate_size": self.width},
            **{"num_hidden_layers": self.layers, "num_attention_heads": self.heads},
            **{"num_key_value_heads": self.key_heads, "vocab_size": self.vocabulary},
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of the file, by key."""
        llm = LLMConfig(**self.sizes())
        experts = {"num_experts": self.num_experts, "top_k": self.top_k}
        vision = VisionConfig.from_json(self.vit_config(), num_hidden_layers=self.vit_layers)
        sizes = {"vae_downsample": 2, "max_latent_size": 8, "vit_max_num_patch_per_side": 8}
        config = bagel_config(llm.with_experts("gen", self.sparse, **experts), vision, **sizes)
        model = Bagel(config, device="meta")
        return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    def config(self) -> dict[str, Any]:
        """Returns llm_config.json."""
        experts = {"num_experts": self.num_experts, "num_shared_experts": 0, "top_k": self.top_k}
        return {
            **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
            **{"attention_dropout": 0.0, "max_position_embeddings": 32768, "qk_norm": True},
            **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False},
            **self.sizes() | experts,
            **{"transformed_gen": list(self.sparse), "transformed_und": False},
        }

    def vit_config(self) -> dict[str, Any]:
        """Returns vit_config.json, which counts a last layer that is not there."""
        return {
            **{"model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14},
            **{"hidden_size": self.vit_hidden, "intermediate_size": self.vit_width},
            **{"num_attention_heads": self.vit_heads, "num_hidden_layers": self.vit_layers + 1},
            "num_channels": 3,
        }


SMALL: dict[str, Any] = {
    **{"hidden": 64, "width": 1184, "heads": 4, "key_heads": 2, "vocabulary": 96},
    **{"vit_hidden": 16, "vit_width": 32, "vit_heads": 2, "vit_layers": 2},
}


def make_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns cheap noise, another for each key: a random block over and over."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    count = math.prod(shape)
    block = torch.randn(min(count, 99991), generator=generator) * shape[-1] ** -0.5
    if "norm" in key and key.endswith("weight"):
        block += 1
    return block.to(dtype).repeat(-(-count // len(block)))[:count].reshape(shape)


def write_released(directory: Path, released: Released, *, num_shards: int = 0) -> Path:
    """Writes a model directory as the released ones are; with shards, an index goes with them."""
    shapes = released.shapes().items()
    weights = {key: make_tensor(key, shape, released.dtype) for key, shape in shapes}
    write_weights(directory, weights, num_shards)
    save_file(read_case(GOLDEN / "vae").weights, directory / "ae.safetensors")
    (directory / "llm_config.json").write_text(json.dumps(released.config(), indent=2))
    (directory / "vit_config.json").write_text(json.dumps(released.vit_config(), indent=2))
    write_tokenizer(directory)
    return directory
