# SPDX-License-Identifier: Apache-2.0
"""Training one component alone: the weights of the other one are left as they are."""

from __future__ import annotations

from torch import nn

from sparse_unified.checkpoint.keys import FFN_NAMES, SUFFIXES
from sparse_unified.checkpoint.modes import BOTH

# Outside the decoder layers, what only latents run through.
_GEN_MODULES = ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")


def component_of(name: str) -> str:
    """Returns the component, "gen" or "und", that a parameter of a BAGEL belongs to."""
    is_gen = f"{SUFFIXES['gen']}." in name or name.startswith(_GEN_MODULES)
    return "gen" if is_gen else "und"


def freeze_component(model: nn.Module, component: str) -> None:
    """Takes the other component's parameters out of training; "both" leaves all as it is.

    Raises:
        ValueError: component is none, or nothing is left to train.
    """
    if component not in (*FFN_NAMES, BOTH):
        raise ValueError(f"adapt: component must be gen, und or both, got {component!r}")
    for name, parameter in model.named_parameters():
        if component not in (BOTH, component_of(name)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"adapt: component must have weights that its stage trains, got none in {component}"
        )
