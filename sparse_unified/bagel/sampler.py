# SPDX-License-Identifier: Apache-2.0
"""From noise to a latent: timesteps, guidance, renormalisation and Euler steps.

t runs from 1 (noise) to 0; the model predicts v = d x / d t. On the steps with lo < t <= hi

    v_text  = v_no_text + cfg_text_scale * (v - v_no_text)
    v_image = v_no_image + cfg_img_scale * (v_text - v_no_image)
    v      <- v_image * clamp(|v| / (|v_image| + 1e-8), cfg_renorm_min, 1)

where a scale of 1 leaves its line out. The three predictions of all images are one packed pass, or
extrapolated from those of earlier steps, see `step_cache`.
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
from sparse_unified.bagel.denoiser import Denoiser
from sparse_unified.bagel.execution import Execution, Step
from sparse_unified.bagel.model import Bagel
from sparse_unified.bagel.step_cache import Expansion, StepCache

_EPS = 1e-8
# Of each image the velocities [N, p * p * C] in its contexts, stacked or not.
Predictions = Sequence[Tensor | Sequence[Tensor]]


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
        cache: which steps are extrapolated; None computes all.

    Raises:
        ValueError: a value is out of range or not finite. TypeError: it is of another type.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = Renorm.GLOBAL
    cfg_renorm_min: float = 0.0
    cache: StepCache | None = None

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
        if self.cache is not None and not isinstance(self.cache, StepCache):
            raise TypeError(
                f"SamplingConfig: cache must be a StepCache or None, got {self.cache!r}"
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


def guided_steps(config: SamplingConfig) -> list[bool]:
    """Returns for each step whether guidance is on."""
    low, high = config.cfg_interval
    times = timestep_grid(config.num_timesteps, config.timestep_shift)[:-1]
    # Compared as fp32, as the source does: a bound that is a time of the grid meets it exactly.
    inside = (times > low) & (times <= high) & (config.cfg_text_scale > 1)
    return [bool(on) for on in inside]


def computed_steps(config: SamplingConfig) -> list[bool]:
    """Returns for each step whether the model runs; otherwise its velocity is extrapolated.

    It runs where the cache says so, and where guidance sets in, whose branches have no past.
    """
    guided = guided_steps(config)
    if config.cache is None:
        return [True] * len(guided)
    return [
        config.cache.computes(step, len(guided)) or (on and not guided[step - 1])
        for step, on in enumerate(guided)
    ]


class _Branches:
    """The different contexts of each image with guidance on, or off.

    Attributes:
        contexts: of each image, `full` first; equal ones once.
        picks: of each image where in them are full, without_text and, if it counts, without_image.
    """

    def __init__(
        self, guidance: Sequence[Guidance], config: SamplingConfig, *, guided: bool
    ) -> None:
        self.contexts: list[list[Context]] = []
        self.picks: list[list[int]] = []
        for own in guidance:
            wanted = [own.full]
            if guided:
                wanted.append(own.without_text)
            if guided and config.cfg_img_scale > 1:
                wanted.append(own.without_image)
            contexts: list[Context] = []
            pick = []
            for context in wanted:
                same = (i for i, other in enumerate(contexts) if context.same_past(other))
                index = next(same, len(contexts))
                if index == len(contexts):
                    contexts.append(context)
                pick.append(index)
            self.contexts.append(contexts)
            self.picks.append(pick)

    def combine(self, predictions: Predictions, config: SamplingConfig) -> list[Tensor]:
        """Returns the velocity [N, p * p * C] of each image from those in its contexts."""
        combined = []
        for v, (full, *others) in zip(predictions, self.picks, strict=True):
            if not others:
                combined.append(v[full])
                continue
            without_image = v[others[1]] if len(others) == 2 else None
            combined.append(guide(v[full], v[others[0]], without_image, config))
        return combined


def sample_latents(
    model: Bagel,
    guidance: Sequence[Guidance],
    noise: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    config: SamplingConfig,
    *,
    execution: Execution | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[Tensor]:
    """Denoises several images together.

    Args:
        guidance: contexts of each image; they are only read.
        noise: [N, p * p * C] of each image; grids: its rows and columns of tokens, N of them.
        config: how to sample.
        execution: how the model is run in each step; None op by op.
        on_step: called after each step with its number and its seconds.

    Returns:
        The latent tokens of each image, [N, p * p * C] fp32 on the device of the model.

    Raises:
        ValueError: noise, grids and guidance do not fit together, or the model cannot be run so.
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
    on_device, widths = times.to(model.device), (times[:-1] - times[1:]).to(model.device)
    guided, computed = guided_steps(config), computed_steps(config)
    branches = {on: _Branches(guidance, config, guided=on) for on in set(guided)}
    execution = execution or Execution()
    execution.check(model)
    run: dict[bool, Step] = {}
    order = None if config.cache is None or all(computed) else config.cache.order
    expansions: list[list[Expansion]] = [[] for _ in noise]
    for step, (on, runs) in enumerate(zip(guided, computed, strict=True)):
        start = clock.perf_counter()
        time = float(times[step])
        predictions: Predictions
        if runs:
            if on not in run:
                run[on] = execution.start(Denoiser(model, grids, branches[on].contexts))
            predictions = run[on](tokens, on_device[step : step + 1])
            if order is not None:
                _keep(expansions, predictions, time, order)
        else:
            predictions = [[expansion.at(time) for expansion in own] for own in expansions]
        velocity = branches[on].combine(predictions, config)
        tokens = [x - v * widths[step] for x, v in zip(tokens, velocity, strict=True)]
        if on_step is not None:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            on_step(step, clock.perf_counter() - start)
    return tokens


def _keep(
    expansions: list[list[Expansion]],
    predictions: Predictions,
    time: float,
    order: int,
) -> None:
    """Takes up what was computed, branch by branch; forgets branches that guidance left behind."""
    for own, velocities in zip(expansions, predictions, strict=True):
        del own[len(velocities) :]
        own += [Expansion(order) for _ in range(len(velocities) - len(own))]
        for expansion, velocity in zip(own, velocities, strict=True):
            expansion.add(time, velocity)
