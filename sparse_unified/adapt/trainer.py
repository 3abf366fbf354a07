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
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified.adapt import state
from sparse_unified.adapt.ahead import can_help, prepared_ahead
from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.draws import DataOrder, sequence_generators
from sparse_unified.adapt.masters import Masters
from sparse_unified.adapt.reports import LOSSES, StepRecord, TrainingReport
from sparse_unified.adapt.sharding import num_processes, shard_, this_process
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import Segment, TrainingBatch, pack_training
from sparse_unified.nn import SparseMoE

_FFNS = {"und": "mlp", "gen": "mlp_moe_gen"}


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
        ahead: while a step of `run` computes, let another process prepare the next, if processes
            can be forked and torch's threads leave a core idle; the dataset may touch no
            accelerator. Nothing that is computed changes.

    Raises:
        ValueError: there is nothing to train or to train on, or the passes of a step do not divide
            over the processes.
    """

    def __init__(
        self,
        model: Bagel,
        dataset: SequenceDataset,
        config: TrainingConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        ahead: bool = False,
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
        self._ahead = ahead
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._pass = TrainingPass(model, config)
        if num_processes() > 1:
            shard_(self._pass, model.language_model.model.layers)
        self.masters = Masters(model, config)
        self._order = DataOrder(len(dataset), config.seed)
        self._experts = {
            (component, n): ffn.num_experts
            for component, name in _FFNS.items()
            for n, layer in enumerate(model.language_model.model.layers)
            if isinstance(ffn := getattr(layer, name), SparseMoE)
        }

    def step(self) -> StepRecord:
        """Takes the next step.

        Raises:
            RuntimeError: loss or gradient are not finite; model and state are as before the step.
                Or the updated weights are not; then no state can be saved.
        """
        return self._step(lambda: self._batches(self.steps_done))

    def _step(self, prepared: Callable[[], list[TrainingBatch]]) -> StepRecord:
        start = time.perf_counter()
        number, config = self.steps_done, self.config
        device = self.model.device
        batches = [batch.to(device) for batch in prepared()]
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
        with _deterministic(device), self.masters.collecting() as collect:
            for batch in batches:
                own, parts, load = self._pass(batch, text_tokens, image_tokens)
                # Without a graph nothing that trains took part: routers in a pass of text alone.
                if own.requires_grad:
                    own.backward()
                collect()
                losses.append(torch.stack([own.detach(), *parts.values()]))
                loads.append(load)
        found = _over_processes(torch.stack(losses).double().sum(0)).tolist()
        if not all(map(math.isfinite, found)):
            self.masters.clear()
            raise self._diverged("loss", found[0])
        norm = self.masters.gradient_norm()
        if not math.isfinite(norm):
            self.masters.clear()
            raise self._diverged("gradient norm", norm)
        rate = config.learning_rate_at(number)
        self.masters.step(rate, norm)
        if not self.masters.are_finite():
            raise self._diverged("weights", "NaN or infinity")
        self.steps_done += 1
        means: dict[str, Any] = dict(zip(LOSSES, found[1:], strict=True))
        means["text_loss"] = means["text_loss"] if text_tokens else None
        means["image_loss"] = means["image_loss"] if image_tokens else None
        return StepRecord(
            step=self.steps_done,
            loss=found[0],
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            expert_load=self._read_load(loads, device),
            seconds=time.perf_counter() - start,
            **means,
        )

    def _diverged(self, what: str, value: object) -> RuntimeError:
        return RuntimeError(
            f"Trainer: {what} must stay finite, got {value} at step {self.steps_done + 1}; go on "
            "from the last saved state (--resume) with a lower learning_rate (--lr) or "
            "max_grad_norm (--max-grad-norm)"
        )

    def run(self, on_step: Callable[[StepRecord], object] | None = None) -> TrainingReport:
        """Takes all steps that are left.

        Args:
            on_step: called after each; may save.
        """
        losses, tokens, seconds = [], 0, 0.0
        with _without_old_objects(), self._prepared() as prepared:
            while self.steps_done < self.config.steps:
                record = self._step(prepared)
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

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Lets the model compute with the averages of its weights inside the block.

        Raises:
            ValueError: no average is kept.
        """
        with self.masters.ema_weights():
            yield

    def copy_ema_(self) -> None:
        """Gives the model the averages of its weights for good.

        Raises:
            ValueError: no average is kept.
        """
        self.masters.copy_ema_()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what `load` needs to go on exactly from here; see `state.save_state`."""
        state.save_state(directory, self.masters, self._facts())

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote, on any number of processes.

        Raises:
            ValueError: it is damaged, of another model, other data or another configuration.
        """
        facts = state.load_state(directory, self.masters, self._facts())
        self.steps_done = facts["step"]

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "config": self.config.to_dict(),
            "sequences": len(self.dataset),
            **self._identity,
        }

    @contextmanager
    def _prepared(self) -> Iterator[Callable[[], list[TrainingBatch]]]:
        """Yields a function that returns the batches of the next step, however far the run is."""
        if self._ahead and can_help():
            with prepared_ahead(self._batches, self.steps_done, self.config.steps) as prepared:
                yield prepared
        else:
            yield lambda: self._batches(self.steps_done)

    def _batches(self, step: int) -> list[TrainingBatch]:
        """Returns the passes of a step that are this process's, on the CPU."""
        return [
            pack_training(self.model.config, own)
            for own in self._sequences(step)[this_process() :: num_processes()]
        ]

    def _sequences(self, step: int) -> list[list[Sequence[Segment]]]:
        """Returns the sequences of every pass of a step; only those of this process are made."""
        config = self.config
        size = config.batch_size // config.passes
        passes: list[list[Sequence[Segment]]] = []
        for number in range(config.passes):
            own = number % num_processes() == this_process()
            places = range(number * size, (number + 1) * size) if own else ()
            generators = sequence_generators(config.seed, step, places)
            passes.append(
                [
                    self.dataset.sequence(self._order[step * config.batch_size + place], generator)
                    for place, generator in zip(places, generators, strict=True)
                ]
            )
        return passes


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
