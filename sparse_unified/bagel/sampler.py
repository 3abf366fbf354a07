# SPDX-License-Identifier: Apache-2.0
"""From noise to a latent: timesteps, guidance, renormalisation and Euler steps.

t runs from 1 (noise) to 0; the model predicts v = d x / d t. On the steps with lo < t <= hi

    v_text  = v_no_text + cfg_text_scale * (v - v_no_text)
    v_image = v_no_image + cfg_img_scale * (v_text - v_no_image)
    v      <- v_image * clamp(|v| / (|v_image| + 1e-8), cfg_renorm_min, 1)

where a scale of 1 leaves its line out. The three predictions of all images are one packed pass.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from sparse_unified.bagel.cache import Context
from sparse_unified.bagel.conditioning import Guidance
from sparse_unified.bagel.model import Bagel

_EPS = 1e-8


class Renorm(str, Enum):
    """Over what the norm is taken that guidance must not exceed."""

    GLOBAL = "global"  # all tokens of one image
    CHANNEL = "channel"  # each token
    TEXT_CHANNEL = "text_channel"  # each token, after the text line and before the image line


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How to sample. Defaults are the official ones for text to image.

    Args:
        num_timesteps: points of the time grid, one more than the steps.
        timestep_shift: s of t <- s t / (1 + (s - 1) t); above 1 spends more steps near the noise.
        cfg_text_scale, cfg_img_scale: strength of guidance; 1 is none. Without text guidance there
            is no image guidance either.
        cfg_interval: guidance is on where lo < t <= hi.
        cfg_renorm_type: see `Renorm`; a string is accepted.
        cfg_renorm_min: least factor of the renormalisation.

    Raises:
        ValueError: a value is out of range or not finite.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = Renorm.GLOBAL
    cfg_renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.num_timesteps, bool) or not isinstance(self.num_timesteps, int):
            raise TypeError(
                f"SamplingConfig: num_timesteps must be an integer, got {self.num_timesteps!r}"
            )
        if self.num_timesteps < 2:
            raise ValueError(
                f"SamplingConfig: num_timesteps must be at least 2, got {self.num_timesteps}"
            )
        object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))
        if len(self.cfg_interval) != 2:
            raise ValueError(
                f"SamplingConfig: cfg_interval must be a pair (lo, hi), got {self.cfg_interval}"
            )
        try:
            object.__setattr__(self, "cfg_renorm_type", Renorm(self.cfg_renorm_type))
        except ValueError:
            legal = ", ".join(f"'{choice.value}'" for choice in Renorm)
            raise ValueError(
                f"SamplingConfig: cfg_renorm_type must be one of {legal}, "
                f"got {self.cfg_renorm_type!r}"
            ) from None
        self._check("timestep_shift", self.timestep_shift, above=0.0)
        self._check("cfg_text_scale", self.cfg_text_scale)
        self._check("cfg_img_scale", self.cfg_img_scale)
        for bound in self.cfg_interval:
            self._check("cfg_interval", bound)
        self._check("cfg_renorm_min", self.cfg_renorm_min)
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(
                f"SamplingConfig: cfg_renorm_min must be from 0 to 1, got {self.cfg_renorm_min}"
            )

    @staticmethod
    def _check(name: str, value: float, *, above: float = -math.inf) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"SamplingConfig: {name} must be a number, got {value!r}")
        if not math.isfinite(value) or value <= above:
            rule = "be finite" if above == -math.inf else f"be finite and above {above:g}"
            raise ValueError(f"SamplingConfig: {name} must {rule}, got {value}")


def timestep_grid(num_timesteps: int, shift: float) -> Tensor:
    """Returns the shifted times from 1 down to 0, [num_timesteps] fp32."""
    times = torch.linspace(1, 0, num_timesteps)
    return shift * times / (1 + (shift - 1) * times)


def initial_noise(num_tokens: int, channels: int, seed: int) -> Tensor:
    """Returns noise [num_tokens, channels] fp32 on the CPU: one seed, one noise, on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, channels, generator=generator)


