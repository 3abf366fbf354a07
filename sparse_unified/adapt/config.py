# SPDX-License-Identifier: Apache-2.0
"""What is trained on what, and how: the configurations of a run, and the parameters of a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from torch import nn

from sparse_unified._common import check_int, check_number, choice, context
from sparse_unified.analysis.samples import Task
from sparse_unified.checkpoint.keys import FFN_NAMES, SUFFIXES
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS
from sparse_unified.surgery.lora import LoraTarget, add_lora_

_ABOVE_ZERO = 1e-30
_set = object.__setattr__  # of a frozen dataclass


def _check(config: Any, rule: Callable[..., None], names: str, *limits: float) -> None:
    """Checks fields of a config by a rule; None passes where the type of a field has it."""
    optional = {field.name for field in fields(config) if "None" in field.type}
    for name in names.split():
        if (value := getattr(config, name)) is not None or name not in optional:
            rule(name, value, *limits)


class Schedule(str, Enum):
    """What the learning rate does after the warm-up."""

    COSINE = "cosine"  # half a cosine, down to `min_learning_rate` at the last step
    CONSTANT = "constant"


class Stage(str, Enum):
    """What is trained."""

    ROUTER = "router"  # the routers of the sparse blocks alone
    EXPERT_FROZEN = "expert_frozen"  # everything but the experts of the sparse blocks
    FULL = "full"  # everything


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
        balance_weight: of the load-balance loss over all tokens of a step.
        balance_rate: balance without a loss: how much the logit of an expert with too few tokens
            rises in a step, and that of one with too many falls (0: not at all).
        z_weight: of the router z-loss over all tokens of a step.
        distill_weight: of the relative squared error of sparse FFNs against the dense one, all
            experts at weight 1, on the same tokens; experts must be frozen.
        seed: of the order of the data and of everything that is drawn.
        checkpointing: keep no activations of layers; compute them again for the backward pass.
        eval_every: steps between losses on held-out data, which the last step has too.
        optimizer_device: where gradients, float32 master weights, moments and average are kept,
            "cpu" for instance (None: with the model).
    """

    steps: int
    batch_size: int = 8
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
    balance_rate: float = 0.0
    z_weight: float = 0.0
    distill_weight: float = 0.0
    seed: int = 0
    checkpointing: bool = False
    eval_every: int | None = None
    optimizer_device: str | None = None

    @context("TrainingConfig")
    def __post_init__(self) -> None:
        _check(self, check_int, "steps batch_size micro_batch_size eval_every", 1)
        _check(self, check_int, "warmup_steps", 0)
        _check(self, check_int, "seed", 0, 2**63 - 1)
        _check(self, check_number, "learning_rate min_learning_rate weight_decay balance_rate", 0)
        _check(self, check_number, "ce_weight mse_weight balance_weight z_weight distill_weight", 0)
        _check(self, check_number, "eps max_grad_norm", _ABOVE_ZERO)
        _check(self, check_number, "ema_decay", 0, 1)
        _set(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be a pair, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, 0, math.nextafter(1, 0))
        _set(self, "schedule", choice("schedule", Schedule, self.schedule))
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must be a divisor of batch_size = {self.batch_size}, "
                f"got {self.micro_batch_size}"
            )

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """How training sequences are drawn. Defaults are those of BAGEL's training.

    Args:
        timestep_shift: s of t <- s t / (1 + (s - 1) t); above 1 trains more near the noise.
        text_dropout: how often the text before an image to generate is left out.
        vit_dropout: how often the ViT view of an image to edit is left out.
        vae_dropout: how often the VAE view of an image to edit is left out.
    """

    timestep_shift: float = 1.0
    text_dropout: float = 0.1
    vit_dropout: float = 0.3
    vae_dropout: float = 0.3

    @context("SequenceConfig")
    def __post_init__(self) -> None:
        _check(self, check_number, "timestep_shift", _ABOVE_ZERO)
        _check(self, check_number, "text_dropout vit_dropout vae_dropout", 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What is trained on what, and what is kept while the run lasts.

    Args:
        stage: what is trained, a `Stage`.
        component: train the weights of one component alone: "gen", "und" or "both".
        lora_rank: train low-rank adapters instead, of this rank, see `add_lora_`; the run then
            writes them alone.
        lora_alpha: their weight is lora_alpha / lora_rank (None: 1).
        lora_targets: which weights get adapters, `LoraTarget` each (default attention).
        sequences: how times, noise and dropout are drawn.
        tasks: which uses of the records are trained (default all that they allow).
        max_side: longest side of images in pixels (None: what the model takes).
        device: of the model.
        dtype: of computation (None: as in the files); the optimizer works in float32.
        checkpoint_every: steps between saved states, a last one after the last step (None: none).
        keep: how many states are kept.
        resume: go on from the latest state, if there is one.
        report_to: trackers of accelerate that get what the log gets: tensorboard, wandb, ...
        cache_latents: encode every image once and keep its latent beside the states.
        streaming: read shards as they come, through `datasets` but not into its cache on disk, and
            shuffle them in blocks.
        eval_data: held-out data, a path as the data itself, on which the loss is measured.
        max_damaged: records with a damaged image that a process skips; one more ends the run.
        workers: loader workers of each process, which read, decode and resize the images of the
            next step while a step runs (0: none, images are read between steps).
    """

    stage: Stage = Stage.EXPERT_FROZEN
    component: str = BOTH
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[LoraTarget, ...] | None = None
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    tasks: tuple[Task, ...] | None = None
    max_side: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = False
    report_to: tuple[str, ...] = ()
    cache_latents: bool = False
    eval_data: str | None = None
    max_damaged: int = 10
    streaming: bool = False
    workers: int = 2

    @context("RunConfig")
    def __post_init__(self) -> None:
        _set(self, "stage", choice("stage", Stage, self.stage))
        for name, kind in (("tasks", Task), ("lora_targets", LoraTarget)):
            if (given := getattr(self, name)) is not None:
                _set(self, name, tuple(choice(name, kind, value) for value in given))
        _set(self, "report_to", tuple(self.report_to))
        _check(self, check_int, "checkpoint_every keep lora_rank", 1)
        _check(self, check_int, "max_damaged workers", 0)
        _check(self, check_number, "lora_alpha", _ABOVE_ZERO)
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must come with lora_rank, got {getattr(self, name)}")
            return
        if self.stage is not Stage.EXPERT_FROZEN:
            rule = "stage must be left out with lora_rank, which trains adapters alone"
            raise ValueError(f"{rule}, got {self.stage.value}")

    @property
    def trained(self) -> str:
        """What is trained, in a word: the stage, or "lora"."""
        return self.stage.value if self.lora_rank is None else "lora"

    def prepare_(self, model: nn.Module, seed: int) -> Any:
        """Freezes what is not trained; returns the configuration of adapters, if it added any."""
        if self.lora_rank is None:
            freeze(model, self.stage, component=self.component)
            return None
        return add_lora_(
            model,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets or (LoraTarget.ATTENTION,),
            component=self.component,
            seed=seed,
        )


_ROUTERS = ("gate", "gate_img", "gate_shared", "gate_time")
# Sine tables, stored in the checkpoint and never trained.
_TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")
# Outside the decoder layers, what only latents run through.
_GEN_MODULES = ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")


@context("freeze")
def freeze(model: nn.Module, stage: Stage | str, *, component: str = BOTH) -> list[str]:
    """Sets `requires_grad` of every parameter as a stage wants it.

    A frozen expert gets no weight gradient, and keeps no activation for one; the gradient still
    flows through it to its input, and to the router.

    Args:
        model: with `SparseMoE` blocks anywhere; `full` takes dense models too.
        stage: what to train, a `Stage`.
        component: "gen" or "und" freezes the weights of the other component of a BAGEL.

    Returns:
        The names of the trained parameters.

    Raises:
        ValueError: there is no such stage or component, the stage needs sparse blocks and the
            model has none, or nothing is left to train; then nothing was changed.

    Source: the two tunings of arXiv 2512.02351, and one of the routers alone.
    """
    stage = choice("stage", Stage, stage)
    if component not in (*FFN_NAMES, BOTH):
        raise ValueError(f"component must be gen, und or both, got {component!r}")
    blocks = [name for name, module in model.named_modules() if isinstance(module, SparseMoE)]
    if stage is not Stage.FULL and not blocks:
        raise ValueError(f"stage must be full for a model without sparse blocks, got {stage.value}")
    experts = {f"{name}.{part}".lstrip(".") for name in blocks for part in PROJECTIONS}
    routers = {f"{name}.{part}.weight".lstrip(".") for name in blocks for part in _ROUTERS}
    trained = []
    for name, _ in model.named_parameters():
        is_gen = f"{SUFFIXES['gen']}." in name or name.startswith(_GEN_MODULES)
        if stage is Stage.ROUTER:
            is_trained = name in routers
        else:
            is_trained = not name.endswith(_TABLES) and (stage is Stage.FULL or name not in experts)
        if is_trained and component in (BOTH, "gen" if is_gen else "und"):
            trained.append(name)
    if not trained:
        raise ValueError(
            f"component must have weights that its stage trains, got none in {component}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if not parameter.requires_grad:
            parameter.grad = None
    return trained
