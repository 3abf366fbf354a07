# SPDX-License-Identifier: Apache-2.0
"""Which parameters a stage of adaptation trains."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn

from sparse_unified.nn import SparseMoE

_EXPERT_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
_ROUTERS = ("gate", "gate_img", "gate_shared")
# Sine tables, stored in the checkpoint and never trained.
_TABLES = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")


class Stage(str, Enum):
    """What is trained."""

    ROUTER = "router"  # the routers of the sparse blocks alone
    EXPERT_FROZEN = "expert_frozen"  # everything but the experts of the sparse blocks
    FULL = "full"  # everything


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeReport:
    """What `freeze` did.

    Attributes:
        stage: that was set.
        trained, frozen: names of the parameters, in the order of the model.
        trained_parameters, frozen_parameters: their sizes, in numbers.
    """

    stage: Stage
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    trained_parameters: int
    frozen_parameters: int


def freeze(model: nn.Module, stage: Stage | str) -> FreezeReport:
    """Sets `requires_grad` of every parameter as a stage wants it.

    A frozen expert gets no weight gradient, and keeps no activation for one; the gradient still
    flows through it to its input, and to the router.

    Args:
        model: with `SparseMoE` blocks anywhere; `full` takes dense models too.
        stage: what to train.

    Raises:
        ValueError: there is no such stage, or it needs sparse blocks and the model has none; then
            nothing was changed.

    Source: the two tunings of arXiv 2512.02351, and one of the routers alone.
    """
    try:
        stage = Stage(stage)
    except ValueError:
        legal = ", ".join(one.value for one in Stage)
        raise ValueError(f"freeze: stage must be one of {legal}, got {stage!r}") from None
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, SparseMoE)}
    if stage is not Stage.FULL and not blocks:
        raise ValueError(
            f"freeze: stage must be full for a model without sparse blocks, got {stage.value}"
        )
    experts = {f"{name}.{part}".lstrip(".") for name in blocks for part in _EXPERT_WEIGHTS}
    routers = {f"{name}.{part}.weight".lstrip(".") for name in blocks for part in _ROUTERS}
    trained: list[str] = []
    frozen: list[str] = []
    sizes = [0, 0]
    for name, parameter in model.named_parameters():
        if stage is Stage.ROUTER:
            wanted = name in routers
        else:
            wanted = not name.endswith(_TABLES) and (stage is Stage.FULL or name not in experts)
        parameter.requires_grad_(wanted)
        if not wanted:
            parameter.grad = None
        (trained if wanted else frozen).append(name)
        sizes[not wanted] += parameter.numel()
    return FreezeReport(
        stage=stage,
        trained=tuple(trained),
        frozen=tuple(frozen),
        trained_parameters=sizes[0],
        frozen_parameters=sizes[1],
    )
