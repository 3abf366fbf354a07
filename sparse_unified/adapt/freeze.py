# SPDX-License-Identifier: Apache-2.0
"""Which parameters a stage of adaptation trains, and of which component."""

from __future__ import annotations

from torch import nn

from sparse_unified._common import choice, context
from sparse_unified.adapt.config import Stage
from sparse_unified.checkpoint.keys import FFN_NAMES, SUFFIXES
from sparse_unified.checkpoint.modes import BOTH
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import PROJECTIONS

_ROUTERS = ("gate", "gate_img", "gate_shared")
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
