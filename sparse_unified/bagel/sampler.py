# SPDX-License-Identifier: Apache-2.0
"""From a prompt to a latent: classifier-free guidance, timesteps, Euler steps, step cache.

t runs from 1 (noise) to 0; the model predicts v = d x / d t. On the steps with lo < t <= hi the
predictions of the unconditional branches (without the prompt, without the images) guide it:

    v_text  = v_no_text + cfg_text_scale * (v - v_no_text)
    v_image = v_no_image + cfg_img_scale * (v_text - v_no_image)
    v      <- v_image * clamp(|v| / (|v_image| + 1e-8), cfg_renorm_min, 1)

where a scale of 1 leaves its line out. The three predictions of all images are one packed pass, or
extrapolated from those of earlier steps:

    v(t) = c_0 + c_1 (t - t_0) + c_2 (t - t_0) (t - t_1) + ...

is the polynomial of degree K in Newton's form through the velocities of the last K + 1 computed
steps, at times t_0 (the newest) to t_K; c_k is their k-th divided difference, an approximation of
the k-th derivative over k!. Only what leaves the model is expanded, nothing of a layer: the last
projection is linear, so this is the expansion of the last hidden states, at p * p * C numbers a
token instead of D. Source: TaylorSeer (arXiv 2503.06923), which divides all differences by the
distance of the last two computed steps; divided by the distance of their own steps they are exact
for polynomials of degree K, on any grid of times.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import check_int, check_number, choice, context, require
from sparse_unified.bagel.attention import KVCache
from sparse_unified.bagel.execution import Execution
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.model import Bagel, Denoiser
from sparse_unified.nn.sparse_moe import active_experts, blocks_for

_EPS = 1e-8
_MAX_ORDER = 3
_MAX_TIMESTEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The KV caches of one image: of all it is generated from, and of the unconditional branches.

    Attributes:
        full: images and prompt.
        without_text: images alone.
        without_image: prompt alone.
    """

    full: KVCache
    without_text: KVCache
    without_image: KVCache


def see_images(
    model: Bagel, contexts: Sequence[KVCache], images: Sequence[Sequence[ContextImage]]
) -> None:
    """Lets each context see its images, in order; contexts may have different numbers of them."""
    for turn in zip_longest(*images):  # the first image of each context, then the second
        for name, read in (("latent", model.prefill_latents), ("vit_pixels", model.prefill_vit)):
            pairs = zip(contexts, (getattr(image, name, None) for image in turn), strict=True)
            if seen := [pair for pair in pairs if pair[1] is not None]:
                read(*zip(*seen, strict=True))


def build_guidance(
    model: Bagel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[ContextImage]] | None = None,
    system_ids: Sequence[int] | None = None,
) -> list[Guidance]:
    """Reads prompts, with the images before them, into the KV caches that guidance needs.

    Args:
        prompt_ids: of each prompt, without bos and eos.
        images: before each prompt; None for none.
        system_ids: of a text before everything, kept in all three.
    """
    count = len(prompt_ids)
    full = model.new_contexts(count)
    if system_ids is not None:
        model.prefill_text(full, [system_ids] * count)
    without_image = [past.fork() for past in full]
    seen = images if images is not None else [()] * count
    see_images(model, full, seen)
    without_text = [past.fork() for past in full]
    model.prefill_text(full, prompt_ids)
    if edited := [i for i in range(count) if seen[i]]:
        model.prefill_text([without_image[i] for i in edited], [prompt_ids[i] for i in edited])
    # Without images a fork, so that it is recognised as the same and not computed twice.
    caches = [
        (past, b, c if own else past.fork())
        for past, b, c, own in zip(full, without_text, without_image, seen, strict=True)
    ]
    return [Guidance(full=a, without_text=b, without_image=c) for a, b, c in caches]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """Which steps are computed, and how the others are extrapolated from them.

    Between images nothing is kept. During one, every branch of guidance holds
    (order + 1) * N * p * p * C numbers in fp32, 3 MiB for 1024 x 1024 pixels and order 2.

    Args:
        interval: after the first steps, every interval-th is computed; 1 computes all.
        order: degree of the extrapolation, 0 to 3, as far as steps were computed; 0 repeats the
            last velocity.
        first: steps at the beginning that are computed in any case.
        last: steps at the end likewise.
    """

    interval: int = 3
    order: int = 2
    first: int = 3
    last: int = 1

    @context("StepCache")
    def __post_init__(self) -> None:
        check_int("interval", self.interval, 1)
        check_int("order", self.order, 0, _MAX_ORDER)
        check_int("first", self.first, 1)
        check_int("last", self.last, 0)


