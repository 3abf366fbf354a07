# SPDX-License-Identifier: Apache-2.0
"""The model of the miniature: what it is made of, fresh, trained, and as directories."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified._common import StrPath
from sparse_unified.bagel import AutoEncoder, Bagel, BagelConfig, BagelPipeline
from sparse_unified.bagel.config import LLMConfig, SpecialTokens, VAEConfig, VisionConfig
from sparse_unified.bagel.tokenizer import SPECIAL_TEXTS

WEIGHTS = Path(__file__).parent / "weights"
TOKENIZER = WEIGHTS / "tokenizer"
UNKNOWN = "<|endoftext|>"


IMAGE_SIZE = 48  # pixels of a side
BACKGROUND = (0.96, 0.95, 0.92)  # red, green and blue of 1
TIMESTEP_SHIFT = 2.0  # of training and sampling, see `SamplingConfig`
VAE = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4)
_LATENT_PATCH = 2
_LLM = LLMConfig(
    hidden_size=96,
    intermediate_size=128,  # 16 experts of 8
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=54,
    rope_theta=1e4,
)


@cache
def vocabulary() -> dict[str, int]:
    """Returns the id of every word and marker, from 0; a word outside becomes `UNKNOWN`."""
    stated = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    return dict(stated["model"]["vocab"])


def encode(text: str) -> list[int]:
    """Returns the ids of a text, without bos and eos, as the tokenizer does."""
    ids = vocabulary()
    return [ids.get(word, ids[UNKNOWN]) for word in text.lower().split()]


def mini_config() -> BagelConfig:
    """Returns the description of the model: 9 tokens an image, one for each cell."""
    ids = vocabulary()
    side = IMAGE_SIZE // (_LATENT_PATCH * VAE.downsample)
    return BagelConfig(
        llm=_LLM,
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=IMAGE_SIZE // side,
            image_size=IMAGE_SIZE,
        ),
        latent_channels=VAE.z_channels,
        vae_downsample=VAE.downsample,
        latent_patch_size=_LATENT_PATCH,
        max_latent_size=side,
        vit_max_num_patch_per_side=side,
        special_tokens=SpecialTokens(**{name: ids[text] for name, text in SPECIAL_TEXTS.items()}),
    )


def mini_autoencoder() -> AutoEncoder:
    """Returns the trained autoencoder that the package holds, in fp32."""
    vae = AutoEncoder(VAE).eval()
    vae.load_state_dict(_stored("ae.safetensors"))
    return vae


def new_model(seed: int) -> Bagel:
    """Returns an untrained model: torch's initialisation, but for smaller embeddings."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Bagel(mini_config())
        torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.5)
    return model


def trained_weights(seed: int = 0) -> dict[str, Tensor]:
    """Returns the tensors, fp32 by official key, of the model trained with seed 0, 1 or 2."""
    return _stored(f"ema-{seed}.safetensors")


def _stored(name: str) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in load_file(WEIGHTS / name).items()}


def write_model(directory: StrPath, model: Bagel | None = None) -> Path:
    """Writes a model directory in the official format.

    Args:
        directory: made if it is not there; its files are replaced.
        model: dense; None takes the trained weights that the package holds.
    """
    tensors = trained_weights() if model is None else model.state_dict()
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    config = mini_config()
    sizes, vit = asdict(config.llm), asdict(config.vision)
    del sizes["layers"], sizes["top_k"], vit["num_channels"], vit["layer_norm_eps"]
    llm = {"model_type": "qwen2", "hidden_act": "silu", "qk_norm": True}
    llm |= {"tie_word_embeddings": False, **sizes}
    write_files(directory, tensors, mini_autoencoder().state_dict(), llm, vit)
    shutil.copytree(TOKENIZER, directory, dirs_exist_ok=True)
    return Path(directory)


def write_files(
    directory: StrPath,
    tensors: dict[str, Tensor],
    vae: dict[str, Tensor],
    llm: dict[str, Any],
    vit: dict[str, Any],
) -> None:
    """Writes weights and descriptions of a model under their official names."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "ema.safetensors")
    save_file(vae, directory / "ae.safetensors")
    # The official file counts the last layer of SigLIP, which BAGEL leaves out.
    vit = {**vit, "num_hidden_layers": vit["num_hidden_layers"] + 1}
    for name, content in (("llm_config.json", llm), ("vit_config.json", vit)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def load_pipeline(directory: StrPath) -> BagelPipeline:
    """Loads a directory of `write_model`, or what `convert` and `prune` made of it, in fp32."""
    return BagelPipeline.from_pretrained(directory, dtype=torch.float32)
