# SPDX-License-Identifier: Apache-2.0
"""What a run takes of memory, from the headers of a checkpoint alone.

Parameters are counted exactly, on a model without data. Activations follow a formula: per layer and
stream, what the ops of `bagel` keep for backward, in elements per token of T tokens:

    norm       fp32 copy of x, its normalised value, its output
    attention  queries Q and keys and values K before and after norm and rotation, output
    FFN        dense: four times the width; sparse: the rows of the K chosen experts before and
               after the activation where experts train, and their outputs

With checkpointing only the inputs of the layers are kept, and one layer at a time is as above.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import torch
from torch import nn

from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.freeze import freeze
from sparse_unified.adapt.run import RunConfig
from sparse_unified.adapt.select import freeze_component
from sparse_unified.bagel.attention import GEN
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.loading import read_config
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.shapes import vae_config
from sparse_unified.bagel.transforms import vae_transform
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.hub import find_model
from sparse_unified.checkpoint.report import Report, format_bytes, format_table
from sparse_unified.checkpoint.safetensors_file import read_header
from sparse_unified.nn import SparseMoE

_TEXT_TOKENS = 128  # of a caption, with some to spare
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate(Report):
    """Bytes of one process.

    Attributes:
        parameters, trained: numbers of values, of the whole model.
        weights: of the model, in its dtype. autoencoder: of its own.
        gradients, masters, moments, average: fp32, of the trained parameters alone; masters are
            0 where parameters are fp32 themselves.
        activations: kept for backward by one pass, a forward pass of the largest picture with a
            caption for each of its sequences.
        gathered: whole weights of the layers at work, where they are sharded.
        optimizer_on_host: whether gradients, masters, moments and average are in host memory.
        tokens: of the pass, of pictures and of text.
        processes: over which weights and optimizer are sharded.
    """

    parameters: int
    trained: int
    weights: int
    autoencoder: int
    gradients: int
    masters: int
    moments: int
    average: int
    activations: int
    gathered: int
    optimizer_on_host: bool
    tokens: tuple[int, int]
    processes: int

    @property
    def optimizer(self) -> int:
        """Gradients, masters, moments and average."""
        return self.gradients + self.masters + self.moments + self.average

    @property
    def device(self) -> int:
        """All that is in the memory of the device."""
        kept = 0 if self.optimizer_on_host else self.optimizer
        return self.weights + self.autoencoder + self.activations + self.gathered + kept

    @property
    def host(self) -> int:
        """What is in host memory."""
        return self.optimizer if self.optimizer_on_host else 0

    def to_dict(self) -> dict[str, object]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"device": self.device, "host": self.host}

    def to_text(self) -> str:
        where = "host" if self.optimizer_on_host else "device"
        images, texts = self.tokens
        rows: list[tuple[str, str, str]] = [
            ("", "bytes", "where"),
            ("weights", format_bytes(self.weights), "device"),
            ("autoencoder", format_bytes(self.autoencoder), "device"),
            ("gradients", format_bytes(self.gradients), where),
            ("fp32 masters", format_bytes(self.masters), where),
            ("moments", format_bytes(self.moments), where),
            ("average", format_bytes(self.average), where),
            ("activations", format_bytes(self.activations), "device"),
            ("gathered layers", format_bytes(self.gathered), "device"),
            ("in all", format_bytes(self.device), "device"),
            ("", format_bytes(self.host), "host"),
        ]
        head = (
            f"{self.trained:,} of {self.parameters:,} parameters trained, {self.processes} "
            f"process{'es' * (self.processes > 1)}, a pass of {images:,} image and {texts:,} text "
            "tokens"
        )
        return f"{head}\n{format_table(rows, header=True)}"


def estimate_memory(
    model: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig | None = None,
    *,
    processes: int = 1,
) -> MemoryEstimate:
    """Returns what a run of `adapt` takes, by reading headers only.

    Args:
        model: a model directory or a hub id. config, run: of the run.
        processes: over which it is sharded.

    Raises:
        ValueError: the checkpoint is damaged, or nothing would be trained.
    """
    run = run or RunConfig()
    source = Checkpoint(find_model(model, where="adapt"))
    specs = read_header(source.vae_file).tensors
    vae = vae_config({k: s.shape for k, s in specs.items()}, where=str(source.vae_file))
    dtype = run.dtype or source.spec("language_model.model.embed_tokens.weight").dtype
    built = Bagel(read_config(source, vae), device="meta", dtype=dtype)
    freeze(built, run.stage)
    freeze_component(built, run.component)
    side = vae_transform(built.config).max_side
    if run.max_side is not None:
        side = min(side, run.max_side)
    grid = built.config.token_grid(
        *[side // built.config.latent_downsample * built.config.latent_downsample] * 2,
        where="--max-side",
    )
    count = config.micro_batch_size or config.batch_size // processes
    images, texts = count * grid[0] * grid[1], count * (_TEXT_TOKENS + 2)
    return estimate(
        built,
        config,
        image_tokens=images,
        text_tokens=texts,
        predicted_tokens=0,
        autoencoder=sum(spec.nbytes for spec in specs.values()),
        processes=processes,
    )


def estimate(
    model: Bagel,
    config: TrainingConfig,
    *,
    image_tokens: int,
    text_tokens: int,
    predicted_tokens: int,
    autoencoder: int = 0,
    processes: int = 1,
) -> MemoryEstimate:
    """Returns what training a model takes, which may be on the meta device.

    Args:
        model: its parameters with `requires_grad` are trained.
        image_tokens, text_tokens: of one pass, in the gen and the und stream.
        predicted_tokens: text tokens with a loss.
        autoencoder: its bytes.
        processes: over which the model is sharded.
    """
    every = list(model.parameters())
    trained = sum(p.numel() for p in every if p.requires_grad)
    needs_master = sum(
        p.numel()
        for p in every
        if p.requires_grad
        and (p.dtype != torch.float32 or config.optimizer_device not in (None, str(p.device)))
    )
    layers = list(model.language_model.model.layers)
    layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    weights = sum(p.nbytes for p in every)
    gathered = 0
    if processes > 1:
        # The layer at work, the next one on its way, and all outside the layers.
        gathered = weights - sum(layer_bytes) + sum(sorted(layer_bytes)[-2:])
    fp32 = _FP32 * trained // processes
    return MemoryEstimate(
        parameters=sum(p.numel() for p in every),
        trained=trained,
        weights=weights // processes,
        autoencoder=autoencoder,
        gradients=fp32,
        masters=_FP32 * needs_master // processes,
        moments=2 * fp32,
        average=fp32 if config.ema_decay is not None else 0,
        activations=_activations(model, config, image_tokens, text_tokens, predicted_tokens),
        gathered=gathered,
        optimizer_on_host=config.optimizer_device == "cpu",
        tokens=(image_tokens, text_tokens),
        processes=processes,
    )


def _activations(
    model: Bagel, config: TrainingConfig, images: int, texts: int, predicted: int
) -> int:
    layers = list(model.language_model.model.layers)
    size = model.dtype.itemsize
    kept = [
        sum(
            tokens * _stream_bytes(model.config, n, layer, stream, size)
            for stream, tokens in (("", texts), (GEN, images))
        )
        for n, layer in enumerate(layers)
    ]
    width = model.config.llm.hidden_size
    # The float logits and their softmax, the head's input, and what the image's loss compares.
    heads = predicted * (2 * _FP32 * model.config.llm.vocab_size + size * width)
    heads += images * (3 * _FP32 * model.config.token_channels + size * width)
    if not config.checkpointing:
        return sum(kept) + heads
    inputs = len(layers) * (images + texts) * width * size
    return inputs + max(kept) + heads


def _stream_bytes(config: BagelConfig, n: int, layer: nn.Module, stream: str, size: int) -> int:
    """Returns the bytes that one token of a stream leaves for backward in one layer."""
    llm = config.llm
    held = llm.held(n, gen=stream == GEN)
    wide = 0 if size == _FP32 else _FP32  # a copy of its own, where x is not fp32 already
    queries = held.num_attention_heads * llm.head_dim
    keys = held.num_key_value_heads * llm.head_dim if queries else 0
    norms = (bool(queries) + bool(held.intermediate_size)) * llm.hidden_size * (wide + 3 * size)
    attention = queries * (wide + 5 * size) + keys * (wide + 6 * size)
    ffn = getattr(layer, f"mlp{stream}")
    if isinstance(ffn, SparseMoE):
        rows = ffn.top_k * ffn.layout.expert_width
        trains = ffn.gate_proj.requires_grad
        own = ffn.top_k * llm.hidden_size + (2 * rows if trains else 0)
        own += 4 * ffn.layout.shared_width
        return norms + attention + size * own + 2 * _FP32 * ffn.num_experts
    return norms + attention + size * 4 * held.intermediate_size
