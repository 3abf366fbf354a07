# SPDX-License-Identifier: Apache-2.0
"""What the decoder layers of a live model cost."""

from __future__ import annotations

from torch import nn

from sparse_unified.checkpoint.counts import Counts, count_weight
from sparse_unified.checkpoint.keys import SUFFIXES, attention_modules, ffn_modules
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.stored import is_packed
from sparse_unified.surgery.find import Host, find_host
from sparse_unified.surgery.storage import stored_bytes


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
    counts = Counts()
    for path, weight in module.named_parameters():
        inner = path.rpartition(".")[0] or name
        counts += count_weight(inner.rpartition(".")[2], weight.dtype, weight.shape)
        if is_packed(weight):
            unpacked_bytes = weight.numel() * weight.dtype.itemsize
            counts += Counts(bytes=stored_bytes(weight) - unpacked_bytes)
    if isinstance(module, SparseMoE):
        idle = module.num_experts - module.top_k
        flops = 2 * 3 * module.hidden_size * module.layout.expert_width * idle
        counts += Counts(flops_per_token=-flops)
    return counts
