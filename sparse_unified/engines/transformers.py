# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers' mixture-of-experts models on our ops.

After `register`, `model.set_experts_implementation("sparse_unified")` or `from_pretrained(...,
experts_implementation="sparse_unified")` runs them. Weights stay where they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_unified._common import optional
from sparse_unified.nn.sparse_moe import run_experts

NAME = "sparse_unified"


def register() -> None:
    """Adds "sparse_unified" to `ALL_EXPERTS_FUNCTIONS`; calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than its experts interface (5.0).
    """
    optional("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """sum_k top_k_weights[t, k] * expert[top_k_index[t, k]](hidden_states[t]), [T, D].

    Args:
        module: of transformers, with `gate_up_proj` [E, 2 * h, D] (gate first) and `down_proj`
            [E, D, h].
        hidden_states: [T, D]. top_k_index, top_k_weights: [T, K].

    Raises:
        ValueError: the experts are no plain SwiGLU in that layout, or are divided over processes.
    """
    _refuse_others(module)
    gate_up_proj, down_proj = module.gate_up_proj, module.down_proj
    tokens = hidden_states.to(gate_up_proj.dtype)
    experts = (*gate_up_proj.chunk(2, dim=1), down_proj)
    weights, topk_idx = top_k_weights.float(), top_k_index.int()
    y = run_experts(tokens, weights, topk_idx, len(down_proj), *experts)
    return y.to(hidden_states.dtype)


def _refuse_others(module: Any) -> None:
    wanted = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
        "_is_expert_parallel": False,
    }
    found = [
        f"{name} {not value}"
        for name, value in wanted.items()
        if getattr(module, name, value) != value
    ]
    if not module._apply_gate.__module__.endswith("integrations.moe"):
        found.append("a gate function of their own")
    if not found and "silu" not in type(module.act_fn).__name__.lower():
        found.append(f"activation {type(module.act_fn).__name__}")
    if found:
        raise ValueError(
            f"{NAME}: experts of {type(module).__name__} must be SwiGLU without bias, in one "
            f"process, got {', '.join(found)}; use another experts_implementation"
        )