class Expansion:
    """Velocities of one branch of one image as a polynomial of the time, of degree `order` as far
    as there are velocities."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.times: list[float] = []  # of the last computed steps, the newest first
        self.differences: list[Tensor] = []  # c_0 to c_K

    def add(self, time: float, velocity: Tensor) -> None:
        """Takes up a computed velocity at a new time."""
        differences = [velocity]
        for then, older in zip(self.times[: self.order], self.differences, strict=False):
            differences.append((differences[-1] - older) / (time - then))
        self.times = [time, *self.times[: self.order]]
        self.differences = differences

    def at(self, time: float) -> Tensor:
        """Returns the velocity at another time."""
        *rest, value = self.differences
        for then, difference in reversed(list(zip(self.times, rest, strict=False))):
            value = difference + (time - then) * value
        return value


class Renorm(str, Enum):
    """Over what the norm is taken that guidance must not exceed."""

    GLOBAL = "global"  # all tokens of one image
    CHANNEL = "channel"  # each token
    TEXT_CHANNEL = "text_channel"  # each token, after the text line and before the image line


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How to sample. Defaults are the official ones for text to image.

    Args:
        num_timesteps: points of the time grid, one more than the steps; 2 to 100,000.
        timestep_shift: s of t <- s t / (1 + (s - 1) t); above 1 spends more steps near the noise.
        cfg_text_scale: strength of text guidance; 1 is none, of the images neither.
        cfg_img_scale: strength of image guidance; 1 is none.
        cfg_interval: guidance is on where lo < t <= hi.
        cfg_renorm_type: see `Renorm`; a string is accepted.
        cfg_renorm_min: least factor of the renormalisation.
        cache: which steps are extrapolated; None computes all.
        top_k: routed experts of a token in every sparse FFN: a number, or pairs (t, K) with t from
            1 down, K experts from time t on. Prompts are read with those of time 1. None, and
            before the first t: as many as the model has.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = Renorm.GLOBAL
    cfg_renorm_min: float = 0.0
    cache: StepCache | None = None
    top_k: int | tuple[tuple[float, int], ...] | None = None

    @context("SamplingConfig")
    def __post_init__(self) -> None:
        check_int("num_timesteps", self.num_timesteps, 2, _MAX_TIMESTEPS)
        for name in ("timestep_shift", "cfg_text_scale", "cfg_img_scale"):
            check_number(name, getattr(self, name))
        require(self.timestep_shift > 0, "timestep_shift must be above 0", self.timestep_shift)
        interval = tuple(self.cfg_interval)
        object.__setattr__(self, "cfg_interval", interval)
        require(len(interval) == 2, "cfg_interval must be a pair (lo, hi)", interval)
        for bound in interval:
            check_number("cfg_interval", bound)
        renorm = choice("cfg_renorm_type", Renorm, self.cfg_renorm_type)
        object.__setattr__(self, "cfg_renorm_type", renorm)
        check_number("cfg_renorm_min", self.cfg_renorm_min, 0, 1)
        if self.cache is not None and not isinstance(self.cache, StepCache):
            raise TypeError(f"cache must be a StepCache or None, got {self.cache!r}")
        if self.top_k is None:
            return
        is_one = not isinstance(self.top_k, (list, tuple))
        pairs: Any = ((1.0, self.top_k),) if is_one else self.top_k
        for pair in pairs:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                rule = "must be an integer or pairs (t, K)"
                raise TypeError(f"top_k {rule}, got {self.top_k!r:.120}")
            check_number("t of top_k", pair[0], 0, 1)
            check_int("top_k", pair[1], 1)
        descends = pairs and all(a[0] > b[0] for a, b in pairwise(pairs))
        require(descends, "t of top_k must descend", f"{self.top_k!r:.120}")
        object.__setattr__(self, "top_k", tuple((t, k) for t, k in pairs))

    def top_k_at(self, time: float) -> int | None:
        """Returns the experts of a token at a time of denoising, an fp32; None is the model's."""
        pairs: Any = self.top_k or ()
        begun = [top_k for t, top_k in pairs if np.float32(t) >= np.float32(time)]
        return begun[-1] if begun else None


