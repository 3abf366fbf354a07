# SPDX-License-Identifier: Apache-2.0
"""One storage layout, official names: which slice of the fused weights is which expert's tensor."""

from __future__ import annotations

from torch import Tensor

from sparse_unified.partition import ExpertLayout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_views(
    layout: ExpertLayout, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> dict[str, Tensor]:
    """Names every expert's slice of the fused weights as the official checkpoints do.

    Args:
        layout: neuron ranges.
        gate_proj, up_proj: [I, D]; down_proj: [D, I]; neurons in expert order.

    Returns:
        `experts.<e>.<projection>.weight` and, with a shared expert,
        `shared_expert.<projection>.weight` -> view of the storage.
    """
    ranges = {f"experts.{e}": layout.expert_range(e) for e in range(layout.num_experts)}
    if layout.shared_width:
        ranges["shared_expert"] = layout.shared_range()
    views = {}
    for owner, (start, stop) in ranges.items():
        slices = (gate_proj[start:stop], up_proj[start:stop], down_proj[:, start:stop])
        for projection, view in zip(PROJECTIONS, slices, strict=True):
            views[f"{owner}.{projection}.weight"] = view
    return views
