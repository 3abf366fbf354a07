# SPDX-License-Identifier: Apache-2.0
"""What is trained on what, and how: the configurations of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch

from sparse_unified.checkpoint.modes import BOTH


class Schedule(str, Enum):
    """What the learning rate does after the warm-up."""

    COSINE = "cosine"  # half a cosine, down to `min_learning_rate` at the last step
    CONSTANT = "constant"


class Stage(str, Enum):
    """What is trained."""

    ROUTER = "router"  # the routers of the sparse blocks alone
    EXPERT_FROZEN = "expert_frozen"  # everything but the experts of the sparse blocks
    FULL = "full"  # everything


@dataclass(frozen=True, slots=True)
class _Rule:
    """The type of a number, its range in words, and whether a value is in it."""

    kind: type
    text: str
    holds: Callable[[Any], bool]


_NOT_NEGATIVE = _Rule(float, "at least 0", lambda value: value >= 0)
_POSITIVE = _Rule(float, "above 0", lambda value: value > 0)
_SHARE = _Rule(float, "from 0 to 1", lambda value: 0 <= value <= 1)
_COUNT = _Rule(int, "at least 1", lambda value: value >= 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How to train. Results depend on all of this, and not on the number of processes.

    Args:
        steps: optimizer steps in all.
        batch_size: sequences of a step, over all processes.
        micro_batch_size: sequences of one forward and backward pass, a divisor of `batch_size`
            (None: all of them); gradients are accumulated in float32.
        learning_rate: learning rate after the warm-up.
        min_learning_rate: where the cosine ends.
        schedule: what the learning rate does after the warm-up, a `Schedule`.
        warmup_steps: steps over which the learning rate rises linearly.
        betas: decay rates of AdamW's moments.
        eps: added to the denominator of AdamW.
        weight_decay: of AdamW; vectors (norms, biases) are not decayed.
        max_grad_norm: gradients are clipped to this norm, over all parameters (None: not at all).
        ema_decay: d of the average ema <- d ema + (1 - d) weight (None: no average is kept).
        ce_weight: of the cross-entropy, averaged over the predicted text tokens of a step.
        mse_weight: of the flow-matching error, averaged over the noised latent tokens of a step.
        balance_weight: of the load-balance loss, averaged over the passes.
        z_weight: of the router z-loss, averaged over the passes.
        seed: of the order of the data and of everything that is drawn.
        checkpointing: keep no activations of layers; compute them again for the backward pass.
        optimizer_device: where gradients, float32 master weights, moments and average are kept,
            "cpu" for instance (None: with the model).

    Raises:
        ValueError: a value is out of range. TypeError: it is not a number.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    ce_weight: float = 1.0
    mse_weight: float = 1.0
    balance_weight: float = 0.01
    z_weight: float = 0.0
    seed: int = 0
    checkpointing: bool = False
    optimizer_device: str | None = None

    def __post_init__(self) -> None:
        _check(
            self,
            {
                **dict.fromkeys(("steps", "batch_size", "micro_batch_size"), _COUNT),
                "warmup_steps": _Rule(int, "at least 0", lambda value: value >= 0),
                "seed": _Rule(int, f"from 0 to {2**63 - 1}", lambda value: 0 <= value < 2**63),
                **dict.fromkeys(("learning_rate", "min_learning_rate"), _NOT_NEGATIVE),
                **dict.fromkeys(("ce_weight", "mse_weight"), _NOT_NEGATIVE),
                **dict.fromkeys(("balance_weight", "z_weight", "weight_decay"), _NOT_NEGATIVE),
                **dict.fromkeys(("eps", "max_grad_norm"), _POSITIVE),
                "ema_decay": _SHARE,
            },
        )
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                "TrainingConfig: micro_batch_size must be a divisor of batch_size = "
                f"{self.batch_size}, got {self.micro_batch_size}"
            )
        schedule = choice_of(Schedule, self.schedule, "TrainingConfig: schedule")
        object.__setattr__(self, "schedule", schedule)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"TrainingConfig: betas must be a pair, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        rule = _Rule(float, "from 0 to below 1", lambda value: 0 <= value < 1)
        for beta in self.betas:
            _check_number("TrainingConfig: betas", beta, rule)

    @property
    def passes(self) -> int:
        """Forward and backward passes of one step, over all processes."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule is Schedule.CONSTANT:
            return self.learning_rate
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.min_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for json.dump and for `TrainingConfig(**values)`."""
        return dataclasses.asdict(self) | {
            "schedule": self.schedule.value,
            "betas": list(self.betas),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """How training sequences are drawn. Defaults are those of BAGEL's training.

    Args:
        timestep_shift: s of t <- s t / (1 + (s - 1) t); above 1 trains more near the noise.
        text_dropout: how often the text before an image to generate is left out.
        vit_dropout: how often the ViT view of an image to edit is left out.
        vae_dropout: how often the VAE view of an image to edit is left out.

    Raises:
        ValueError: a value is out of range. TypeError: it is not a number.
    """

    timestep_shift: float = 1.0
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.3

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("text_dropout", "vit_dropout", "vae_dropout"), _SHARE)
        _check(self, {"timestep_shift": _POSITIVE, **shares})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What is trained on what, and what is kept while the run lasts.

    Args:
        stage: what is trained, a `Stage`.
        component: train the weights of one component alone: "gen", "und" or "both".
        sequences: how times, noise and dropout are drawn.
        tasks: which uses of the records are trained, see `ImageDataset` (None: all).
        max_side: longest side of images in pixels (None: what the model takes).
        device: of the model.
        dtype: of computation (None: as in the files); the optimizer works in float32.
        checkpoint_every: steps between saved states, a last one after the last step (None: none).
        keep: how many states are kept.
        resume: go on from the latest state, if there is one.
        tensorboard: write event files too.
        cache_latents: encode every image once and keep its latent beside the states.

    Raises:
        ValueError: a count is below 1. TypeError: it is not an integer.
    """

    stage: Stage = Stage.EXPERT_FROZEN
    component: str = BOTH
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    tasks: tuple[str, ...] | None = None
    max_side: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = False
    tensorboard: bool = False
    cache_latents: bool = False

    def __post_init__(self) -> None:
        _check(self, dict.fromkeys(("checkpoint_every", "keep"), _COUNT))
        object.__setattr__(self, "stage", choice_of(Stage, self.stage, "RunConfig: stage"))


Choice = TypeVar("Choice", bound=Enum)


def choice_of(kind: type[Choice], value: object, where: str) -> Choice:
    """Returns a member of an enum, which may be given by its value.

    Raises:
        ValueError: there is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        legal = ", ".join(repr(one.value) for one in kind)
        raise ValueError(f"{where} must be one of {legal}, got {value!r:.80}") from None


def _check(config: Any, rules: Mapping[str, _Rule]) -> None:
    """Checks the numbers of a config; None is checked where the type of the field excludes it."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if one.name in rules and not (value is None and "None" in str(one.type)):
            _check_number(f"{type(config).__name__}: {one.name}", value, rules[one.name])


def _check_number(where: str, value: Any, rule: _Rule) -> None:
    kinds = (int,) if rule.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        word = "an integer" if rule.kind is int else "a number"
        raise TypeError(f"{where} must be {word}, got {value!r}")
    finite = "finite and " if rule.kind is float else ""
    if not math.isfinite(value) or not rule.holds(value):
        raise ValueError(f"{where} must be {finite}{rule.text}, got {value}")
