# SPDX-License-Identifier: Apache-2.0
"""The memory that a training run takes, found without running it.

Weights and optimizer state are counted on a model without data. Activations are what autograd keeps
of a forward pass on fake tensors, which have shapes and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_unified._common import Report, StrPath, context, format_bytes
from sparse_unified.adapt.config import RunConfig, TrainingConfig
from sparse_unified.bagel.config import SpecialTokens, read_config, vae_config
from sparse_unified.bagel.images import transforms
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import LatentSegment, TextSegment, TrainingBatch, pack_training
from sparse_unified.checkpoint import Checkpoint
from sparse_unified.checkpoint.model_dir import find_model
from sparse_unified.checkpoint.safetensors_io import read_header

_CAPTION = 130  # tokens, with bos, eos and some to spare
_FP32 = 4
_ROWS = (
    *("weights", "autoencoder", "activations", "gathered", "pass_gradients"),
    *("gradients", "masters", "moments", "average", "device", "host"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate(Report):
    """Bytes of one process."""

    parameters: int  # number of values of the whole model
    trained: int  # number of those that are trained
    weights: int  # of the model, in its dtype
    autoencoder: int  # of its weights
    # Of a pass, before they are accumulated: of sharded parameters at most all, elsewhere the
    # largest one, and none where they are accumulated in place.
    pass_gradients: int
    gradients: int  # accumulated, fp32
    masters: int  # fp32 master weights; 0 where parameters are fp32 themselves
    moments: int  # of AdamW, fp32
    average: int  # of the weights, fp32
    activations: int  # kept for backward by one pass
    gathered: int  # whole weights of the layers at work, where they are sharded
    device: int  # all that is in the memory of the device
    host: int  # what is in host memory
    optimizer_on_host: bool  # gradients, master weights, moments and average
    tokens: tuple[int, int]  # of the pass, of images and of text
    processes: int  # over which weights and optimizer are sharded

    def title(self) -> str:
        images, texts = self.tokens
        return (
            f"{self.trained:,} of {self.parameters:,} parameters trained, {self.processes} "
            f"process{'es' * (self.processes > 1)}, a pass of {images:,} image and {texts:,} text "
            f"tokens, optimizer {'in host memory' if self.optimizer_on_host else 'on the device'}"
        )

    def table(self) -> Sequence[Sequence[object]]:
        return [(name.replace("_", " "), format_bytes(getattr(self, name))) for name in _ROWS]


@context("estimate_memory")
def estimate_memory(
    model: StrPath, config: TrainingConfig, run: RunConfig | None = None, *, processes: int = 1
) -> MemoryEstimate:
    """Returns what a run of `adapt` takes, by reading headers only.

    Args:
        model: a model directory or a hub id.
        config: how it is trained.
        run: what is trained.
        processes: over which it is sharded.

    Raises:
        ValueError: the checkpoint is damaged, or nothing would be trained.
    """
    run = run or RunConfig()
    source = Checkpoint(find_model(model))
    specs = read_header(source.vae_file).tensors
    vae = vae_config(specs, where=str(source.vae_file))
    dtype = run.dtype or source.spec("language_model.model.embed_tokens.weight").dtype
    # The ids of the markers take no memory, and only the tokenizer knows them.
    ids = SpecialTokens(bos=0, eos=1, start_of_image=2, end_of_image=3)
    built = Bagel(read_config(source, vae, special_tokens=ids), device="meta", dtype=dtype)
    run.prepare_(built, config.seed)
    side = min(transforms(built.config)[0].max_side, run.max_side or 1 << 20)
    side -= side % built.config.latent_downsample
    with context("--max-side"):
        built.config.token_grid(side, side)
    batch = largest_batch(built, side, config.micro_batch_size or config.batch_size // processes)
    autoencoder = sum(spec.nbytes for spec in specs.values())
    return estimate(built, config, batch, run, autoencoder=autoencoder, processes=processes)


def largest_batch(model: Bagel, side: int, count: int) -> TrainingBatch:
    """Returns a pass of `count` images of side x side pixels, each with a caption."""
    config = model.config
    latent = torch.zeros(config.latent_channels, *[side // config.vae_downsample] * 2)
    caption = TextSegment(token_ids=[0] * _CAPTION)
    image = LatentSegment(latent=latent, time=0.5, noise=latent)
    return pack_training(config, [[caption, image]] * count)


def estimate(
    model: Bagel,
    config: TrainingConfig,
    batch: TrainingBatch,
    run: RunConfig | None = None,
    *,
    autoencoder: int = 0,
    processes: int = 1,
) -> MemoryEstimate:
    """Returns what training a model on passes like `batch` takes; it may be on the meta device.

    A `run` that adds adapters has prepared the model.
    """
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    other_device = config.optimizer_device not in (None, *{str(p.device) for p in trained})
    copied = [p for p in trained if p.dtype != torch.float32 or other_device]
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
        pass_gradients = max((p.nbytes + _FP32 * p.numel() for p in trained if copied), default=0)
    count = sum(p.numel() for p in trained)
    fp32 = _FP32 * count // processes
    images = 0 if batch.latents is None else len(batch.latents)
    optimizer = {
        "gradients": fp32,
        "masters": _FP32 * sum(p.numel() for p in copied) // processes,
        "moments": 2 * fp32,
        "average": fp32 if config.ema_decay is not None else 0,
    }
    always = {
        "weights": weights // processes,
        "autoencoder": autoencoder,
        "pass_gradients": pass_gradients,
        "activations": _activations(model, batch, run, config),
        "gathered": gathered,
    }
    on_host = config.optimizer_device == "cpu"
    host = sum(optimizer.values()) if on_host else 0
    return MemoryEstimate(
        **always,
        **optimizer,
        parameters=sum(p.numel() for p in every),
        trained=count,
        device=sum(always.values()) + sum(optimizer.values()) - host,
        host=host,
        optimizer_on_host=on_host,
        tokens=(images, batch.num_tokens - images),
        processes=processes,
    )


def _activations(
    model: Bagel, batch: TrainingBatch, run: RunConfig | None, config: TrainingConfig
) -> int:
    """Returns the bytes kept for backward; with checkpointing one layer runs again at a time."""
    twin = Bagel(model.config, device="meta", dtype=model.dtype)
    if run is not None and run.lora_rank is not None:
        run.prepare_(twin, 0)
    for own, given in zip(twin.parameters(), model.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in twin.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty_like(weight, device="cpu")
                    module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
        weights = {p.untyped_storage()._cdata for p in twin.parameters()}
        # Bytes of each layer, the first with what comes before it, and behind the last.
        counts: list[int] = []
        kept: dict[int, Tensor] = {}  # the tensors are held, so no address comes twice

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and storage._cdata not in kept:
                kept[storage._cdata] = tensor
                counts[-1] += storage.nbytes()
            return tensor

        for layer in twin.language_model.model.layers:
            layer.register_forward_hook(lambda *_: counts.append(0))
        largest = 0
        distill = config.distill_weight > 0
        for again in (False, True)[: 1 + config.checkpointing]:
            largest = max(counts[:-1], default=0)
            kept.clear()
            counts[:] = [0]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                training_forward(twin, batch, checkpointing=again, distill=distill)
        return sum(counts) + largest
