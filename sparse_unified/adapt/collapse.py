# SPDX-License-Identifier: Apache-2.0
"""Whether the routers of a run still choose: experts that all tokens use, or none, at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparse_unified.analysis.expert_usage import ExpertUsage, layer_usage

logger = logging.getLogger(__name__)

# Of the tokens of the last tenth of the steps: an expert with less is used by none, with more by
# all of them.
_NONE, _ALL = 0.01, 0.99


def judge_routers(steps: Sequence[Mapping[str, Any]], top_k: int | None) -> tuple[str, ...]:
    """Returns what to tell of the use of experts; warns, with a table, where routers collapsed.

    Args:
        steps: of a log, with the `expert_load` of each.
        top_k: experts per token; None of a dense model, of which nothing is told.
    """
    last = [step["expert_load"] for step in steps if "expert_load" in step]
    last = last[-max(1, len(steps) // 10) :]
    if top_k is None or not last:
        return ()
    rows, fallen = [], []
    for name in last[-1]:
        component, layer = name.split(".")
        load = torch.tensor([step[name] for step in last]).sum(0)
        if not load.any():
            continue
        own = layer_usage(component, int(layer), top_k, torch.stack([load, load * 0]))
        rows.append(own)
        none = sum(share < _NONE for share in own["share"])
        full = sum(share > _ALL for share in own["share"])
        if own["num_experts"] > top_k and (none or full):
            count = own["num_experts"]
            fallen.append(f"{name}: {none} of {count} experts used by no token, {full} by all")
    if not rows:
        return ()
    entropies = [own["entropy"] for own in rows]
    told = (
        f"experts: entropy of the load {sum(entropies) / len(rows):.3f} (least "
        f"{min(entropies):.3f}, even is 1)"
    )
    if not fallen:
        return (told,)
    logger.warning(
        "routers have collapsed in %d of %d blocks: experts are used by no token or by all of "
        "them, which is a static choice; start from fitted routers (--router-init activation), or "
        "balance more (--balance-rate 0.01, or a larger --balance-weight)",
        *(len(fallen), len(rows)),
    )
    usage = ExpertUsage(task="training", samples=len(last), ranges=("all",), layers=tuple(rows))
    table = usage.to_text().splitlines()[2:]  # without its title
    return (told, "collapsed routers:", *(f"  {line}" for line in fallen), "", *table)
