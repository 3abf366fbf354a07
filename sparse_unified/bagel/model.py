# SPDX-License-Identifier: Apache-2.0
"""BAGEL: one decoder that reads text and images, writes text, and denoises images.

Every method of `Bagel` works on several sequences at once, in one packed pass. A sequence is known
by its KV cache, its context; the `prefill_*` methods extend contexts in place, the others only read
them or, for text, add the token they are given. `Denoiser` is the repeated step of generation,
`training_forward` the forward pass of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_unified._common import context, require
from sparse_unified.bagel.attention import KVCache, Packing, pack
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.decoder import LanguageModel
from sparse_unified.bagel.packing import TrainingBatch
from sparse_unified.bagel.vision import FeedForward, VisionModel, grid_positions, patchify
from sparse_unified.nn import SparseMoE

_MAX_PERIOD = 10000.0


def sincos_table(side: int, channels: int) -> Tensor:
    """Returns the embedding of a square grid, [side * side, channels] fp32: of the column, then of
    the row, sines, then cosines, of the coordinate times 10000^(-i / (channels / 4))."""
    require(channels % 4 == 0, "sincos_table: channels must be a multiple of 4", channels)
    steps = torch.arange(channels // 4, dtype=torch.float64) / (channels / 4)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), _MAX_PERIOD**-steps)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, channels / 2]
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1).float()


class PositionTable(nn.Module):
    """A frozen `sincos_table`, stored in the checkpoint as `pos_embed`."""

    def __init__(self, side: int, channels: int, **factory: Any) -> None:
        super().__init__()
        table = torch.empty(side * side, channels, **factory)
        if not table.is_meta:
            table.copy_(sincos_table(side, channels))
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Returns the rows of `position_ids` [n] int64: [n, channels]."""
        return self.pos_embed[position_ids]


