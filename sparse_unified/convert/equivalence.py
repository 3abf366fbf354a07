# SPDX-License-Identifier: Apache-2.0
"""Numeric check of one layer: with top_k = E and routers at zero, experts equal the dense FFN."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.convert.matching import expert_ranges
from sparse_unified.experts import ExpertLayout

_NUM_TOKENS = 16
_BLOCK_NEURONS = 512


def compare_outputs(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout,
    *,
    seed: int,
    kept: np.ndarray | None = None,
) -> tuple[float, float]:
    """Runs both FFNs of one layer on the same random tokens, in fp32 whatever the files hold.

    Half precision rounds each expert's output, which could hide a mistake or look like one.

    Args:
        kept: the neurons of the dense FFN that the experts are made of; None for all.

    Returns:
        max|sparse - ref| and the most it may be, 2 * max|dense - ref| + 1e-5 * max|ref|, where ref
        is the dense FFN in fp64. One layer's weights are in memory at a time.
    """
    ffn = dense.ffns[component][layer]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    x = torch.randn(_NUM_TOKENS, ffn.hidden_size, generator=generator)
    with torch.no_grad():
        y = _run_sparse(sparse, component, layer, layout, x)
        y_dense, ref = _run_dense(dense, component, layer, x, kept)
    error = (y.double() - ref).abs().max().item()
    own_error = (y_dense.double() - ref).abs().max().item()
    return error, 2 * own_error + 1e-5 * ref.abs().max().item()


def _run_sparse(
    sparse: Checkpoint, component: str, layer: int, layout: ExpertLayout, x: Tensor
) -> Tensor:
    # Imported late: nn loads itself from checkpoints, and reading them needs no modules.
    from sparse_unified.nn import SparseMoE

    block = SparseMoE(
        x.shape[1],
        layout.intermediate_size,
        layout.num_experts,
        layout.num_experts,
        layout.num_shared_experts,
        shared_intermediate_size=layout.shared_width,
        return_router_logits=False,
        device="meta",
        dtype=x.dtype,
    ).to_empty(device="cpu")
    views = block.official_views()
    for view in (views["gate.weight"], views["gate_shared.weight"]):
        view.zero_()
    prefix = keys.ffn_prefix(component, layer)
    for expert, _, _ in expert_ranges(layout):
        for name in keys.PROJECTIONS:
            key = keys.expert_key(component, layer, expert, name)
            views[key.removeprefix(prefix)].copy_(sparse.read(key))
    y: Tensor = block(x)
    return y


def _run_dense(
    dense: Checkpoint, component: str, layer: int, x: Tensor, kept: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    from sparse_unified.nn import SwiGLU

    weights = [
        dense.read(keys.dense_key(component, layer, name)).to(x.dtype) for name in keys.PROJECTIONS
    ]
    if kept is not None:
        index = torch.from_numpy(kept)
        weights = [weights[0][index], weights[1][index], weights[2][:, index]]
    gate_proj, up_proj, down_proj = weights
    ffn = SwiGLU(x.shape[1], gate_proj.shape[0], device="meta", dtype=x.dtype)
    ffn.load_state_dict(
        {f"{name}.weight": w for name, w in zip(keys.PROJECTIONS, weights, strict=True)},
        assign=True,
    )
    y = ffn(x)
    wide = x.double()
    ref = torch.zeros_like(wide)
    for start in range(0, gate_proj.shape[0], _BLOCK_NEURONS):
        part = slice(start, start + _BLOCK_NEURONS)
        hidden = F.silu(wide @ gate_proj[part].double().T) * (wide @ up_proj[part].double().T)
        ref += hidden @ down_proj[:, part].double().T
    return y, ref
