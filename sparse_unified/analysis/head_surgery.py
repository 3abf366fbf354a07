# SPDX-License-Identifier: Apache-2.0
"""Fewer attention heads for models that are known by their adapter alone.

A group is a key head with the query heads that read it; whole groups go, with their queries, keys,
values and columns of the output projection, so that a cache gets smaller too. An attention is read
from its projections, which come in two ways:

    q_proj, k_proj, v_proj, o_proj      one linear layer each
    query_key_value, dense              rows of all query heads, then key, then value heads
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified.analysis.adapter import Adapter
from sparse_unified.experts import check_scores, head_magnitude_scores

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = ("query_key_value", "dense")
# What attentions call their numbers of heads.
_QUERY_COUNTS = ("num_heads", "num_attention_heads")
_KEY_COUNTS = ("num_key_value_heads",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The heads of one attention.

    Attributes:
        module: the attention.
        inputs: of the query, key and value projection: the linear layer, and the first of its rows.
        output: the output projection.
        head_dim: channels of a head. num_groups: key heads G. queries: query heads of each.
    """

    layer: int
    module: nn.Module
    inputs: tuple[tuple[nn.Linear, int], ...]
    output: nn.Linear
    head_dim: int
    num_groups: int
    queries: int

    def scores(self) -> Tensor:
        """Returns the importance [G] of the groups by weight magnitude, fp32."""
        values, start = self.inputs[2]
        rows = values.weight[start : start + self.num_groups * self.head_dim].detach()
        columns = self.output.weight.detach()
        found = head_magnitude_scores(
            rows.unflatten(0, (self.num_groups, -1)), columns.unflatten(1, (self.num_groups, -1))
        )
        check_scores(found, self.num_groups, where=f"heads: layer {self.layer}")
        return found

    def text(self, groups: int | None = None) -> str:
        """Returns how many heads `groups` of the groups have, in words."""
        count = self.num_groups if groups is None else groups
        return f"{count * self.queries} query heads, {count} key heads"


def read_attention(adapter: Adapter, component: str, layer: int) -> Attention:
    """Finds out which heads the attention of a layer has.

    Raises:
        ValueError: its projections are not plain linear layers under known names, do not divide
            into heads of `head_dim`, or it has weights whose heads are unknown.
    """
    module = adapter.block(layer, component).attention
    at = f"heads: layer {layer}: attention"
    names = next(
        (
            names
            for names in (_SEPARATE, _FUSED)
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
        ),
        None,
    )
    head_dim = getattr(module, "head_dim", None)
    if names is None or type(head_dim) is not int or head_dim < 1:
        children = ", ".join(name for name, _ in module.named_children()) or "nothing"
        raise ValueError(
            f"{at} must have head_dim and the linear layers {', '.join(_SEPARATE)} or "
            f"{', '.join(_FUSED)}, got a {type(module).__name__} with {children}"
        )
    linears: list[nn.Linear] = [getattr(module, name) for name in names]
    output = linears[-1]
    num_queries = output.in_features // head_dim
    if names is _SEPARATE:
        num_groups = linears[1].out_features // head_dim
        starts = (0, 0, 0)
        inputs = tuple(zip(linears[:3], starts, strict=True))
        rows = [linear.out_features for linear in linears[:3]]
    else:
        num_groups = getattr(module, "num_key_value_heads", 0)
        starts = (0, num_queries * head_dim, (num_queries + num_groups) * head_dim)
        inputs = tuple((linears[0], start) for start in starts)
        rows = [num_queries * head_dim, *[num_groups * head_dim] * 2]
        if linears[0].out_features != sum(rows):
            num_groups = 0
    fits = num_groups and num_queries % num_groups == 0
    if not fits or rows != [n * head_dim for n in (num_queries, num_groups, num_groups)]:
        raise ValueError(
            f"{at} must have whole groups of heads of {head_dim} channels, got "
            f"{', '.join(f'{name} {list(getattr(module, name).weight.shape)}' for name in names)}"
        )
    _check_rest(module, linears, head_dim, at)
    counts = ((_QUERY_COUNTS, num_queries), (_KEY_COUNTS, num_groups))
    for name, value in ((name, value) for listed, value in counts for name in listed):
        if getattr(module, name, value) != value:
            raise ValueError(
                f"{at}: {name} must be {value} as its weights say, got {getattr(module, name)}"
            )
    return Attention(
        layer=layer,
        module=module,
        inputs=inputs,
        output=output,
        head_dim=head_dim,
        num_groups=num_groups,
        queries=num_queries // num_groups,
    )


@contextmanager
def fewer_heads(
    attentions: Sequence[Attention], kept: Mapping[int, Sequence[int]]
) -> Iterator[None]:
    """Inside, attentions have only the groups they are given: their weights are shorter tensors.

    Args:
        kept: `{layer: ascending groups}`.
    """
    planned = [(a, kept[a.layer]) for a in attentions if a.layer in kept]
    linears = {id(x): x for a, _ in planned for x in (*(x for x, _ in a.inputs), a.output)}
    saved: list[tuple[Any, str, Any]] = []
    for linear in linears.values():
        saved += [
            (linear._parameters, name, linear._parameters[name]) for name in ("weight", "bias")
        ]
        saved += [(linear.__dict__, n, getattr(linear, n)) for n in ("in_features", "out_features")]
    for attention, _ in planned:
        own = attention.module.__dict__
        saved += [(own, n, own[n]) for n in (*_QUERY_COUNTS, *_KEY_COUNTS) if n in own]
    try:
        for attention, groups in planned:
            _narrow(attention, groups)
        yield
    finally:
        for holder, name, value in saved:
            holder[name] = value


def _narrow(attention: Attention, groups: Sequence[int]) -> None:
    size = attention.head_dim
    queries = _spread(groups, attention.queries * size)
    keys = _spread(groups, size)
    rows: dict[nn.Linear, list[Tensor]] = {}
    for (linear, start), index in zip(attention.inputs, (queries, keys, keys), strict=True):
        rows.setdefault(linear, []).append(start + index)
    for linear, parts in rows.items():
        _select(linear, 0, torch.cat(parts))
    _select(attention.output, 1, queries)
    for names, count in (
        (_QUERY_COUNTS, len(groups) * attention.queries),
        (_KEY_COUNTS, len(groups)),
    ):
        for name in names:
            if name in attention.module.__dict__:
                setattr(attention.module, name, count)


def _spread(units: Sequence[int], width: int) -> Tensor:
    """Returns the channels [units * width] of the given groups."""
    return (torch.tensor(list(units))[:, None] * width + torch.arange(width)).flatten()


def _select(linear: nn.Linear, dim: int, index: Tensor) -> None:
    """Leaves some of the outputs (dim 0) or inputs (dim 1) of a linear layer."""
    for name, old in list(linear._parameters.items()):
        if old is not None and (dim == 0 or name == "weight"):
            values = old.detach().index_select(dim, index.to(old.device))
            linear._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _check_rest(module: nn.Module, linears: Sequence[nn.Linear], head_dim: int, at: str) -> None:
    """Raises ValueError for weights that may belong to heads in a way that nothing tells."""
    known = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in known and list(parameter.shape) != [head_dim]:
            raise ValueError(
                f"{at} must have no weights beside its projections but norms [{head_dim}] of a "
                f"head, got {name} {list(parameter.shape)}"
            )
