# SPDX-License-Identifier: Apache-2.0
"""The two models of the miniature: what they are made of, fresh, trained, and as directories."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.config import BagelConfig, LLMConfig, SpecialTokens, VisionConfig
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.tokenizer import SPECIAL_TEXTS
from sparse_unified.bagel.vae import AutoEncoder
from sparse_unified.mini.autoencoder import identity_autoencoder

WEIGHTS = Path(__file__).parent / "weights"
TOKENIZER = WEIGHTS / "tokenizer"
UNKNOWN = "<|endoftext|>"


class MiniTask(str, Enum):
    """What a model of the miniature is trained on."""

    DIGITS = "digits"
    SCENES = "scenes"


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniShape:
    """What differs between the tasks."""

    image_size: int  # pixels of a side
    downsample: int  # pixels of a side of a latent pixel; two of these are the side of a token
    gain: float  # of the latent, gain * pixels
    timestep_shift: float  # of training and sampling, see `SamplingConfig`


SHAPES = {
    MiniTask.DIGITS: MiniShape(image_size=8, downsample=1, gain=1.0, timestep_shift=1.0),
    MiniTask.SCENES: MiniShape(image_size=16, downsample=2, gain=1.0, timestep_shift=2.0),
}
_LATENT_PATCH = 2
_LLM = LLMConfig(
    hidden_size=64,
    intermediate_size=256,  # 16 experts of 16, 32 of 8: what the CUDA kernels take, too
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=43,
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


def mini_config(task: MiniTask) -> BagelConfig:
    """Returns the description of the model of a task: 16 tokens an image in both."""
    shape, ids = SHAPES[task], vocabulary()
    patch_size = _LATENT_PATCH * shape.downsample
    side = shape.image_size // patch_size
    return BagelConfig(
        llm=_LLM,
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=patch_size,
            image_size=shape.image_size,
        ),
        latent_channels=3,
        vae_downsample=shape.downsample,
        latent_patch_size=_LATENT_PATCH,
        max_latent_size=side,
        vit_max_num_patch_per_side=side,
        special_tokens=SpecialTokens(**{name: ids[text] for name, text in SPECIAL_TEXTS.items()}),
    )


def mini_autoencoder(task: MiniTask) -> AutoEncoder:
    """Returns the autoencoder of a task, whose latent is the picture."""
    return identity_autoencoder(SHAPES[task].gain, SHAPES[task].downsample)


def new_model(task: MiniTask, seed: int) -> Bagel:
    """Returns an untrained model: torch's initialisation, but for smaller embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Bagel(mini_config(task))
        torch.nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.5)
    return model


def trained_weights(task: MiniTask) -> dict[str, Tensor]:
    """Returns the tensors of the trained model that the package holds, fp32 by official key."""
    stored = load_file(WEIGHTS / task.value / "ema.safetensors")
    return {key: tensor.float() for key, tensor in stored.items()}


def write_model(
    task: MiniTask, directory: str | os.PathLike[str], model: Bagel | None = None
) -> Path:
    """Writes a model directory in the official format.

    Args:
        directory: made if it is not there; its files are replaced.
        model: dense; None takes the trained weights that the package holds.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = trained_weights(task) if model is None else model.state_dict()
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / "ema.safetensors")
    save_file(mini_autoencoder(task).state_dict(), directory / "ae.safetensors")
    config = mini_config(task)
    sizes = asdict(config.llm)
    del sizes["layers"], sizes["top_k"]
    llm = {"model_type": "qwen2", "hidden_act": "silu", "qk_norm": True}
    llm |= {"tie_word_embeddings": False, **sizes}
    vit = asdict(config.vision)
    del vit["num_channels"], vit["layer_norm_eps"]
    vit["num_hidden_layers"] += 1  # the official file counts SigLIP's last layer, too
    for name, content in (("llm_config.json", llm), ("vit_config.json", vit)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copytree(TOKENIZER, directory, dirs_exist_ok=True)
    return directory


def load_pipeline(directory: str | os.PathLike[str]) -> BagelPipeline:
    """Loads a directory of `write_model`, or what `convert` and `prune` made of it, in fp32."""
    return BagelPipeline.from_pretrained(directory, dtype=torch.float32)
