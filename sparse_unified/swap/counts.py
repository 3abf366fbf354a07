# SPDX-License-Identifier: Apache-2.0
"""What a component of a live model costs: parameters, bytes, arithmetic, cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import Tensor, nn

from sparse_unified.checkpoint.keys import SUFFIXES, attention_modules, ffn_modules
from sparse_unified.nn import SparseMoE
from sparse_unified.swap.find import Host, find_host


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The decoder layers of one component, or of several added up.

    Attributes:
        parameters, bytes: of all weights.
        flops_per_token: 2 per weight of the projections, FFNs and routers that a token runs
            through; idle experts do not count.
        flops_per_pair: 4 * query heads * head_dim of all layers: what attention takes per pair of
            a token and one it sees, beside the projections.
        kv_bytes_per_token: keys and values that a token leaves in a context.
    """

    parameters: int = 0
    bytes: int = 0
    flops_per_token: int = 0
    flops_per_pair: int = 0
    kv_bytes_per_token: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


def count_parameters(model: object) -> dict[str, Counts]:
    """Returns what the decoder layers of each component of a live model cost.

    Args:
        model: a module or pipeline, as `apply_moe_` takes it, swapped or not.

    Raises:
        ValueError: it has no decoder layers of a known structure.
    """
    host = find_host(model, where="count_parameters")
    return {component: count_component(host, component) for component in SUFFIXES}


def count_component(host: Host, component: str) -> Counts:
    """Returns what the decoder layers of one component cost."""
    counts = Counts()
    for layer in range(len(host.layers)):
        for name in (*attention_modules(component), *ffn_modules(component)):
            place = host.place(layer, name)
            if place is not None and place.module is not None:
                counts += count_module(
                    place.module, name.rpartition(".")[2].removesuffix(SUFFIXES["gen"])
                )
    return counts


def count_module(module: nn.Module, name: str) -> Counts:
    """Returns what one module of a decoder layer costs; `name` says what it is, as in `q_proj`."""
    weights = list(module.parameters())
    matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    if isinstance(module, SparseMoE):
        idle = module.num_experts - module.top_k
        matrices -= 3 * module.hidden_size * module.layout.expert_width * idle
        # The two routers of und blocks take different tokens.
        if module.gate_img is not None:
            matrices -= module.gate_img.weight.numel()
    rows = _rows(weights) if name in ("q_proj", "k_proj", "v_proj") else 0
    return Counts(
        parameters=sum(weight.numel() for weight in weights),
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        flops_per_token=2 * matrices,
        flops_per_pair=4 * rows if name == "q_proj" else 0,
        kv_bytes_per_token=0 if name == "q_proj" else rows * _element_size(weights),
    )


def _rows(weights: Iterable[Tensor]) -> int:
    return next((weight.shape[0] for weight in weights if weight.ndim == 2), 0)


def _element_size(weights: Iterable[Tensor]) -> int:
    return next((weight.element_size() for weight in weights), 0)
