# SPDX-License-Identifier: Apache-2.0
"""What a step, and what a run, of training did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_unified._common import Report, format_table

LOSSES = ("text_loss", "image_loss", "balance_loss", "router_z_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did; losses are those before it.

    Attributes:
        step: its number, from 1.
        loss: the weighted sum that was minimised.
        text_loss: mean cross-entropy of predicted text tokens, in nats; None without any.
        image_loss: mean squared error of noised latent tokens; None without any.
        balance_loss, router_z_loss: means over the passes.
        grad_norm: of the gradient before it was clipped.
        learning_rate: that was used.
        tokens: of the step, all kinds and processes.
        seconds: wall time of the step.
        expert_load: `{(component, layer): tokens of each expert}`.
    """

    step: int
    loss: float
    text_loss: float | None
    image_loss: float | None
    balance_loss: float
    router_z_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    expert_load: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the step per second of wall time."""
        return self.tokens / self.seconds

    @property
    def load_imbalance(self) -> float | None:
        """Load of the busiest expert over the mean load, averaged over layers; None if all dense.

        1 is perfect balance, E / K is all tokens on the same K of E experts.
        """
        ratios = [
            max(load) * len(load) / sum(load) for load in self.expert_load.values() if sum(load)
        ]
        return sum(ratios) / len(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for json.dump, without those that are None."""
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "step",
                "loss",
                *LOSSES,
                "grad_norm",
                "learning_rate",
                "tokens",
                "seconds",
                "tokens_per_second",
                "load_imbalance",
            )
            if getattr(self, name) is not None
        }
        if self.expert_load:
            values["expert_load"] = {
                f"{component}.{layer}": load
                for (component, layer), load in self.expert_load.items()
            }
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport(Report):
    """What a run did.

    Attributes:
        steps: taken in all, those before a resume included.
        trained_parameters, parameters: of the model.
        tokens, seconds: of the steps of this process's run, those before a resume excluded.
        first_loss, last_loss: of the first and the last tenth of these steps, means.
    """

    steps: int
    trained_parameters: int
    parameters: int
    tokens: int
    seconds: float
    first_loss: float | None
    last_loss: float | None

    def to_text(self) -> str:
        rows: list[tuple[str, object]] = [
            ("steps", self.steps),
            ("trained", f"{self.trained_parameters:,} of {self.parameters:,} parameters"),
        ]
        if self.first_loss is not None and self.last_loss is not None:
            rows += [
                ("loss", f"{self.first_loss:.4f} -> {self.last_loss:.4f}"),
                ("tokens", f"{self.tokens:,} ({self.tokens / self.seconds:,.0f} a second)"),
                ("time", f"{self.seconds:.1f} s"),
            ]
        return format_table(rows)
