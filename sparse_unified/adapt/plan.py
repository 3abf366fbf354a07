# SPDX-License-Identifier: Apache-2.0
"""A run checked and described, without its first step."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from sparse_unified._common import Report, format_table
from sparse_unified.adapt.config import TrainingConfig
from sparse_unified.adapt.draws import sequence_generators
from sparse_unified.adapt.memory import MemoryEstimate, estimate
from sparse_unified.adapt.run import RunConfig, latest_state, prepare
from sparse_unified.adapt.sharding import num_processes
from sparse_unified.adapt.state import read_facts
from sparse_unified.bagel.packing import pack_training


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Report):
    """What a run would do.

    Attributes:
        sequences: of each use in the data. epochs: how often each is seen.
        passes: forward and backward passes of a step, over all processes.
        resumes_from: step of the state that it would go on from.
        memory: for a pass of the size of the first sequences.
    """

    sequences: dict[str, int]
    steps: int
    epochs: float
    passes: int
    resumes_from: int
    memory: MemoryEstimate

    def to_dict(self) -> dict[str, object]:
        return {
            "sequences": self.sequences,
            "steps": self.steps,
            "epochs": self.epochs,
            "passes": self.passes,
            "resumes_from": self.resumes_from,
            "memory": self.memory.to_dict(),
        }

    def to_text(self) -> str:
        uses = ", ".join(f"{count:,} {task}" for task, count in self.sequences.items())
        rows = [
            ("sequences", uses),
            ("steps", f"{self.steps:,}, each of {self.passes} passes"),
            ("epochs", f"{self.epochs:.2f}"),
        ]
        if self.resumes_from:
            rows.append(("resumes from", f"step {self.resumes_from}"))
        return f"{format_table(rows)}\n\n{self.memory.to_text()}"


def plan(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: TrainingConfig,
    run: RunConfig | None = None,
) -> Plan:
    """Reads and checks all that `adapt` is given, one pass of sequences included.

    Arguments and errors are those of `adapt`; nothing is written but latents, where they are kept.
    """
    run = run or RunConfig()
    prepared = prepare(model, out, data, config, run)
    dataset, trainer = prepared.dataset, prepared.trainer
    size = config.batch_size // config.passes
    generators = sequence_generators(config.seed, 0, range(size))
    sequences = [
        dataset.sequence(index % len(dataset), generator)
        for index, generator in enumerate(generators)
    ]
    batch = pack_training(trainer.model.config, sequences, device=trainer.model.device)
    image_tokens = 0 if batch.latents is None else len(batch.latents)
    state = latest_state(prepared.running) if run.resume else None
    return Plan(
        sequences=dict(Counter(task.value for _, task in dataset.samples)),
        steps=config.steps,
        epochs=config.steps * config.batch_size / len(dataset),
        passes=config.passes,
        resumes_from=0 if state is None else read_facts(state)["step"],
        memory=estimate(
            trainer.model,
            config,
            image_tokens=image_tokens,
            text_tokens=batch.num_tokens - image_tokens,
            predicted_tokens=batch.text_tokens,
            autoencoder=sum(p.nbytes for p in dataset.autoencoder.parameters()),
            processes=num_processes(),
        ),
    )