class TimestepEmbedder(nn.Module):
    """Turns a diffusion time into a hidden vector: 256 cosines and sines, then a two-layer MLP."""

    num_frequencies = 256

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__()
        first = nn.Linear(self.num_frequencies, hidden_size, **factory)
        last = nn.Linear(hidden_size, hidden_size, **factory)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, time: Tensor) -> Tensor:
        """Maps times [n] fp32 to [n, D] in the dtype of the weights."""
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device)
        frequencies = torch.exp(-math.log(_MAX_PERIOD) * exponents / half)
        angles = time[:, None].float() * frequencies  # [n, 128]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class Bagel(nn.Module):
    """The model without its autoencoder, under the official key names.

    Args:
        config: what it is made of.
        device, dtype: of the parameters; norms and rotary positions compute in fp32 regardless.

    Source: BAGEL-7B-MoT (ByteDance-Seed/Bagel) and its sparse versions (SparseUnifiedModel).
    """

    def __init__(
        self,
        config: BagelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        width = config.llm.hidden_size
        self.config = config
        self.language_model = LanguageModel(config.llm, **factory)
        self.vit_model = VisionModel(config.vision, **factory)
        self.connector = FeedForward(config.vision.hidden_size, width, width, **factory)
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width, **factory)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width, **factory)
        self.time_embedder = TimestepEmbedder(width, **factory)
        self.vae2llm = nn.Linear(config.token_channels, width, **factory)
        self.llm2vae = nn.Linear(width, config.token_channels, **factory)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of all that is no decoder layer."""
        return self.llm2vae.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are stored as."""
        return self.llm2vae.weight.dtype

    def new_contexts(self, count: int) -> list[KVCache]:
        """Returns empty KV caches for `count` sequences."""
        return [KVCache(self.config.llm.num_hidden_layers) for _ in range(count)]

    def forward(self, batch: TrainingBatch, *, checkpointing: bool = False) -> TrainingOutput:
        """Returns the losses of packed training sequences; see `training_forward`."""
        return training_forward(self, batch, checkpointing=checkpointing)

    @context("prefill_text")
    @torch.no_grad()
    def prefill_text(self, contexts: Sequence[KVCache], token_ids: Sequence[Sequence[int]]) -> None:
        """Lets each context read a text, given as ids without bos and eos, which are added."""
        special, most = self.config.special_tokens, self.config.llm.vocab_size - 1
        tokens = (token for ids in token_ids for token in ids)
        wrong = next((token for token in tokens if not 0 <= token <= most), None)
        require(wrong is None, f"token_ids must be from 0 to {most}", wrong)
        self._read_text(contexts, [[special.bos, *ids, special.eos] for ids in token_ids])

    def next_logits(self, contexts: Sequence[KVCache], tokens: Sequence[int]) -> Tensor:
        """Appends a token to each context; returns logits [B, vocab_size] fp32 of the next ones."""
        return torch.cat(self.text_logits(contexts, [[token] for token in tokens]))

    @context("text_logits")
    @torch.no_grad()
    def text_logits(
        self, contexts: Sequence[KVCache], token_ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Appends a text to each context, with bos and eos only where they are given; returns of
        each the logits [L, vocab_size] fp32 of what follows its L tokens."""
        head = _loaded(self.language_model.lm_head, "lm_head")
        logits = head(self._read_text(contexts, token_ids)).float()
        return list(logits.split([len(ids) for ids in token_ids]))

    @context("prefill_vit")
    @torch.no_grad()
    def prefill_vit(self, contexts: Sequence[KVCache], images: Sequence[Tensor]) -> None:
        """Lets each context see an image through the ViT: normalised pixels [3, H, W], sides
        multiples of the patch size."""
        vit_model = _loaded(self.vit_model, "vit_model")
        side, patch = self.config.vit_max_num_patch_per_side, self.config.vision.patch_size
        cut = [self._patches(image.to(self.dtype), patch, side) for image in images]
        lengths = [len(patches) for patches, _ in cut]
        positions = torch.cat([own for _, own in cut])
        seen = vit_model(torch.cat([patches for patches, _ in cut]), positions, lengths)
        seen = self.connector(seen) + self.vit_pos_embed(positions)  # [N, D]
        start, end = self.markers().split(1)
        parts = [torch.cat([start, part, end]) for part in seen.split(lengths)]
        is_vit = torch.tensor([i for n in lengths for i in (False, *[True] * n, False)])
        self._read(
            contexts,
            torch.cat(parts),
            [length + 2 for length in lengths],
            text_rows=(~is_vit).nonzero()[:, 0].to(self.device),
            vit_rows=is_vit.nonzero()[:, 0].to(self.device),
        )

    @context("prefill_latents")
    @torch.no_grad()
    def prefill_latents(self, contexts: Sequence[KVCache], latents: Sequence[Tensor]) -> None:
        """Lets each context see an image through the VAE, as a finished generation (time 0): its
        latent [C, h, w], sides multiples of `latent_patch_size`."""
        time = torch.zeros(1, device=self.device)
        patch, side = self.config.latent_patch_size, self.config.max_latent_size
        gen = [self.embed_latent(*self._patches(latent, patch, side), time) for latent in latents]
        markers = self.markers().repeat(len(gen), 1)
        lengths = [len(part) for part in gen]
        self._read(
            contexts, markers, [2] * len(gen), gen=torch.cat(gen), gen_lengths=lengths, times=time
        )

    @torch.no_grad()
    def velocity(
        self,
        tokens: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        time: Tensor,
        branches: Sequence[Sequence[KVCache]],
    ) -> list[Tensor]:
        """Predicts d x / d t of several noisy images, each in several contexts, in one packed pass;
        see `Denoiser`."""
        return Denoiser(self, grids, branches)(tokens, time.to(self.device))

    def _read_text(self, contexts: Sequence[KVCache], texts: Sequence[Sequence[int]]) -> Tensor:
        """Lets each context read token ids; returns the final states of all of them."""
        ids = torch.tensor([token for text in texts for token in text], device=self.device)
        und = self.language_model.model.embed_tokens(ids)
        return self._read(contexts, und, [len(text) for text in texts], causal=True)

    def _read(
        self,
        contexts: Sequence[KVCache],
        und: Tensor,
        lengths: Sequence[int],
        *,
        gen: Tensor | None = None,
        gen_lengths: Sequence[int] | None = None,
        times: Tensor | None = None,
        causal: bool = False,
        **rows: Tensor,
    ) -> Tensor:
        """Runs embedded tokens behind their contexts; returns the final states of the und ones."""
        packing = pack(
            self.config.llm,
            contexts,
            lengths,
            gen_lengths=gen_lengths,
            causal=causal,
            extend=True,
            device=self.device,
            **rows,
        )
        hidden: Tensor = self.language_model.model(und, gen, packing, times)[0]
        for i, (past, length) in enumerate(zip(contexts, lengths, strict=True)):
            past.length += length + (gen_lengths[i] if gen_lengths else 0)
            past.position += length if causal else 1
        return hidden

    def _patches(self, image: Tensor, patch: int, side: int) -> tuple[Tensor, Tensor]:
        """Returns the patches of an image and their places in a table of `side` x `side`."""
        height, width = image.shape[1:]
        rule = f"image sides must be at most {side * patch}"
        require(max(height, width) <= side * patch, rule, f"{height} x {width}")
        positions = grid_positions(height // patch, width // patch, side, device=self.device)
        return patchify(image.to(self.device), patch), positions

    def markers(self) -> Tensor:
        """Returns the embeddings of start and end of image, [2, D]."""
        special = self.config.special_tokens
        ids = torch.tensor([special.start_of_image, special.end_of_image], device=self.device)
        return self.language_model.model.embed_tokens(ids)

    def embed_latent(self, tokens: Tensor, positions: Tensor, time: Tensor) -> Tensor:
        """Embeds the tokens [N, p * p * C] of one image, at `positions` [N] of `latent_pos_embed`,
        with its time [1], to [N, D]."""
        embedded = self.vae2llm(tokens.to(self.vae2llm.weight))
        return embedded + self.time_embedder(time) + self.latent_pos_embed(positions)


def _loaded(module: Any, what: str) -> Any:
    """Returns a module that the task may have left out."""
    found = "a model loaded for another task; load it with task='all'"
    require(module is not None, f"{what} must be loaded for this", found)
    return module


class Denoiser:
    """Predicts d x / d t of several noisy images, each in several contexts, in one packed pass.

    What no step changes is computed once. A call then makes no tensor on the host and asks
    nothing of the device, so that it can be compiled as one graph and recorded as a CUDA graph.

    Args:
        grids: rows and columns of tokens of each image, N of them.
        branches: contexts in which to predict each image; they are only read.
    """

    def __init__(
        self, model: Bagel, grids: Sequence[tuple[int, int]], branches: Sequence[Sequence[KVCache]]
    ) -> None:
        flat = [past for contexts in branches for past in contexts]
        self.model, device = model, model.device
        self.num_branches = [len(contexts) for contexts in branches]
        images = [(r * c, len(own)) for (r, c), own in zip(grids, branches, strict=True)]
        self.rows = [length * count for length, count in images]
        gen_lengths = [length for length, count in images for _ in range(count)]
        markers = [2] * len(flat)  # around each image
        self.packing = pack(model.config.llm, flat, markers, gen_lengths=gen_lengths, device=device)
        self.markers = model.markers().repeat(len(flat), 1)
        side = model.config.max_latent_size
        self.positions = [grid_positions(*grid, side, device=device) for grid in grids]

    def __call__(self, tokens: Sequence[Tensor], time: Tensor) -> list[Tensor]:
        """Runs the model once, with gradients where they are on.

        Args:
            tokens: noisy image [N, p * p * C] of each image.
            time: [1] fp32 on the device of the model, 1 for noise and 0 for a finished image.

        Returns:
            For each image the velocities [number of its branches, N, p * p * C], fp32.
        """
        model, gen = self.model, []
        for x, positions, count in zip(tokens, self.positions, self.num_branches, strict=True):
            gen += [model.embed_latent(x, positions, time)] * count
        hidden = model.language_model.model(self.markers, torch.cat(gen), self.packing, time)[1]
        parts = model.llm2vae(hidden).float().split(self.rows)
        return [part.view(-1, *x.shape) for x, part in zip(tokens, parts, strict=True)]


class Routing(NamedTuple):
    """What a sparse block did with its tokens, summed over them; fp32 sums have a graph."""

    load: Tensor  # tokens of each expert, [E] int64
    probability: Tensor  # under a softmax of the router logits, [E]
    z: Tensor  # logsumexp(logits)^2, []
    inputs: Tensor  # of the router, [D], without a graph
    tokens: int
    # Squared distance of the output to that of the dense FFN, and its square; [], 0 if not asked.
    error: Tensor = torch.zeros(())
    power: Tensor = torch.zeros(())  # without a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutput:
    """Losses of a batch, fp32 scalars with a graph; zero, without one, where nothing asks."""

    text_loss_sum: Tensor  # cross-entropy
    text_tokens: int  # that are asked for
    image_loss_sum: Tensor  # squared error of the velocity, mean over channels
    image_tokens: int  # that are asked for
    routing: dict[tuple[str, int], Routing]  # by (component, layer), those that have seen tokens


def training_forward(
    model: Bagel, batch: TrainingBatch, *, checkpointing: bool = False, distill: bool = False
) -> TrainingOutput:
    """Runs packed sequences through the model and returns their losses.

    Args:
        model: dense or sparse, any part of it trainable.
        batch: of `pack_training`, on the device of the model.
        checkpointing: keep only the inputs of each layer for the backward pass and run the layer a
            second time there.
        distill: run each sparse block on the same tokens once more, and its dense FFN without
            gradients, for `distillation_loss`.
    """
    language, dtype = model.language_model, model.dtype
    decoder = language.model
    und = decoder.embed_tokens(batch.und_ids)
    if batch.vit_patches is not None and batch.packing.vit_rows is not None:
        seen = model.vit_model(
            batch.vit_patches.to(dtype), batch.vit_positions, list(batch.vit_lengths)
        )
        seen = model.connector(seen) + model.vit_pos_embed(batch.vit_positions)
        und = und.index_copy(0, batch.packing.vit_rows, seen.to(und.dtype))
    gen = None
    times: Any = batch.times  # of images, then of tokens
    if batch.latents is not None:
        gen = model.vae2llm(batch.latents.to(dtype))
        gen = gen + model.latent_pos_embed(batch.latent_positions)
        gen = gen + model.time_embedder(times).index_select(0, batch.time_rows)
        times = times.index_select(0, batch.time_rows)
    packing = batch.packing.additive(dtype)
    # Logits, top_k, inputs, and with `distill` error and power, of each block.
    routed: dict[tuple[str, int], tuple[Tensor, int, Tensor, tuple[Tensor, ...]]] = {}
    for index, layer in enumerate(decoder.layers):
        given = (layer, und, gen, packing, times, distill)
        und, gen, found = (
            checkpoint(_run_layer, *given, use_reentrant=False)
            if checkpointing
            else _run_layer(*given)
        )
        routed |= {(component, index): own for component, own in found.items()}

    text_loss = image_loss = torch.zeros((), device=und.device)
    if batch.text_tokens:
        hidden = decoder.norm(und.index_select(0, batch.label_rows))
        text_loss = F.cross_entropy(language.lm_head(hidden).float(), batch.labels, reduction="sum")
    if batch.image_tokens and gen is not None:
        hidden = decoder.norm_moe_gen(gen.index_select(0, batch.velocity_rows))
        predicted = model.llm2vae(hidden).float()
        image_loss = (predicted - batch.velocities).square().mean(-1).sum()
    routing: dict[tuple[str, int], Routing] = {}
    alike: dict[tuple[torch.Size, int], list[tuple[str, int]]] = {}
    for key, (logits, top_k, *_) in routed.items():
        alike.setdefault((logits.shape, top_k), []).append(key)
    for ((tokens, _), top_k), keys in alike.items():
        logits = torch.stack([routed[key][0] for key in keys])  # [blocks, T, E]
        loads, shares = expert_load(logits, top_k), logits.softmax(-1).sum(-2)
        squares = logits.logsumexp(-1).square().sum(-1)
        for key, load, share, z in zip(keys, loads, shares, squares, strict=True):
            inputs = routed[key][2].flatten(0, -2).sum(0, dtype=torch.float32)
            routing[key] = Routing(load, share, z, inputs, tokens, *routed[key][3])
    return TrainingOutput(
        text_loss_sum=text_loss,
        text_tokens=batch.text_tokens,
        image_loss_sum=image_loss,
        image_tokens=batch.image_tokens,
        routing=routing,
    )


def _run_layer(
    layer: nn.Module,
    und: Tensor,
    gen: Tensor | None,
    packing: Packing,
    times: Tensor | None,
    distill: bool,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Returns the streams behind a layer, and what its sparse blocks did, by component.

    Checkpointing runs all of it again, so that nothing of the distillation is kept.
    """
    found: dict[str, Any] = {}

    def keep(component: str, block: Any, given: Any, named: Any, out: Any) -> None:
        x = given[0].detach()
        sums: tuple[Tensor, ...] = ()
        if distill:
            # Once more, since the target moves with the input, which would be pulled to where it
            # is not.
            own = block.forward(x, **named) if torch.is_grad_enabled() else out
            y, target = own[0].float(), block.dense(x).float()
            sums = (y - target).square().sum(), target.square().sum()
        found[component] = (out[1], block.top_k, x, sums)

    with ExitStack() as hooks:
        for component, block in (("und", layer.mlp), ("gen", layer.mlp_moe_gen)):
            if isinstance(block, SparseMoE):
                # Those of a model that was converted in memory return y alone.
                before, block.return_router_logits = block.return_router_logits, True
                hooks.callback(setattr, block, "return_router_logits", before)
                hook = partial(keep, component)
                hooks.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        und, gen = layer(und, gen, packing, times)
    return und, gen, found


def distillation_loss(
    routing: Mapping[tuple[str, int], Routing],
    whole: Mapping[tuple[str, int], Tensor] | None = None,
) -> Tensor:
    """Returns the relative squared error of sparse blocks, |y - dense|^2 / |dense|^2, their mean.

    Args:
        routing: of a batch, from `training_forward(..., distill=True)`.
        whole: |dense|^2 over the whole that the batch is a part of, by block, of those that have
            seen tokens; what is returned is its share. None: the batch is the whole.
    """
    if whole is None:
        whole = {key: own.power for key, own in routing.items()}
    shares = [own.error / whole[key] for key, own in routing.items()]
    return torch.stack(shares).sum() / len(whole) if shares else torch.zeros(())


def router_losses(
    routing: Mapping[tuple[str, int], Routing],
    whole: Mapping[tuple[str, int], tuple[Tensor, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns load-balance loss and z-loss, means over the sparse blocks.

    The balance loss of a block is E * sum_e f_e * P_e: f_e is the share of assignments that expert
    e takes, P_e its mean probability under softmax; 1 when both are even. Source: Switch
    Transformer (arXiv 2101.03961), with top-k counts; the z-loss, logsumexp(logits)^2, is that of
    arXiv 2202.08906.

    Args:
        routing: of a batch.
        whole: load [E] and tokens of the whole that the batch is a part of, by block, its own
            included; what is returned is its share, so that the shares of all parts add up. None:
            the batch is the whole.
    """
    if whole is None:
        whole = {key: (own.load, own.tokens) for key, own in routing.items()}
    alike: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for key in routing:
        alike.setdefault((len(whole[key][0]), whole[key][1]), []).append(key)
    balance = z_loss = torch.zeros(())
    for (count, tokens), keys in alike.items():
        load = torch.stack([whole[key][0] for key in keys])  # [blocks, E]
        share = load / load.sum(-1, keepdim=True)
        mean = torch.stack([routing[key].probability for key in keys]) / tokens
        balance = balance.to(mean) + (count * (share * mean).sum(-1)).sum()
        z_loss = z_loss.to(mean) + (torch.stack([routing[key].z for key in keys]) / tokens).sum()
    blocks = max(1, sum(tokens > 0 for _, tokens in whole.values()))
    return balance / blocks, z_loss / blocks


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Returns that of `router_losses` for one block and pass, of router logits [T, E]."""
    load = expert_load(logits, top_k)
    return len(load) * (load / load.sum() * logits.softmax(-1).mean(0)).sum()


def expert_load(logits: Tensor, top_k: int) -> Tensor:
    """Counts the tokens of each expert, [..., E] int64, for router logits [..., T, E]; ties as in
    routing."""
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :top_k], True)
    return taken.sum(-2)
