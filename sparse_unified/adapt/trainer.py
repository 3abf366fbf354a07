# SPDX-License-Identifier: Apache-2.0
"""Training of a BAGEL in memory, on one process or sharded over several.

A step is `batch_size` sequences in `passes` forward and backward passes, which the processes share
out. Every loss is normalised by the tokens of the whole step, so neither the division into passes
nor the number of processes changes what is computed, but for the rounding of sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparse_unified._common import StrPath
from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.data import ImageDataset, in_order
from sparse_unified.adapt.optimizer import (
    Optimizer,
    num_processes,
    shard_,
    sum_over_processes,
    this_process,
)
from sparse_unified.adapt.saving import load_state, save_state
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import Segment, TrainingBatch, pack_training
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.nn import SparseMoE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did; losses are those before it."""

    step: int  # its number, from 1
    loss: float  # the weighted sum that was minimised
    text_loss: float | None  # mean cross-entropy of predicted text tokens, nats; None without any
    image_loss: float | None  # mean squared error of noised latent tokens; None without any
    balance_loss: float  # mean over the passes
    router_z_loss: float  # mean over the passes
    grad_norm: float  # of the gradient before it was clipped
    learning_rate: float  # that was used
    tokens: int  # of the step, all kinds and processes
    seconds: float  # wall time of the step
    # {(component, layer): tokens of each expert}
    expert_load: dict[tuple[str, int], list[int]]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the step per second of wall time."""
        return self.tokens / self.seconds

    @property
    def load_imbalance(self) -> float | None:
        """Load of the busiest expert over the mean load, averaged over layers; None if all dense.

        1 is perfect balance, E / K is all tokens on the same K of E experts.
        """
        loads = [load for load in self.expert_load.values() if sum(load)]
        ratios = [max(load) * len(load) / sum(load) for load in loads]
        return sum(ratios) / len(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for json.dump, without those that are None."""
        load = {f"{name}.{layer}": own for (name, layer), own in self.expert_load.items()}
        values = asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "load_imbalance": self.load_imbalance,
            "expert_load": load or None,
        }
        return {name: value for name, value in values.items() if value is not None}