def timestep_grid(num_timesteps: int, shift: float) -> Tensor:
    """Returns the shifted times from 1 down to 0, [num_timesteps] fp32."""
    times = torch.linspace(1, 0, num_timesteps)
    return shift * times / (1 + (shift - 1) * times)


def initial_noise(num_tokens: int, channels: int, seed: int) -> Tensor:
    """Returns noise [num_tokens, channels] fp32 on the CPU: one seed, one noise, on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, channels, generator=generator)


def guide(
    plain: Tensor,
    without_text: Tensor,
    without_image: Tensor | None = None,
    *,
    config: SamplingConfig,
) -> Tensor:
    """Combines the predictions for one image, each [N, p * p * C] fp32; without_image None leaves
    image guidance out."""

    def rescaled(guided: Tensor, *dims: int) -> Tensor:
        norm, most = (torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (guided, plain))
        return guided * (most / (norm + _EPS)).clamp(min=config.cfg_renorm_min, max=1.0)

    renorm = config.cfg_renorm_type
    guided = without_text + config.cfg_text_scale * (plain - without_text)
    if renorm is Renorm.TEXT_CHANNEL:
        guided = rescaled(guided, -1)
    if without_image is not None:
        guided = without_image + config.cfg_img_scale * (guided - without_image)
    if renorm is Renorm.TEXT_CHANNEL:
        return guided
    return rescaled(guided, -1) if renorm is Renorm.CHANNEL else rescaled(guided, -2, -1)


class Step(NamedTuple):
    """A step of denoising, from its time on."""

    time: float
    guided: bool
    computed: bool  # the model runs; otherwise its velocity is extrapolated
    top_k: int | None  # as `SamplingConfig.top_k_at`


def denoising_steps(config: SamplingConfig) -> list[Step]:
    """Returns the steps of denoising.

    The model runs where the cache says so, and where guidance sets in, whose branches have no past,
    or where the number of experts changes, and with it the function that is extrapolated.
    """
    low, high = config.cfg_interval
    times = timestep_grid(config.num_timesteps, config.timestep_shift)[:-1]
    # Compared as fp32, as the source does: a bound that is a time of the grid meets it exactly.
    guided = (times > low) & (times <= high) & (config.cfg_text_scale > 1)
    cache, steps = config.cache, list[Step]()
    for n, (time, on) in enumerate(zip(times.tolist(), guided.tolist(), strict=True)):
        top_k = config.top_k_at(time) if config.top_k else None
        computed = (
            cache is None
            or n < cache.first
            or n >= len(times) - cache.last
            or (n - cache.first + 1) % cache.interval == 0
            or (on and not steps[-1].guided)
            or top_k != steps[-1].top_k
        )
        steps.append(Step(time, on, computed, top_k))
    return steps


def _branches(
    guidance: Guidance, config: SamplingConfig, guided: bool
) -> tuple[list[KVCache], list[int]]:
    """Returns the different contexts of an image, `full` first, and where in them are `full`, then
    with guidance without_text and, if it counts, without_image."""
    wanted = [guidance.full]
    if guided:
        wanted += [guidance.without_text, guidance.without_image][: 1 + (config.cfg_img_scale > 1)]
    contexts: list[KVCache] = []
    picks = []
    for past in wanted:
        same = (i for i, other in enumerate(contexts) if past.same_past(other))
        picks.append(next(same, len(contexts)))
        contexts += [past] * (picks[-1] == len(contexts))
    return contexts, picks


@context("sample_latents")
@torch.no_grad()
def sample_latents(
    model: Bagel,
    guidance: Sequence[Guidance],
    noise: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    config: SamplingConfig,
    *,
    execution: Execution | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_latents: Callable[[list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Denoises several images together.

    Args:
        guidance: contexts of each image; they are only read.
        noise: [N, p * p * C] of each image.
        grids: its rows and columns of tokens, N of them.
        config: how to sample.
        execution: how the model is run in each step; None op by op.
        on_step: called after each step with its number and its seconds.
        on_latents: called after that with the tokens expected at the end, x - t v, of each image.

    Returns:
        The latent tokens of each image, [N, p * p * C] fp32 on the device of the model.
    """
    counts = len(guidance), len(noise), len(grids)
    rule = "guidance, noise and grids must have one entry per image"
    require(len(set(counts)) == 1, rule, "{}, {} and {}".format(*counts))
    for x, (rows, columns) in zip(noise, grids, strict=True):
        shape = [rows * columns, model.config.token_channels]
        rule = f"noise must have shape {shape} for {rows} x {columns} tokens"
        require(list(x.shape) == shape, rule, list(x.shape))
    tokens = [x.to(model.device, torch.float32) for x in noise]
    times = timestep_grid(config.num_timesteps, config.timestep_shift)
    on_device, widths = times.to(model.device), (times[:-1] - times[1:]).to(model.device)
    steps = denoising_steps(config)
    pairs: Any = config.top_k or ()
    for _, experts in pairs:
        blocks_for(model, experts)
    branches = [[_branches(own, config, on) for own in guidance] for on in (False, True)]
    execution = execution or Execution()
    execution.check(model.device, model)
    run: dict[tuple[bool, int | None], Any] = {}  # a graph keeps the experts it was recorded with
    cache = None if all(own.computed for own in steps) else config.cache
    expansions: list[list[Expansion]] = [[] for _ in noise]
    # Of each image the velocities [N, p * p * C] in its branches, stacked or not.
    predictions: Sequence[Tensor | Sequence[Tensor]]
    for step, (time, on, computed, top_k) in enumerate(steps):
        start = clock.perf_counter()
        if step and top_k != steps[step - 1].top_k:
            expansions = [[] for _ in noise]
        if computed:
            if (on, top_k) not in run:
                contexts = [own for own, _ in branches[on]]
                run[on, top_k] = execution.start(Denoiser(model, grids, contexts))
            using = nullcontext() if top_k is None else active_experts(model, top_k)
            # Without the records of autograd; but accelerate makes parameters in each call.
            with using, torch.inference_mode(not hasattr(model, "hf_device_map")):
                predictions = run[on, top_k](tokens, on_device[step : step + 1])
        else:
            predictions = [[expansion.at(time) for expansion in own] for own in expansions]
        expected = []
        for i, (v, (_, (full, *others))) in enumerate(zip(predictions, branches[on], strict=True)):
            if computed and cache is not None:
                own = expansions[i]
                del own[len(v) :]  # branches that guidance left behind
                own += [Expansion(cache.order) for _ in range(len(v) - len(own))]
                for expansion, branch in zip(own, v, strict=True):
                    expansion.add(time, branch)
            velocity = guide(v[full], *(v[k] for k in others), config=config) if others else v[full]
            tokens[i] = tokens[i] - velocity * widths[step]
            if on_latents is not None:
                expected.append(tokens[i] - velocity * times[step + 1])
        if on_step is not None:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            on_step(step, clock.perf_counter() - start)
        if on_latents is not None:
            on_latents(expected)
    return tokens