def _rescaled(guided: Tensor, plain: Tensor, least: float, *, per_token: bool) -> Tensor:
    dims = (-1,) if per_token else (-2, -1)
    norm, reference = (torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (guided, plain))
    return guided * (reference / (norm + _EPS)).clamp(min=least, max=1.0)


def guide(
    plain: Tensor, without_text: Tensor, without_image: Tensor | None, config: SamplingConfig
) -> Tensor:
    """Combines the predictions for one image, each [N, p * p * C] fp32.

    Args:
        without_image: None leaves image guidance out.
    """
    guided = without_text + config.cfg_text_scale * (plain - without_text)
    least = config.cfg_renorm_min
    if config.cfg_renorm_type is Renorm.TEXT_CHANNEL:
        guided = _rescaled(guided, plain, least, per_token=True)
    if without_image is not None:
        guided = without_image + config.cfg_img_scale * (guided - without_image)
    if config.cfg_renorm_type is Renorm.TEXT_CHANNEL:
        return guided
    per_token = config.cfg_renorm_type is Renorm.CHANNEL
    return _rescaled(guided, plain, least, per_token=per_token)


def guided_velocity(
    model: Bagel,
    tokens: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    time: Tensor,
    guidance: Sequence[Guidance],
    config: SamplingConfig,
) -> list[Tensor]:
    """Predicts the guided velocity of every image at `time` [1], [N, p * p * C] fp32 each.

    The time stays on the CPU, so that asking whether guidance is on does not wait for a GPU.
    """
    low, high = config.cfg_interval
    # Compared as fp32, as the source does: a bound that is a time of the grid meets it exactly.
    inside = bool((time > low) & (time <= high))
    if not (inside and config.cfg_text_scale > 1):
        return [v[0] for v in model.velocity(tokens, grids, time, [[g.full] for g in guidance])]
    branches, picks = [], []
    for own in guidance:
        wanted = [own.full, own.without_text]
        if config.cfg_img_scale > 1:
            wanted.append(own.without_image)
        contexts: list[Context] = []
        pick = []
        for context in wanted:
            same = (i for i, other in enumerate(contexts) if context.same_past(other))
            index = next(same, len(contexts))
            if index == len(contexts):
                contexts.append(context)
            pick.append(index)
        branches.append(contexts)
        picks.append(pick)
    predictions = model.velocity(tokens, grids, time, branches)
    guided = []
    for v, pick in zip(predictions, picks, strict=True):
        without_image = v[pick[2]] if len(pick) == 3 else None
        guided.append(guide(v[pick[0]], v[pick[1]], without_image, config))
    return guided


def sample_latents(
    model: Bagel,
    guidance: Sequence[Guidance],
    noise: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    config: SamplingConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> list[Tensor]:
    """Denoises several images together.

    Args:
        guidance: contexts of each image; they are only read.
        noise: [N, p * p * C] of each image; grids: its rows and columns of tokens, N of them.
        config: how to sample.
        on_step: called after each step with its number and its seconds.

    Returns:
        The latent tokens of each image, [N, p * p * C] fp32 on the device of the model.

    Raises:
        ValueError: noise, grids and guidance do not fit together.
    """
    channels = model.config.token_channels
    if not len(guidance) == len(noise) == len(grids):
        raise ValueError(
            "sample_latents: guidance, noise and grids must have one entry per image, "
            f"got {len(guidance)}, {len(noise)} and {len(grids)}"
        )
    for x, (rows, columns) in zip(noise, grids, strict=True):
        if tuple(x.shape) != (rows * columns, channels):
            raise ValueError(
                f"sample_latents: noise must have shape [{rows * columns}, {channels}] for "
                f"{rows} x {columns} tokens, got {list(x.shape)}"
            )
    tokens = [x.to(model.device, torch.float32) for x in noise]
    times = timestep_grid(config.num_timesteps, config.timestep_shift)
    for step in range(config.num_timesteps - 1):
        start = clock.perf_counter()
        time = times[step : step + 1]
        velocity = guided_velocity(model, tokens, grids, time, guidance, config)
        width = (times[step] - times[step + 1]).to(model.device)
        tokens = [x - v * width for x, v in zip(tokens, velocity, strict=True)]
        if on_step is not None:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            on_step(step, clock.perf_counter() - start)
    return tokens
