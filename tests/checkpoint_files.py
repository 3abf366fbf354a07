# SPDX-License-Identifier: Apache-2.0
"""Small random model directories in the official format, and ways to damage them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparse_unified
from sparse_unified.bagel import AutoEncoder, VAEConfig
from sparse_unified.checkpoint import keys

GOLDEN = Path(__file__).parent / "golden"
LAYER = "language_model.model.layers.1.mlp_moe_gen."


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
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    weights = {key: random(hidden) for key in keys.LANGUAGE_KEYS if ".norm" in key}
    weights |= {key: random(vocabulary, hidden) for key in keys.LANGUAGE_KEYS if ".norm" not in key}
    for layer in range(num_layers):
        prefix = keys.layer_prefix(layer)
        for name in (*keys.ATTENTION_KEYS, *keys.NORM_KEYS):
            flat = "norm" in name or name.endswith("bias")
            weights[prefix + name] = random(hidden) if flat else random(hidden, hidden)
        for component in keys.FFN_NAMES:
            for name in keys.PROJECTIONS:
                shape = (hidden, width) if name == "down_proj" else (width, hidden)
                weights[keys.dense_key(component, layer, name)] = random(*shape)
    for group, names in keys.OTHER_GROUPS.items():
        weights |= {f"{group}.{name}": random(4, hidden) for name in names}
    for layer in range(2):
        weights[f"vit_model.vision_model.encoder.layers.{layer}.mlp.fc1.weight"] = random(8, 4)
    return weights


def make_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the llm_config.json that fits dense weights."""
    width, hidden = weights[keys.dense_key("gen", 0, "gate_proj")].shape
    layers = sum(key.endswith("mlp_moe_gen.gate_proj.weight") for key in weights)
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }


def make_autoencoder() -> dict[str, Tensor]:
    """Returns the tensors of the smallest autoencoder: one resolution, one block."""
    vae = AutoEncoder(VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4), device="meta")
    return {
        key: torch.ones(tensor.shape, dtype=torch.bfloat16)
        for key, tensor in vae.state_dict().items()
    }


def make_dense(directory: Path, *, num_shards: int = 0, **sizes: Any) -> Path:
    """Writes a dense model directory; `num_shards` > 0 splits the weights and adds an index."""
    directory.mkdir(parents=True)
    weights = make_weights(**sizes)
    if num_shards:
        write_shards(directory, weights, num_shards)
    else:
        save_file(weights, directory / "ema.safetensors", metadata={"format": "pt"})
    # Tabs and a missing line end, so that a text that was parsed and printed again shows.
    (directory / "llm_config.json").write_text(json.dumps(make_config(weights), indent="\t"))
    (directory / "vit_config.json").write_text("{}")
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
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


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


def snapshot(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
