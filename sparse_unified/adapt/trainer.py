# SPDX-License-Identifier: Apache-2.0
"""Training of a BAGEL in memory, on one process or sharded over several.

A step is `batch_size` sequences in `passes` forward and backward passes, which the processes share
out. Every loss is normalised by the tokens of the whole step, so neither the division into passes
nor the number of processes changes what is computed, but for the rounding of sums.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.optimizer import Optimizer, num_processes, shard_, this_process
from sparse_unified.adapt.report import StepRecord, TrainingReport
from sparse_unified.adapt.saving import load_state, save_state
from sparse_unified.adapt.sequences import DataOrder, sequence_generator
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import Segment, TrainingBatch, pack_training
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.nn import SparseMoE


class SequenceDataset(Protocol):
    """What can be trained on: a fixed number of training sequences."""

    def __len__(self) -> int: ...

    def sequence(self, index: int, generator: torch.Generator) -> Sequence[Segment]:
        """Returns a sequence, as a function of its index and what the generator draws alone.

        Args:
            index: from 0 to len - 1.
            generator: on the CPU; of times, noise, dropout.
        """
        ...


class TrainingPass(nn.Module):
    """The model and its weighted loss, as one module that can be sharded as a whole."""

    def __init__(self, model: Bagel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(
        self, batch: TrainingBatch, text_tokens: int, image_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[tuple[str, int], Tensor]]:
        """Returns the share of a pass in the loss of its step, its parts, and the expert load.

        Args:
            batch: of the pass; text_tokens, image_tokens: of the whole step.
        """
        config = self._config
        out = training_forward(self.model, batch, checkpointing=config.checkpointing)
        parts = {
            "text_loss": out.text_loss_sum / max(1, text_tokens),
            "image_loss": out.image_loss_sum / max(1, image_tokens),
            "balance_loss": out.balance_loss / config.passes,
            "router_z_loss": out.router_z_loss / config.passes,
        }
        weights = (config.ce_weight, config.mse_weight, config.balance_weight, config.z_weight)
        loss = torch.stack(
            [weight * part for weight, part in zip(weights, parts.values(), strict=True)]
        ).sum()
        return loss, {name: part.detach() for name, part in parts.items()}, out.expert_load


class Trainer:
    """Trains the parameters of a model that have `requires_grad`, and no others.

    Where torch.distributed is initialised with several processes, the model is sharded over them
    with FSDP2; every process has to build the same model and make the same calls.

    Args:
        model: dense, sparse or pruned, in fp32 or bf16.
        dataset: what it is trained on, at least one sequence.
        config: how.
        identity: plain values that a saved state must have in common with a run that goes on.

    Raises:
        ValueError: there is nothing to train or to train on, or the passes of a step do not divide
            over the processes.

    Attributes:
        steps_done: so far.
        optimizer: master weights, moments and average.
        parameters: number of values of the model.
        trained_parameters: number of those that are trained.
    """

    def __init__(
        self,
        model: Bagel,
        dataset: SequenceDataset,
        config: TrainingConfig,
        *,
        identity: Mapping[str, Any] | None = None,
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
        self._identity = dict(identity or {})
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._pass = TrainingPass(model, config)
        layers = model.language_model.model.layers
        if num_processes() > 1:
            shard_(self._pass, layers)
        self.optimizer = Optimizer(model, config)
        self._order = DataOrder(len(dataset), config.seed)
        self._experts = {
            (component, n): ffn.num_experts
            for component, name in FFN_NAMES.items()
            for n, layer in enumerate(layers)
            if isinstance(ffn := getattr(layer, name), SparseMoE)
        }

    def step(self) -> StepRecord:
        """Takes the next step.

        Raises:
            RuntimeError: loss or gradient are not finite; model and state are as before the step.
                Or the updated weights are not; then no state can be saved.
        """
        start = time.perf_counter()
        config, device = self.config, self.model.device
        batches = [batch.to(device) for batch in self._batches()]
        counts = [
            sum(batch.text_tokens for batch in batches),
            sum(batch.image_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
        ]
        if num_processes() > 1:
            counts = _over_processes(torch.tensor(counts, device=device)).tolist()
        text_tokens, image_tokens, tokens = counts
        losses: list[Tensor] = []
        loads: list[dict[tuple[str, int], Tensor]] = []
        with _deterministic(device), self.optimizer.accumulating() as collect_shards:
            for batch in batches:
                own, parts, load = self._pass(batch, text_tokens, image_tokens)
                # Without a graph nothing that trains took part: routers in a pass of text alone.
                if own.requires_grad:
                    own.backward()
                collect_shards()
                losses.append(torch.stack([own.detach(), *parts.values()]))
                loads.append(load)
        found = _over_processes(torch.stack(losses).double().sum(0)).tolist()
        rate = config.learning_rate_at(self.steps_done)
        norm = self._update(found, rate)
        self.steps_done += 1
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
            expert_load=self._read_load(loads, device),
            seconds=time.perf_counter() - start,
        )

    def _update(self, losses: Sequence[float], rate: float) -> float:
        """Updates the weights and returns the gradient's norm; refuses what is not finite."""
        wrong: tuple[str, object] | None = None
        norm = math.nan
        if not all(map(math.isfinite, losses)):
            wrong = "loss", losses[0]
        elif not math.isfinite(norm := self.optimizer.gradient_norm()):
            wrong = "gradient norm", norm
        if wrong is not None:
            self.optimizer.clear()
        else:
            self.optimizer.step(rate, norm)
            if not self.optimizer.are_finite():
                wrong = "weights", "NaN or infinity"
        if wrong is None:
            return norm
        raise RuntimeError(
            f"Trainer: {wrong[0]} must stay finite, got {wrong[1]} at step {self.steps_done + 1}; "
            "go on from the last saved state (--resume) with a lower learning_rate (--lr) or "
            "max_grad_norm (--max-grad-norm)"
        )

    def run(self, on_step: Callable[[StepRecord], object] | None = None) -> TrainingReport:
        """Takes all steps that are left.

        Args:
            on_step: called after each; may save.
        """
        losses, tokens, seconds = [], 0, 0.0
        with _without_old_objects():
            while self.steps_done < self.config.steps:
                record = self.step()
                losses.append(record.loss)
                tokens += record.tokens
                seconds += record.seconds
                if on_step is not None:
                    on_step(record)
        tenth = max(1, len(losses) // 10)
        return TrainingReport(
            steps=self.steps_done,
            trained_parameters=self.trained_parameters,
            parameters=self.parameters,
            tokens=tokens,
            seconds=seconds,
            first_loss=sum(losses[:tenth]) / tenth if losses else None,
            last_loss=sum(losses[-tenth:]) / tenth if losses else None,
        )

    def _read_load(
        self, loads: Sequence[dict[tuple[str, int], Tensor]], device: torch.device
    ) -> dict[tuple[str, int], list[int]]:
        """Returns the tokens of each expert, summed over passes and processes."""
        if not self._experts:
            return {}
        # A pass has none of a component that has no tokens in it.
        none = {
            key: torch.zeros(count, dtype=torch.int64, device=device)
            for key, count in self._experts.items()
            if any(key not in load for load in loads)
        }
        whole = [none | load for load in loads]
        passes = [torch.cat([load[key] for key in self._experts]) for load in whole]
        flat = iter(_over_processes(torch.stack(passes).sum(0)).tolist())
        return {key: list(islice(flat, count)) for key, count in self._experts.items()}

    def ema_weights(self) -> AbstractContextManager[None]:
        """Lets the model compute with the averages of its weights inside a `with` block.

        Raises:
            ValueError: no average is kept.
        """
        return self.optimizer.ema_weights()

    def copy_ema_(self) -> None:
        """Gives the model the averages of its weights for good.

        Raises:
            ValueError: no average is kept.
        """
        self.optimizer.copy_ema_()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what `load` needs to go on exactly from here; see `saving.save_state`."""
        save_state(directory, self.optimizer, self._facts())

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote, on any number of processes.

        The size of steps (learning_rate, min_learning_rate, max_grad_norm) may be another one,
        which is logged.

        Raises:
            ValueError: it is damaged, of another model, other data or another configuration.
        """
        self.steps_done = load_state(directory, self.optimizer, self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "config": self.config.to_dict(),
            "sequences": len(self.dataset),
            **self._identity,
        }

    def _batches(self) -> list[TrainingBatch]:
        """Returns the passes of the next step that are this process's, on the CPU."""
        config, step = self.config, self.steps_done
        size = config.batch_size // config.passes
        batches = []
        for number in range(this_process(), config.passes, num_processes()):
            sequences = [
                self.dataset.sequence(
                    self._order[step * config.batch_size + place],
                    sequence_generator(config.seed, step, place),
                )
                for place in range(number * size, (number + 1) * size)
            ]
            batches.append(pack_training(self.model.config, sequences))
        return batches


def _over_processes(values: Tensor) -> Tensor:
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


@contextmanager
def _without_old_objects() -> Iterator[None]:
    """Spares Python's garbage collector the objects that are there before the block.

    With the imported libraries they are some 400,000; to visit them takes longer than a step of a
    small model.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Chooses deterministic kernels on accelerators, where torch has them; the CPU's all are."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
