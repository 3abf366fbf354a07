# SPDX-License-Identifier: Apache-2.0
"""Small random model directories in the official format, and ways to damage them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparse_unified
from sparse_unified.bagel import AutoEncoder, Bagel, BagelConfig, LLMConfig, VAEConfig, VisionConfig
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.checkpoint import keys

VISION = {
    **{"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 1},
    **{"patch_size": 2, "image_size": 4},
}
LAYER = "language_model.model.layers.1.mlp_moe_gen."


def bagel_config(llm: LLMConfig, vision: VisionConfig, **sizes: Any) -> BagelConfig:
    """Returns a model with as little as possible besides its layers, but for the sizes given."""
    special = SpecialTokens(bos=0, eos=0, start_of_image=0, end_of_image=0)
    smallest = {"max_latent_size": 2, "vit_max_num_patch_per_side": 2, "special_tokens": special}
    smallest |= {"latent_channels": 4, "vae_downsample": 1, "latent_patch_size": 2}
    return BagelConfig(llm=llm, vision=vision, **smallest | sizes)


def make_weights(
    *,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 4,
    hidden: int = 16,
    width: int = 96,
    vocabulary: int = 24,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns random tensors under every official key of a dense model."""
    llm = LLMConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocabulary,
    )
    config = bagel_config(llm, VisionConfig(**VISION, num_hidden_layers=2))
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(w.shape, generator=generator) * w.shape[-1] ** -0.5).to(dtype)
        for key, w in Bagel(config, device="meta").state_dict().items()
    }


def make_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the llm_config.json that fits dense weights."""
    width, hidden = weights[keys.ffn_key("gen", 0, "gate_proj")].shape
    layers = sum(key.endswith("mlp_moe_gen.gate_proj.weight") for key in weights)
    embeddings = weights.get("language_model.model.embed_tokens.weight", ())
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    others = {"vocab_size": len(embeddings), "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return sizes | heads | others


def make_autoencoder() -> dict[str, Tensor]:
    """Returns the tensors of the smallest autoencoder: one resolution, one block."""
    vae = AutoEncoder(VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4), device="meta")
    return {key: torch.ones(t.shape, dtype=torch.bfloat16) for key, t in vae.state_dict().items()}


def make_dense(directory: Path, *, num_shards: int = 0, **sizes: Any) -> Path:
    """Writes a dense model directory; `num_shards` > 0 splits the weights and adds an index."""
    weights = make_weights(**sizes)
    write_weights(directory, weights, num_shards)
    # Tabs and a missing line end, so that a text that was parsed and printed again shows.
    (directory / "llm_config.json").write_text(json.dumps(make_config(weights), indent="\t"))
    (directory / "vit_config.json").write_text(json.dumps(VISION))
    save_file(make_autoencoder(), directory / "ae.safetensors")
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "merges.txt").write_bytes(b"a b\r\nc d\n")
    return directory


def write_shards(directory: Path, weights: dict[str, Tensor], num_shards: int) -> None:
    """Deals tensors to shards in turn and writes their index."""
    names = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    weight_map = {key: names[i % num_shards] for i, key in enumerate(sorted(weights))}
    for name in names:
        save_file({k: w for k, w in weights.items() if weight_map[k] == name}, directory / name)
    metadata = {"total_size": sum(w.nbytes for w in weights.values())}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def write_weights(directory: Path, weights: dict[str, Tensor], num_shards: int = 0) -> None:
    """Writes ema.safetensors into a new directory, or `num_shards` files and their index."""
    directory.mkdir(parents=True)
    if num_shards:
        write_shards(directory, weights, num_shards)
    else:
        save_file(weights, directory / "ema.safetensors", metadata={"format": "pt"})


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites ema.safetensors after `edit` changed its tensors in place."""
    weights = load_file(directory / "ema.safetensors")
    edit(weights)
    save_file(weights, directory / "ema.safetensors")


def edit_config(directory: Path, **fields: Any) -> None:
    """Sets fields of llm_config.json; None removes one."""
    path = directory / "llm_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def child_environment() -> dict[str, str]:
    """Returns an environment in which a Python process finds this package, installed or not."""
    package = str(Path(sparse_unified.__file__).parents[1])
    return os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a Python process that finds this package; returns what it wrote and its status."""
    command = [sys.executable, *map(str, arguments)]
    given = {"env": child_environment(), "capture_output": True, "text": True} | options
    return subprocess.run(command, check=False, **given)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