class SequenceDataset(Protocol):
    """What can be trained on: a fixed number of training sequences."""

    def __len__(self) -> int: ...

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns a sequence, as a function of its index and what the generator draws alone."""
        ...


class TrainingPass(nn.Module):
    """The model and its weighted loss, as one module that can be sharded as a whole."""

    def __init__(self, model: Bagel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(
        self, batch: TrainingBatch, text_tokens: int, image_tokens: int
    ) -> tuple[Tensor, Tensor, dict[tuple[str, int], Tensor]]:
        """Returns the share of a pass in the loss of its step, that with its parts, expert loads.

        `text_tokens` and `image_tokens` are those of the whole step.
        """
        config = self._config
        out = training_forward(self.model, batch, checkpointing=config.checkpointing)
        parts = (
            out.text_loss_sum / max(1, text_tokens),
            out.image_loss_sum / max(1, image_tokens),
            out.balance_loss / config.passes,
            out.router_z_loss / config.passes,
        )
        weights = (config.ce_weight, config.mse_weight, config.balance_weight, config.z_weight)
        loss = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum()
        return loss, torch.stack([loss, *parts]), out.expert_load


class Trainer:
    """Trains the parameters of a model that have `requires_grad`, and no others.

    Where torch.distributed is initialised with several processes, the model is sharded over them
    with FSDP2; every process has to build the same model and make the same calls.

    Example:
        >>> freeze(model, "expert_frozen")
        >>> trainer = Trainer(model, dataset, TrainingConfig(steps=1000, batch_size=8))
        >>> losses = trainer.run(on_step=lambda record: print(record.step, record.loss))

    Args:
        model: dense, sparse or pruned, in fp32 or bf16.
        dataset: what it is trained on, at least one sequence, see `SequenceDataset`.
        config: how.
        identity: plain values that a saved state must have in common with a run that goes on.
        device: where a model on the meta device gets its memory, once it is sharded.
        fill: of such a model: called then, to read the values of the rows in this process.

    Raises:
        ValueError: there is nothing to train, or the passes of a step do not divide over the
            processes.

    Attributes:
        steps_done: so far.
        optimizer: master weights, moments and average.
    """

    def __init__(
        self,
        model: Bagel,
        dataset: SequenceDataset,
        config: TrainingConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        fill: Callable[[], None] | None = None,
    ) -> None:
        if len(dataset) < 1:
            raise ValueError("Trainer: dataset must hold a sequence, got none")
        if config.passes % num_processes():
            raise ValueError(
                f"Trainer: batch_size / micro_batch_size = {config.passes} must be a multiple of "
                f"the {num_processes()} processes, got {config.batch_size} and "
                f"{config.micro_batch_size}"
            )
        self.model = model
        self.dataset = dataset
        self.config = config
        self.steps_done = 0
        self._sequences: Iterator[Sequence[Segment]] | None = None  # from the next step on
        self._waiting: list[TrainingBatch] = []  # of the next step
        self._identity = dict(identity or {})
        self._pass = TrainingPass(model, config)
        layers, place = model.language_model.model.layers, torch.device(device or model.device)
        if num_processes() > 1:
            shard_(self._pass, layers, place)
        if fill is not None:
            self._pass._apply(
                lambda t: torch.empty_like(t, device=place) if t.is_meta else t.to(place)
            )
            fill()
        self.optimizer = Optimizer(model, config)
        self._experts = [
            ((component, n), ffn.num_experts)
            for component, name in FFN_NAMES.items()
            for n, layer in enumerate(layers)
            if isinstance(ffn := getattr(layer, name), SparseMoE)
        ]

    def step(self) -> StepRecord:
        """Takes the next step.

        Raises:
            RuntimeError: loss or gradient are not finite; model and state are as before the step.
                Or the updated weights are not; then no state can be saved.
        """
        start = time.perf_counter()
        config, device = self.config, self.model.device
        batches = [batch.to(device) for batch in self._batches()]
        own = [(batch.text_tokens, batch.image_tokens, batch.num_tokens) for batch in batches]
        counts = sum_over_processes(torch.tensor(own, device=device).sum(0))
        text_tokens, image_tokens, tokens = counts.tolist()
        losses = []
        loads = {key: torch.zeros(n, dtype=torch.int64, device=device) for key, n in self._experts}
        with _deterministic(device), self.optimizer.accumulating():
            for batch in batches:
                total, parts, load = self._pass(batch, text_tokens, image_tokens)
                # Without a graph nothing that trains took part: routers in a pass of text alone.
                if total.requires_grad:
                    total.backward()
                losses.append(parts.detach())
                for key, tokens_of_experts in load.items():  # none of a component without tokens
                    loads[key] += tokens_of_experts
        found = sum_over_processes(torch.stack(losses).double().sum(0)).tolist()
        rate = config.learning_rate_at(self.steps_done)
        norm = self._update(found[0], rate)
        self.steps_done += 1
        self._waiting = []
        flat = iter(sum_over_processes(torch.cat([*loads.values()])).tolist() if loads else ())
        loss, text_loss, image_loss, balance_loss, router_z_loss = found
        return StepRecord(
            step=self.steps_done,
            loss=loss,
            text_loss=text_loss if text_tokens else None,
            image_loss=image_loss if image_tokens else None,
            balance_loss=balance_loss,
            router_z_loss=router_z_loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            expert_load={key: list(islice(flat, len(load))) for key, load in loads.items()},
            seconds=time.perf_counter() - start,
        )

    def _update(self, loss: float, rate: float) -> float:
        """Updates the weights and returns the gradient's norm; refuses what is not finite."""
        norm = self.optimizer.gradient_norm() if math.isfinite(loss) else math.nan
        if math.isfinite(norm):
            self.optimizer.step(rate, norm)
            if self.optimizer.are_finite():
                return norm
            wrong = "weights must stay finite, got NaN or infinity"
        else:
            self.optimizer.clear()
            name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
            wrong = f"{name} must stay finite, got {value}"
        raise RuntimeError(
            f"Trainer: {wrong} at step {self.steps_done + 1}; go on from the last saved state "
            "(--resume) with a lower learning_rate (--lr) or max_grad_norm (--max-grad-norm)"
        )

    def run(self, on_step: Callable[[StepRecord], object] | None = None) -> list[float]:
        """Takes all steps that are left, calls `on_step` after each, and returns the losses."""
        losses = []
        while self.steps_done < self.config.steps:
            record = self.step()
            losses.append(record.loss)
            if on_step is not None:
                on_step(record)
        return losses

    def save(self, directory: StrPath) -> None:
        """Writes what `load` needs to go on exactly from here; see `saving.save_state`."""
        facts = self._facts()
        if isinstance(self.dataset, ImageDataset):
            facts["place"] = self.dataset.place(self.steps_done * self.config.batch_size)
        save_state(directory, self.optimizer, facts)

    def load(self, directory: StrPath) -> None:
        """Goes on from what `save` wrote, on any number of processes.

        The size of steps (learning_rate, min_learning_rate, max_grad_norm) may be another one,
        which is logged.

        Raises:
            ValueError: it is damaged, of another model, other data or another configuration.
        """
        found = load_state(directory, self.optimizer, self._facts())
        self.steps_done = found["step"]
        if isinstance(self.dataset, ImageDataset):
            self.dataset.go_on(found.get("place"))
        self._sequences, self._waiting = None, []

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "config": asdict(self.config),
            "sequences": len(self.dataset),
            **self._identity,
        }

    def _batches(self) -> list[TrainingBatch]:
        """Returns the passes of the next step that are this process's, on the CPU."""
        config = self.config
        size = config.batch_size // config.passes
        own = range(this_process(), config.passes, num_processes())
        if self._sequences is None:
            places = [place for n in own for place in range(n * size, (n + 1) * size)]
            order: Any = partial(in_order, self.dataset)
            if isinstance(self.dataset, ImageDataset):
                order = self.dataset.in_order
            self._sequences = order(config.seed, config.batch_size, places, self.steps_done)
        # A step that fails can be taken again.
        while len(self._waiting) < len(own):
            sequences = list(islice(self._sequences, size))
            self._waiting.append(pack_training(self.model.config, sequences))
        return self._waiting


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Chooses deterministic kernels on accelerators, where torch has them; the CPU's all are."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
