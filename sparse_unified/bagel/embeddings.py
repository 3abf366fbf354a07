# SPDX-License-Identifier: Apache-2.0
"""Positions and times as vectors: 2-D sine tables, rotary angles, the timestep embedder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MAX_PERIOD = 10000.0


def sincos_table(side: int, channels: int) -> Tensor:
    """Returns the sine-cosine embedding of a square grid, [side * side, channels] fp32.

    The first half of the channels encodes the column, the second the row; each half is sines, then
    cosines, of the coordinate times 10000^(-i / (channels / 4)).

    Raises:
        ValueError: channels is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"sincos_table: channels must be a multiple of 4, got {channels}")
    steps = torch.arange(channels // 4, dtype=torch.float64) / (channels / 4)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), _MAX_PERIOD**-steps)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, channels / 2]
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def grid_positions(
    height: int, width: int, side: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Returns the rows of a table of `side` x `side` positions that an image of `height` x `width`
    patches takes, row by row: [height * width] int64."""
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    return (rows[:, None] * side + columns).flatten()


class PositionTable(nn.Module):
    """A frozen table of grid positions, stored in the checkpoint as `pos_embed`."""

    def __init__(
        self,
        side: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if device is not None and torch.device(device).type == "meta":
            table = torch.empty(side * side, channels, device=device, dtype=dtype)
        else:
            table = sincos_table(side, channels).to(device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Returns the rows of `position_ids` [n] int64: [n, channels]."""
        return self.pos_embed[position_ids]


class TimestepEmbedder(nn.Module):
    """Turns a diffusion time into a hidden vector: 256 cosines and sines, then a two-layer MLP."""

    num_frequencies = 256

    def __init__(
        self,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_frequencies, hidden_size, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
        )

    def forward(self, time: Tensor) -> Tensor:
        """Maps times [n] fp32 to [n, D] in the dtype of the weights."""
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device)
        frequencies = torch.exp(-math.log(_MAX_PERIOD) * exponents / half)
        angles = time[:, None].float() * frequencies  # [n, 128]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns what `rotate` turns heads at `positions` [n] by: cosines and sines, [n, 1, head_dim]
    fp32; the sines of the first half are negated."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**steps)
    angles = torch.cat([-angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions to heads x [n, heads, head_dim]; computes and returns fp32."""
    cos, sin = angles
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
