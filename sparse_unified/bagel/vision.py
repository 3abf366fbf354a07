# SPDX-License-Identifier: Apache-2.0
"""Images as the model sees them: a SigLIP encoder over packed patches, and the connector.

Images of any size go in together, packed one after the other, each attending to itself only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_unified._common import require
from sparse_unified.bagel.config import VisionConfig


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cuts an image [C, H, W] into patches [H/p * W/p, p * p * C], each laid out p, p, C."""
    _, height, width = image.shape
    fits = height and width and not (height % patch_size or width % patch_size)
    rule = f"patchify: image sides must be positive multiples of {patch_size}"
    require(fits, rule, f"{height} x {width}")
    grid = image.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # [C, h, p, w, p]
    return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Undoes `patchify`: tokens [rows * columns, p * p * C] -> [C, rows * p, columns * p]."""
    grid = tokens.view(rows, columns, patch_size, patch_size, -1)  # [h, w, p, p, C]
    return grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


def grid_positions(
    height: int, width: int, side: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Returns the rows of a table of `side` x `side` positions that an image of `height` x `width`
    patches takes, row by row: [height * width] int64."""
    rows, columns = (torch.arange(count, device=device) for count in (height, width))
    return (rows[:, None] * side + columns).flatten()


class VisionAttention(nn.Module):
    """Full attention inside each image."""

    def __init__(self, config: VisionConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.register_module(name, nn.Linear(width, width, **factory))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps packed patches x [N, D] of images with `lengths` patches to [N, D]."""
        part: Any = self._modules
        heads = [
            part[name](x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        ]  # 3 x [heads, N, d]
        if len(set(lengths)) == 1:
            q, k, v = (own.unflatten(1, (len(lengths), -1)).transpose(0, 1) for own in heads)
            mixed = F.scaled_dot_product_attention(q, k, v)  # [images, heads, n, d]
            return part["out_proj"](mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        images = zip(*(own.split(list(lengths), dim=1) for own in heads), strict=True)
        each = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in images]
        return part["out_proj"](torch.cat(each, dim=1).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    """Two linear maps with a tanh GELU between them: the encoder's FFN, and the connector."""

    def __init__(self, inputs: int, hidden: int, outputs: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, **factory)
        self.fc2 = nn.Linear(hidden, outputs, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs] to [N, outputs]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: VisionConfig, **factory: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps, **factory)
        self.self_attn = VisionAttention(config, **factory)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps, **factory)
        self.mlp = FeedForward(width, config.intermediate_size, width, **factory)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Maps packed patches [N, D] to [N, D]."""
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """A linear map of each patch, plus a learned vector of its position."""

    def __init__(self, config: VisionConfig, **factory: Any) -> None:
        super().__init__()
        width, positions = config.hidden_size, (config.image_size // config.patch_size) ** 2
        patch_width = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_width, width, **factory)
        self.position_embedding = nn.Embedding(positions, width, **factory)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """Maps patches [N, p * p * C] at position_ids [N] to [N, D]."""
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class VisionModel(nn.Module):
    """The transformer, under its official names."""

    def __init__(self, config: VisionConfig, **factory: Any) -> None:
        super().__init__()
        layers = [VisionLayer(config, **factory) for _ in range(config.num_hidden_layers)]
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": VisionEmbeddings(config, **factory),
                "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
                "post_layernorm": nn.LayerNorm(
                    config.hidden_size, eps=config.layer_norm_eps, **factory
                ),
            }
        )

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encodes packed images, patches [N, p * p * C] at position_ids [N], to features [N, D]."""
        parts: Any = self.vision_model
        x = parts.embeddings(patches, position_ids)
        for layer in parts.encoder.layers:
            x = layer(x, lengths)
        return parts.post_layernorm(x)
