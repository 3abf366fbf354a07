# SPDX-License-Identifier: Apache-2.0
"""BAGEL: one decoder that reads text and images, writes text, and denoises images.

Every method works on several sequences at once, in one packed pass. A sequence is known by its
`Context`; the `prefill_*` methods extend contexts in place, the others only read them or, for
text, add the token they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.bagel.attention import pack
from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.config import BagelConfig
from sparse_unified.bagel.decoder import LanguageModel
from sparse_unified.bagel.denoiser import Denoiser, packing_of_images
from sparse_unified.bagel.embeddings import PositionTable, TimestepEmbedder, grid_positions
from sparse_unified.bagel.segments import TrainingBatch
from sparse_unified.bagel.training import TrainingOutput, training_forward
from sparse_unified.bagel.vision import FeedForward, VisionModel, patchify


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
        self.vit_pos_embed = PositionTable(
            config.vit_max_num_patch_per_side, width, device=device, dtype=dtype
        )
        self.latent_pos_embed = PositionTable(
            config.max_latent_size, width, device=device, dtype=dtype
        )
        self.time_embedder = TimestepEmbedder(width, device=device, dtype=dtype)
        self.vae2llm = nn.Linear(config.token_channels, width, device=device, dtype=dtype)
        self.llm2vae = nn.Linear(width, config.token_channels, device=device, dtype=dtype)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of all that is no decoder layer."""
        return self.llm2vae.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are stored as."""
        return self.llm2vae.weight.dtype

    def new_contexts(self, count: int) -> list[Context]:
        """Returns the contexts of `count` sequences that have seen nothing yet."""
        return [Context(self.config.llm.num_hidden_layers) for _ in range(count)]

    def forward(self, batch: TrainingBatch, *, checkpointing: bool = False) -> TrainingOutput:
        """Returns the losses of packed training sequences; see `training_forward`."""
        return training_forward(self, batch, checkpointing=checkpointing)

    @torch.no_grad()
    def prefill_text(self, contexts: Sequence[Context], token_ids: Sequence[Sequence[int]]) -> None:
        """Lets each context read a text, given as ids without bos and eos, which are added.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        special, vocab_size = self.config.special_tokens, self.config.llm.vocab_size
        texts = [[special.bos, *ids, special.eos] for ids in token_ids]
        for token in (token for text in texts for token in text):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prefill_text: token_ids must be from 0 to {vocab_size - 1}, got {token}"
                )
        self._read(contexts, texts)

    @torch.no_grad()
    def next_logits(self, contexts: Sequence[Context], tokens: Sequence[int]) -> Tensor:
        """Appends a token to each context; returns logits [B, vocab_size] fp32 of the next ones."""
        head = _loaded(self.language_model.lm_head, "next_logits: lm_head")
        hidden = self._read(contexts, [[token] for token in tokens])
        logits: Tensor = head(hidden).float()
        return logits

    @torch.no_grad()
    def text_logits(
        self, contexts: Sequence[Context], token_ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Appends a text of its own to each context, bos and eos only where they are given.

        Returns:
            For each text the logits [L, vocab_size] fp32 of what follows each of its L tokens.
        """
        head = _loaded(self.language_model.lm_head, "text_logits: lm_head")
        hidden = self._read(contexts, token_ids)
        logits = head(hidden).float()
        return list(logits.split([len(ids) for ids in token_ids]))

    @torch.no_grad()
    def prefill_vit(self, contexts: Sequence[Context], images: Sequence[Tensor]) -> None:
        """Lets each context see an image through the ViT.

        Args:
            images: normalised pixels [3, H, W] of each context, sides multiples of the patch size.

        Raises:
            ValueError: a side is not a multiple of the patch size, or too long.
        """
        vit_model = _loaded(self.vit_model, "prefill_vit: vit_model")
        side, patch_size = self.config.vit_max_num_patch_per_side, self.config.vision.patch_size
        patches, positions = [], []
        for image in images:
            rows, columns = (length // patch_size for length in image.shape[1:])
            if max(rows, columns) > side:
                raise ValueError(
                    f"prefill_vit: image sides must be at most {side * patch_size} pixels, "
                    f"got {image.shape[1]} x {image.shape[2]}"
                )
            patches.append(patchify(image.to(self.device, self.dtype), patch_size))
            positions.append(grid_positions(rows, columns, side, device=self.device))
        lengths = [len(patch) for patch in patches]
        position_ids = torch.cat(positions)
        seen = vit_model(torch.cat(patches), position_ids, lengths)
        seen = self.connector(seen) + self.vit_pos_embed(position_ids)  # [N, D]

        start, end = self.markers().split(1)
        parts = [torch.cat([start, part, end]) for part in seen.split(lengths)]
        is_marker = torch.cat(
            [torch.tensor([True] + [False] * length + [True]) for length in lengths]
        )
        packing = pack(
            self.config.llm,
            contexts,
            [length + 2 for length in lengths],
            extend=True,
            text_rows=is_marker.nonzero()[:, 0].to(self.device),
            vit_rows=(~is_marker).nonzero()[:, 0].to(self.device),
            device=self.device,
        )
        self.language_model.model(torch.cat(parts), None, packing)
        for context, length in zip(contexts, lengths, strict=True):
            context.advance(length + 2, 1)

    @torch.no_grad()
    def prefill_latents(self, contexts: Sequence[Context], latents: Sequence[Tensor]) -> None:
        """Lets each context see an image through the VAE, as a finished generation (time 0).

        Args:
            latents: latent [C, h, w] of each context, sides multiples of `latent_patch_size`.

        Raises:
            ValueError: a side is not a multiple, or the image is too large.
        """
        patch = self.config.latent_patch_size
        tokens, grids = [], []
        for latent in latents:
            _, height, width = latent.shape
            if max(height, width) > patch * self.config.max_latent_size:
                raise ValueError(
                    "prefill_latents: latent sides must be at most "
                    f"{patch * self.config.max_latent_size}, got {height} x {width}"
                )
            tokens.append(patchify(latent, patch))
            grids.append((height // patch, width // patch))
        time = torch.zeros(1, device=self.device)
        side = self.config.max_latent_size
        gen = [
            self.embed_latent(x, grid_positions(*grid, side, device=self.device), time)
            for x, grid in zip(tokens, grids, strict=True)
        ]
        packing = packing_of_images(self, contexts, [len(part) for part in gen], extend=True)
        markers = self.markers().repeat(len(gen), 1)
        self.language_model.model(markers, torch.cat(gen), packing)
        for context, part in zip(contexts, gen, strict=True):
            context.advance(len(part) + 2, 1)

    @torch.no_grad()
    def velocity(
        self,
        tokens: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        time: Tensor,
        branches: Sequence[Sequence[Context]],
    ) -> list[Tensor]:
        """Predicts d x / d t of several noisy images, each in several contexts, in one packed pass.

        Args:
            tokens: noisy image [N, p * p * C] of each image; grids: its rows and columns of tokens.
            time: [1] fp32, 1 for noise and 0 for a finished image.
            branches: contexts in which to predict each image.

        Returns:
            For each image the velocities [len(branches), N, p * p * C], fp32.
        """
        return Denoiser(self, grids, branches)(tokens, time.to(self.device))

    def _read(self, contexts: Sequence[Context], texts: Sequence[Sequence[int]]) -> Tensor:
        """Runs texts causally behind their contexts; returns the final states of all tokens."""
        lengths = [len(text) for text in texts]
        ids = torch.tensor([token for text in texts for token in text], device=self.device)
        packing = pack(
            self.config.llm, contexts, lengths, causal=True, extend=True, device=self.device
        )
        hidden, _ = self.language_model.model(
            self.language_model.model.embed_tokens(ids), None, packing
        )
        for context, length in zip(contexts, lengths, strict=True):
            context.advance(length, length)
        return hidden

    def markers(self) -> Tensor:
        """Returns the embeddings of start and end of image, [2, D]."""
        special = self.config.special_tokens
        ids = torch.tensor([special.start_of_image, special.end_of_image], device=self.device)
        return self.language_model.model.embed_tokens(ids)

    def embed_latent(self, tokens: Tensor, positions: Tensor, time: Tensor) -> Tensor:
        """Embeds the tokens [N, p * p * C] of one image, with its time [1], to [N, D].

        Args:
            positions: rows [N] of `latent_pos_embed`, see `grid_positions`.
        """
        embedded = self.vae2llm(tokens.to(self.device, self.dtype))
        return embedded + self.time_embedder(time) + self.latent_pos_embed(positions)


def _loaded(module: Any, what: str) -> Any:
    """Returns a module that the task may have left out.

    Raises:
        ValueError: it did.
    """
    if module is None:
        raise ValueError(
            f"{what} must be loaded for this, got a model loaded for another task; "
            "load it with task='all'"
        )
    return module
