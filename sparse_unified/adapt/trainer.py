# SPDX-License-Identifier: Apache-2.0
"""Training of a BAGEL in memory, on one process or sharded over several.

A step is `batch_size` sequences in `passes` forward and backward passes, which the processes share
out. Every loss is normalised by the tokens of the whole step, and balance is that of all of them,
so neither the division into passes nor the number of processes changes what is computed, but for
the rounding of sums.
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
from sparse_unified.adapt.data import ImageDataset, in_order, sequence_generator
from sparse_unified.adapt.optimizer import (
    Optimizer,
    num_processes,
    shard_,
    sum_over_processes,
    this_process,
)
from sparse_unified.adapt.saving import load_state, save_state
from sparse_unified.bagel.model import (
    Bagel,
    Routing,
    distillation_loss,
    router_losses,
    training_forward,
)
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
    balance_loss: float  # of all tokens of the step, mean over the sparse blocks
    router_z_loss: float  # the same
    grad_norm: float  # of the gradient before it was clipped
    learning_rate: float  # that was used
    tokens: int  # of the step, all kinds and processes
    seconds: float  # wall time of the step
    # {(component, layer): tokens of each expert}
    expert_load: dict[tuple[str, int], list[int]]
    # Text and image loss, weighted, of held-out data after the step; None where not measured.
    held_out_loss: float | None = None
    # Of all tokens of the step, mean over the sparse blocks; None where it has no weight.
    distill_loss: float | None = None

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


Key = tuple[str, int]  # component and layer of a sparse block


class TrainingPass(nn.Module):
    """The model and its losses, as one module that can be sharded as a whole."""

    def __init__(self, model: Bagel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(
        self, batch: TrainingBatch, text_tokens: int, image_tokens: int
    ) -> tuple[Tensor, Tensor, dict[Key, Routing]]:
        """Returns the share of a pass in text and image loss of its step, and what blocks did.

        `text_tokens` and `image_tokens` are those of the whole step.
        """
        config = self._config
        out = training_forward(
            self.model,
            batch,
            checkpointing=config.checkpointing,
            distill=config.distill_weight > 0,
        )
        text, image = out.text_loss_sum, out.image_loss_sum
        return text / max(1, text_tokens), image / max(1, image_tokens), out.routing


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
        held_out: sequences that are not trained on, whose loss is measured now and then.

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
        held_out: SequenceDataset | None = None,
    ) -> None:
        if not isinstance(model, Bagel):
            raise TypeError(
                f"Trainer: model must be a Bagel, got {type(model).__name__}; of other models, "
                "`freeze` chooses what their own training loop trains"
            )
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
        self._held_out = held_out
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
        self._blocks = {
            (component, n): ffn
            for component, name in FFN_NAMES.items()
            for n, layer in enumerate(layers)
            if isinstance(ffn := getattr(layer, name), SparseMoE)
        }
        weights = [own for block in self._blocks.values() for own in block.named_parameters()]
        moving = [name for name, own in weights if own.requires_grad and "_proj" in name]
        if config.distill_weight and (moving or not self._blocks):
            got = f"trained {moving[0]}" if moving else "a model without any"
            raise ValueError(
                "Trainer: distill_weight must come with sparse FFNs and frozen experts, whose sum "
                f"is the target, got {got}"
            )

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
        weights = (
            *(config.ce_weight, config.mse_weight),
            *(config.balance_weight, config.z_weight, config.distill_weight),
        )
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        seen: dict[Key, Routing] = {}  # sums over the passes, without a graph
        is_judged = bool(self._blocks) and any(weights[2:])
        whole: dict[Key, tuple[Tensor, int]] = {}
        powers: dict[Key, Tensor] = {}
        with _deterministic(device), self.optimizer.accumulating():
            # Balance is that of the whole step, so that passes after the first are routed before;
            # and so is what the errors of distillation are relative to.
            ahead = batches[1:] if is_judged else []
            with torch.no_grad():
                for batch in ahead:
                    _add(seen, self._pass(batch, text_tokens, image_tokens)[-1])
            for number, batch in enumerate(batches):
                text, image, routing = self._pass(batch, text_tokens, image_tokens)
                if number == 0 or not ahead:
                    _add(seen, routing)
                if number == 0 and is_judged:
                    whole = self._whole(seen)
                    powers = self._powers(seen, whole)
                judged = self._block_losses(routing, whole, powers) if whole else ()
                parts = (text, image, *judged)
                total = torch.stack([w * p for w, p in zip(weights, parts, strict=False)]).sum()
                # Without a graph nothing that trains took part: routers in a pass of text alone.
                if total.requires_grad:
                    total.backward()
                sums += torch.stack([text.detach(), image.detach()])
        whole = whole or self._whole(seen)
        own_losses = torch.stack(self._block_losses(seen, whole, powers)).double().to(device)
        found = sum_over_processes(torch.cat([sums, own_losses])).tolist()
        loss = sum(w * part for w, part in zip(weights, found, strict=False))
        rate = config.learning_rate_at(self.steps_done)
        norm = self._update(loss, rate)
        if config.balance_rate:
            self._even_out(seen, whole)
        self.steps_done += 1
        self._waiting = []
        every, is_last = config.eval_every, self.steps_done == config.steps
        is_due = is_last or (every is not None and self.steps_done % every == 0)
        text_loss, image_loss, balance_loss, router_z_loss, *distill_loss = found
        flat = iter(torch.cat([load for load, _ in whole.values()]).tolist() if whole else ())
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
            expert_load={key: list(islice(flat, len(load))) for key, (load, _) in whole.items()},
            held_out_loss=self.held_out_loss() if is_due and self._held_out is not None else None,
            distill_loss=distill_loss[0] if distill_loss else None,
            seconds=time.perf_counter() - start,
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Returns text and image loss, weighted, over all held-out sequences.

        Their noise and order are those of the seed, so that two measurements differ by the model.
        """
        data, config, device = self._held_out, self.config, self.model.device
        if data is None:
            raise ValueError("held_out_loss: Trainer must have held_out data, got none")
        size = config.batch_size // config.passes
        passes = -(-len(data) // size)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        # Sharded weights are gathered by all processes at once: each makes as many passes.
        for first in range(0, passes, num_processes()):
            number = first + this_process()
            indices = range(number % passes * size, min((number % passes + 1) * size, len(data)))
            draws = [sequence_generator(config.seed, 0, index) for index in indices]
            sequences = [data.sequence(i, own) for i, own in zip(indices, draws, strict=True)]
            batch = pack_training(self.model.config, sequences).to(device)
            text, image, _ = self._pass(batch, 1, 1)
            if number < passes:
                tokens = (float(batch.text_tokens), float(batch.image_tokens))
                sums += sums.new_tensor([float(text), float(image), *tokens])
        text_sum, image_sum, texts, images = sum_over_processes(sums).tolist()
        text_part = config.ce_weight * text_sum / max(1, texts)
        return text_part + config.mse_weight * image_sum / max(1, images)

    def _whole(self, seen: Mapping[Key, Routing]) -> dict[Key, tuple[Tensor, int]]:
        """Returns load and number of tokens of every block over the whole step, all processes."""
        if not self._blocks:
            return {}
        empty = torch.zeros((), dtype=torch.int64, device=self.model.device)
        loads = [
            seen[key].load if key in seen else empty.expand(block.num_experts)
            for key, block in self._blocks.items()
        ]
        joined, sizes = sum_over_processes(torch.cat(loads)), [len(load) for load in loads]
        # Split on both sides, so that the host waits once for all blocks.
        parts = zip(
            self._blocks.items(), joined.split(sizes), joined.cpu().split(sizes), strict=True
        )
        return {key: (load, int(own.sum()) // ffn.top_k) for (key, ffn), load, own in parts}

    def _powers(
        self, seen: Mapping[Key, Routing], whole: Mapping[Key, tuple[Tensor, int]]
    ) -> dict[Key, Tensor]:
        """Returns |dense|^2 of the blocks that have seen tokens, if it is distilled."""
        if not self.config.distill_weight:
            return {}
        none = torch.zeros((), device=self.model.device)
        joined = torch.stack([seen[key].power if key in seen else none for key in whole])
        powers = zip(whole.items(), sum_over_processes(joined), strict=True)
        return {key: power for (key, (_, tokens)), power in powers if tokens}

    def _block_losses(
        self,
        routing: Mapping[Key, Routing],
        whole: Mapping[Key, tuple[Tensor, int]],
        powers: Mapping[Key, Tensor],
    ) -> tuple[Tensor, ...]:
        """Returns the share in balance loss, z-loss and, where there are powers, distillation."""
        found: tuple[Tensor, ...] = router_losses(routing, whole)
        return (*found, distillation_loss(routing, powers).to(found[0])) if powers else found

    @torch.no_grad()
    def _even_out(
        self, seen: Mapping[Key, Routing], whole: Mapping[Key, tuple[Tensor, int]]
    ) -> None:
        """Lifts the logits of experts with too few tokens by `balance_rate`, and lowers the others.

        A bias by expert, which grows while its load is below the mean, balances without a loss
        whose gradient disturbs the others (arXiv 2408.15664). Files have no place for one, so it is
        written into the router, along the mean of its inputs: w_e += rate * sign * m / |m|^2.
        """
        for key, (load, tokens) in whole.items():
            gate = self._blocks[key].gate.weight
            own = torch.zeros(gate.shape[1], device=self.model.device)
            own += seen[key].inputs if key in seen else 0
            mean = sum_over_processes(own) / max(1, tokens)
            mean = mean / mean.square().sum().clamp_min(torch.finfo(mean.dtype).tiny)
            sign = (load.double().mean() - load).sign().to(mean)
            name = f"language_model.model.layers.{key[1]}.{FFN_NAMES[key[0]]}."
            for router in ("gate", "gate_img"):
                if f"{name}{router}.weight" in self.optimizer.parameters:
                    change = self.config.balance_rate * sign[:, None] * mean
                    self.optimizer.add(f"{name}{router}.weight", change)

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


def _add(seen: dict[Key, Routing], routing: Mapping[Key, Routing]) -> None:
    """Adds what blocks did in a pass, without its graph."""
    for key, own in routing.items():
        own = own._replace(
            probability=own.probability.detach(), z=own.z.detach(), error=own.error.detach()
        )
        if (before := seen.get(key)) is not None:
            pairs: Any = zip(before, own, strict=True)
            own = Routing(*(old + new for old, new in pairs))
        seen[key] = own


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
