# SPDX-License-Identifier: Apache-2.0
"""What a run takes of memory, from the headers of a checkpoint alone.

Parameters are counted exactly, on a model without data. Activations follow a formula: per layer and
stream, what the ops of `bagel` keep for backward, in elements per token of T tokens:

    norm       x in fp32, its normalised value; its output for the projections that follow
    attention  queries and keys in fp32, normalised, rotated; values; the mixed values twice
    FFN        dense: gate, its activation, up, and their product; sparse: gate and up of the
               chosen experts, and what each of them returns

What only the gradient of a weight needs is left out where that weight is frozen. With checkpointing
only the inputs of the layers are kept, and one layer at a time is as above.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_unified._common import Report, context, format_bytes
from sparse_unified.adapt.config import RunConfig, TrainingConfig
from sparse_unified.adapt.freeze import freeze
from sparse_unified.bagel.attention import GEN
from sparse_unified.bagel.config import BagelConfig, SpecialTokens, vae_config
from sparse_unified.bagel.images import vae_transform
from sparse_unified.bagel.loading import read_config
from sparse_unified.bagel.model import Bagel
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.safetensors_io import read_header
from sparse_unified.nn import SparseMoE

_TEXT_TOKENS = 128  # of a caption, with some to spare
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate(Report):
    """Bytes of one process.

    Attributes:
        parameters: number of values of the whole model.
        trained: number of those that are trained.
        weights: of the model, in its dtype.
        autoencoder: of its weights.
        pass_gradients: those of a pass before they are accumulated: of sharded parameters all,
            elsewhere the largest one, and none where they are accumulated in place.
        gradients: accumulated, fp32.
        masters: fp32 master weights; 0 where parameters are fp32 themselves.
        moments: of AdamW, fp32.
        average: of the weights, fp32.
        activations: kept for backward by one pass, a forward pass of the largest image with a
            caption for each of its sequences.
        gathered: whole weights of the layers at work, where they are sharded.
        optimizer_on_host: whether gradients, master weights, moments and average are in host
            memory.
        tokens: of the pass, of images and of text.
        processes: over which weights and optimizer are sharded.
    """

    derived = ("device", "host")

    parameters: int
    trained: int
    weights: int
    autoencoder: int
    pass_gradients: int
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
        """Gradients, master weights, moments and average."""
        return self.gradients + self.masters + self.moments + self.average

    @property
    def device(self) -> int:
        """All that is in the memory of the device."""
        always = self.weights + self.autoencoder + self.pass_gradients
        return always + self.activations + self.gathered + self.optimizer - self.host

    @property
    def host(self) -> int:
        """What is in host memory."""
        return self.optimizer if self.optimizer_on_host else 0

    def title(self) -> str:
        images, texts = self.tokens
        return (
            f"{self.trained:,} of {self.parameters:,} parameters trained, {self.processes} "
            f"process{'es' * (self.processes > 1)}, a pass of {images:,} image and {texts:,} text "
            "tokens"
        )

    def headings(self) -> Sequence[str]:
        return ("", "bytes", "where")

    def table(self) -> Sequence[Sequence[object]]:
        where = "host" if self.optimizer_on_host else "device"
        rows = (
            ("weights", self.weights, "device"),
            ("autoencoder", self.autoencoder, "device"),
            ("gradients of a pass", self.pass_gradients, "device"),
            ("accumulated gradients", self.gradients, where),
            ("fp32 master weights", self.masters, where),
            ("moments", self.moments, where),
            ("average", self.average, where),
            ("activations", self.activations, "device"),
            ("gathered layers", self.gathered, "device"),
            ("in all", self.device, "device"),
            ("", self.host, "host"),
        )
        return [(name, format_bytes(count), place) for name, count, place in rows]


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
    # The ids of the markers take no memory, and only the tokenizer knows them.
    ids = SpecialTokens(bos=0, eos=1, start_of_image=2, end_of_image=3)
    built = Bagel(read_config(source, vae, special_tokens=ids), device="meta", dtype=dtype)
    freeze(built, run.stage, component=run.component)
    side = vae_transform(built.config).max_side
    if run.max_side is not None:
        side = min(side, run.max_side)
    with context("--max-side"):
        rows, columns = built.config.token_grid(*[side - side % built.config.latent_downsample] * 2)
    count = config.micro_batch_size or config.batch_size // processes
    return estimate(
        built,
        config,
        image_tokens=count * rows * columns,
        text_tokens=count * (_TEXT_TOKENS + 2),
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
        image_tokens: of one pass, in the gen stream.
        text_tokens: of one pass, in the und stream.
        predicted_tokens: text tokens with a loss.
        autoencoder: its bytes.
        processes: over which the model is sharded.
    """
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    copied = [
        p
        for p in trained
        if p.dtype != torch.float32 or config.optimizer_device not in (None, str(p.device))
    ]
    weights = sum(p.nbytes for p in every)
    gathered = 0
    if processes > 1:
        # The layer at work, the next one on its way, and all outside the layers.
        layers = model.language_model.model.layers
        layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        gathered = weights - sum(layer_bytes) + sum(sorted(layer_bytes)[-2:])
        pass_gradients = sum(p.nbytes for p in trained) // processes
    else:
        # In its own dtype, and as fp32 on its way to the sum.
        moved = [p.nbytes + _FP32 * p.numel() for p in trained]
        pass_gradients = max(moved) if copied else 0
    count = sum(p.numel() for p in trained)
    fp32 = _FP32 * count // processes
    return MemoryEstimate(
        parameters=sum(p.numel() for p in every),
        trained=count,
        weights=weights // processes,
        autoencoder=autoencoder,
        pass_gradients=pass_gradients,
        gradients=fp32,
        masters=_FP32 * sum(p.numel() for p in copied) // processes,
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
        texts * _stream_bytes(model.config, n, layer, "", size)
        + images * _stream_bytes(model.config, n, layer, GEN, size)
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


def _stream_bytes(config: BagelConfig, n: int, layer: Any, stream: str, size: int) -> int:
    """Returns the bytes that one token of a stream leaves for backward in one layer."""
    llm = config.llm
    shape = llm.layer(n, "gen" if stream == GEN else "und")
    total = 0
    if shape.has_attention:
        attention = layer.self_attn
        group = llm.num_attention_heads // llm.num_key_value_heads
        queries = group * len(shape.query_groups) * llm.head_dim
        keys = len(shape.kv_heads) * llm.head_dim
        trains = {
            name: size * _trains(getattr(attention, f"{name}{stream}"))
            for name in ("q_norm", "k_norm", "q_proj", "o_proj")
        }
        norm = getattr(layer, f"input_layernorm{stream}")
        total += llm.hidden_size * (_FP32 + size * _trains(norm) + trains["q_proj"])
        total += queries * (_FP32 + trains["q_norm"] + 2 * size + trains["o_proj"])
        total += keys * (_FP32 + trains["k_norm"] + 2 * size)
    ffn = getattr(layer, f"mlp{stream}")
    if ffn is None:
        return total
    norm = getattr(layer, f"post_attention_layernorm{stream}")
    total += llm.hidden_size * (_FP32 + size * _trains(norm))
    if isinstance(ffn, SparseMoE):
        rows = ffn.top_k * ffn.layout.expert_width
        total += size * (llm.hidden_size * (1 + ffn.top_k) + 2 * rows)
        total += size * (3 + ffn.gate_proj.requires_grad) * ffn.layout.shared_width
        return total + 3 * _FP32 * ffn.num_experts
    total += size * llm.hidden_size * _trains(ffn.gate_proj)
    return total + size * shape.width * (3 + _trains(ffn.down_proj))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
