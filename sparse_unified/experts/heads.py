# SPDX-License-Identifier: Apache-2.0
"""Which heads stay when components drop query heads of one attention.

A group is a key head with the query heads that read it. The components of a layer share the key
heads, so a group's keys and values go only when no component asks for them any more; until then
the component that dropped the group merely stops reading them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """What stays of an attention; everything ascends.

    Attributes:
        key_heads: key heads that stay, of those before.
        query_groups: `{component: groups that stay, of its groups before}`.
        reads: `{component: the key head each of its groups reads}`, of those that stay.
    """

    key_heads: tuple[int, ...]
    query_groups: Mapping[str, tuple[int, ...]]
    reads: Mapping[str, tuple[int, ...]]


def plan_heads(reads: Mapping[str, Sequence[int]], kept: Mapping[str, Sequence[int]]) -> HeadPlan:
    """Plans which heads stay.

    Args:
        reads: `{component: the key head each of its groups reads}`, of those with an attention.
        kept: `{component: which of its groups stay}`; those not named keep all.
    """
    groups = {name: tuple(kept.get(name, range(len(heads)))) for name, heads in reads.items()}
    still = {name: [reads[name][group] for group in own] for name, own in groups.items()}
    key_heads = sorted({head for heads in still.values() for head in heads})
    return HeadPlan(
        key_heads=tuple(key_heads),
        query_groups=groups,
        reads={name: tuple(map(key_heads.index, heads)) for name, heads in still.items()},
    )
