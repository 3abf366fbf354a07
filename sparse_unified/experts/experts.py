# SPDX-License-Identifier: Apache-2.0
"""Which neurons stay when sparse FFNs are made narrower: as many in every routed expert."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_unified.experts.keep import Budget, keep_units
from sparse_unified.experts.layout import ExpertLayout


def keep_in_experts(
    scores: Tensor, layout: ExpertLayout, *, keep_ratio: float, block_size: int = 1
) -> tuple[Tensor, ExpertLayout]:
    """Chooses the neurons of each expert with the highest scores, whole blocks of them.

    Routed experts of w neurons keep max(1, round(keep_ratio * w / block_size)) blocks each. A
    shared expert that is S expert widths wide, as `ExpertLayout` makes it, stays so, as checkpoints
    tell its width by S; one of another width keeps the ratio of its own.

    Args:
        scores: finite, [I] in expert order, higher is more important.
        layout: of the experts.
        keep_ratio: in (0, 1]. block_size: divides the width of every expert, see
            `check_experts`.

    Returns:
        [kept] int64, ascending positions in expert order, on the CPU; and the layout of the result.

    Raises:
        ValueError: block_size does not divide the width of an expert.
    """

    def best(start: int, stop: int, blocks: int) -> Tensor:
        order = keep_units(
            {0: scores[start:stop]},
            keep_ratio=blocks * block_size / (stop - start),
            budget=Budget.UNIFORM,
            block_size=block_size,
        )
        return start + order[0]

    blocks = max(1, round(keep_ratio * layout.expert_width / block_size))
    shared = _shared_blocks(layout, blocks, keep_ratio, block_size)
    parts = [best(*layout.shared_range(), shared)] if shared else []
    parts += [best(*layout.expert_range(e), blocks) for e in range(layout.num_experts)]
    kept = torch.cat(parts)
    narrow = ExpertLayout(
        intermediate_size=len(kept),
        num_experts=layout.num_experts,
        num_shared_experts=layout.num_shared_experts,
        shared_intermediate_size=shared * block_size,
    )
    return kept, narrow


def _shared_blocks(layout: ExpertLayout, blocks: int, keep_ratio: float, block_size: int) -> int:
    width, count = layout.shared_width, layout.num_shared_experts
    if not width or blocks * block_size == layout.expert_width:
        return width // block_size
    if count and count * (layout.intermediate_size // (layout.num_experts + count)) == width:
        return min(count * blocks, width // block_size)
    return max(1, round(keep_ratio * width / block_size))


def check_experts(layout: ExpertLayout, *, budget: Budget, block_size: int, where: str) -> None:
    """Raises ValueError unless experts can be made narrower as is asked for."""
    widths = [width for width in (layout.shared_width, layout.expert_width) if width]
    if any(width % block_size for width in widths):
        raise ValueError(
            f"{where}: block_size must divide the {' and '.join(map(str, widths))} neurons of an "
            f"expert, got {block_size}"
        )
    if budget is not Budget.UNIFORM:
        raise ValueError(
            f"{where}: budget must be 'uniform' for sparse FFNs, whose experts have one width, "
            f"got {budget.value!r}"
        )
