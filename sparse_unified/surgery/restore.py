# SPDX-License-Identifier: Apache-2.0
"""restore_: undoes swaps and prunings, the latest or all of them."""

from __future__ import annotations

import torch

from sparse_unified._common import context
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.decoder import find_decoder
from sparse_unified.surgery.exchange import (
    Change,
    all_or_nothing,
    follow,
    is_unmoved_meta,
    put_back,
    undo_log,
)
from sparse_unified.surgery.report import PrunedPart, SwapReport, describe_swap, part_entries


@torch.no_grad()
def restore_(model: object, *, latest: bool = False) -> SwapReport:
    """Puts back everything that swaps and prunings of a live model replaced or took out.

    The modules are the very same objects, their weights bit for bit those of the moment they were
    replaced, whatever the blocks have learned since. Hooks go back, those added since included. If
    the model has changed mode, device or dtype in the meantime, they follow.

    Args:
        model: a module or pipeline.
        latest: undo the last transform alone, and leave those before it.

    Raises:
        ValueError: nothing of the model was replaced.
        RuntimeError: something was replaced with keep_dense=False, or kept on the meta device
            while the model got its weights; the model is as before.
    """
    with context("restore_"):
        decoder = find_decoder(model)
        log = undo_log(decoder.layers, decoder.path)
        if not log:
            raise ValueError(
                "model must have FFNs replaced by apply_moe_ or load_moe_, or parts pruned, "
                f"got none among the {len(decoder.layers)} layers under {decoder.path}"
            )
        last = max(step.undo.order for step in log)
        log = [step for step in log if not latest or step.undo.order == last]
        for step in log:
            if step.undo.module is None:
                raise RuntimeError(
                    f"{step.slot}: dense FFN must have been kept, got keep_dense=False at the swap"
                )
            if is_unmoved_meta(step):
                raise RuntimeError(f"{step.slot}: kept weights must hold data, got meta tensors")
    for step in log:
        follow(step)
    changes = {step: Change(step.slot, step.now, step.undo.module) for step in log}
    with all_or_nothing([*changes.values()]):
        for step in log:
            put_back(step)
        swapped = [step for step, change in changes.items() if _is_swap(change)]
        parts: list[PrunedPart] = []
        for order in sorted({step.undo.order for step in log}, reverse=True):
            parts += part_entries(
                change
                for step, change in changes.items()
                if step.undo.order == order and step not in swapped
            )
        return SwapReport(
            action="restore_",
            layers=tuple(describe_swap(changes[step]) for step in swapped),
            parts=tuple(parts),
        )


def _is_swap(change: Change) -> bool:
    """Tells whether a sparse FFN gives way to a dense one."""
    return isinstance(change.old, SparseMoE) and not isinstance(change.new, SparseMoE)
