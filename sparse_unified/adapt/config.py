# SPDX-License-Identifier: Apache-2.0
"""How to train: batches, optimizer, schedule, weights of the losses."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Schedule(str, Enum):
    """What the learning rate does after the warm-up."""

    COSINE = "cosine"  # half a cosine, down to `min_learning_rate` at the last step
    CONSTANT = "constant"


_NOT_BELOW_ZERO = (
    "learning_rate",
    "min_learning_rate",
    "weight_decay",
    "ce_weight",
    "mse_weight",
    "balance_weight",
    "z_weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How to train. Results depend on all of this, and not on the number of processes.

    Args:
        steps: optimizer steps in all.
        batch_size: sequences of one step, over all processes.
        micro_batch_size: sequences of one forward and backward pass, a divisor of `batch_size`;
            None is all of a step in one pass. Gradients of the passes of a step are summed in fp32.
        learning_rate: after the warm-up; min_learning_rate: where the cosine ends.
        schedule: a `Schedule`; its name is accepted.
        warmup_steps: over which the learning rate rises linearly, from 1 / warmup_steps of it.
        betas, eps, weight_decay: of AdamW. Vectors (norms, biases) are not decayed.
        max_grad_norm: gradients are scaled down to this norm, over all parameters; None does not.
        ema_decay: d of ema <- d ema + (1 - d) weight after each step; None keeps no average.
        ce_weight: of the cross-entropy, averaged over the predicted text tokens of a step.
        mse_weight: of the flow-matching error, averaged over the noised latent tokens of a step.
        balance_weight, z_weight: of the load-balance and router z-loss, averaged over the passes.
        seed: of the order of the data and of all that sequences draw.
        checkpointing: trade time for memory: layers keep no activations for backward.
        optimizer_device: where gradients, fp32 masters, moments and average are kept, as in "cpu";
            None is the device of the model.

    Raises:
        ValueError: a value is out of range. TypeError: it is no number.
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
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0)):
            self._integer(name, getattr(self, name), least)
        if self.micro_batch_size is not None:
            self._integer("micro_batch_size", self.micro_batch_size, 1)
            if self.batch_size % self.micro_batch_size:
                raise ValueError(
                    "TrainingConfig: micro_batch_size must be a divisor of batch_size = "
                    f"{self.batch_size}, got {self.micro_batch_size}"
                )
        if self.seed >= 2**63:
            raise ValueError(f"TrainingConfig: seed must be at most {2**63 - 1}, got {self.seed}")
        for name in _NOT_BELOW_ZERO:
            self._number(name, getattr(self, name), "at least 0", lambda value: value >= 0)
        self._number("eps", self.eps, "above 0", lambda value: value > 0)
        try:
            object.__setattr__(self, "betas", tuple(self.betas))
            object.__setattr__(self, "schedule", Schedule(self.schedule))
        except (TypeError, ValueError):
            legal = ", ".join(repr(choice.value) for choice in Schedule)
            raise ValueError(
                f"TrainingConfig: betas must be a pair and schedule one of {legal}, "
                f"got {self.betas!r} and {self.schedule!r}"
            ) from None
        if len(self.betas) != 2:
            raise ValueError(f"TrainingConfig: betas must be a pair, got {self.betas}")
        for beta in self.betas:
            self._number("betas", beta, "from 0 to below 1", lambda value: 0 <= value < 1)
        if self.ema_decay is not None:
            self._number("ema_decay", self.ema_decay, "from 0 to 1", lambda value: 0 <= value <= 1)
        if self.max_grad_norm is not None:
            self._number("max_grad_norm", self.max_grad_norm, "above 0", lambda value: value > 0)

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

    @staticmethod
    def _integer(name: str, value: object, least: int) -> None:
        if type(value) is not int:
            raise TypeError(f"TrainingConfig: {name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"TrainingConfig: {name} must be at least {least}, got {value}")

    @staticmethod
    def _number(name: str, value: Any, rule: str, holds: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"TrainingConfig: {name} must be a number, got {value!r}")
        if not math.isfinite(value) or not holds(value):
            raise ValueError(f"TrainingConfig: {name} must be finite and {rule}, got {value}")
