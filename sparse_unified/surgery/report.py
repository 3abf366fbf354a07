# SPDX-License-Identifier: Apache-2.0
"""What a swap changed, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparse_unified._common import Report, format_layers, format_table
from sparse_unified.checkpoint.counts import Counts, format_counts
from sparse_unified.checkpoint.keys import SUFFIXES, attention_modules
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.exchange import Change, like
from sparse_unified.surgery.find import Target
from sparse_unified.surgery.skipped import SkippedFFN


@dataclass(frozen=True, slots=True, kw_only=True)
class SwappedLayer:
    """One replaced FFN. Counts and widths describe its sparse form.

    Attributes:
        path: of the module, from the object given.
        before, after: class names.
        expert_width, shared_width: in neurons.
        parameters_before, parameters_after: of the FFN, routers included.
        active_before, active_after: parameters one token uses: all but those of idle experts.
        backend: what runs the FFN now, see `SparseMoE.active_backend`; "dense" once restored.
    """

    layer: int
    component: str
    path: str
    before: str
    after: str
    num_experts: int
    top_k: int
    num_shared_experts: int
    expert_width: int
    shared_width: int
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int
    backend: str

    def columns(self) -> dict[str, object]:
        """Returns what a table shows of this entry, by heading."""
        return {
            "layer": self.layer,
            "module": self.path,
            "before": self.before,
            "after": self.after,
            "experts": self.num_experts,
            "active": self.top_k,
            "width": self.expert_width,
            "shared": self.shared_width,
            "parameters": _change(self.parameters_before, self.parameters_after),
            "used per token": _change(self.active_before, self.active_after),
            "backend": self.backend,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedPart:
    """One part of a layer that got smaller, went, or came back.

    Attributes:
        part: "ffn" or "attention".
        before, after: what it is, in neurons or heads: "96 neurons", "skipped".
        parameters_before, parameters_after: of the part, its norm included where that goes too.
    """

    layer: int
    component: str
    part: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport(Report):
    """What a pruning changed; `str()` gives a table.

    Attributes:
        parts: what changed, by layer.
        before, after: the decoder layers of the components that changed, all together.
    """

    action: str
    parts: tuple[PrunedPart, ...]
    before: Counts
    after: Counts

    def to_text(self) -> str:
        return (
            f"{self.action}: {_summary(self.parts)}\n{_parts_table(self.parts)}\n\n"
            + format_counts(self.before, self.after)
        )

    def __str__(self) -> str:
        return self.to_text()


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport(Report):
    """What `apply_moe_`, `load_moe_` or `restore_` changed; `str()` gives a table.

    Attributes:
        layers: FFNs that became sparse, or dense again.
        parts: what `restore_` brought back of pruned widths, heads and skipped parts.
    """

    action: str
    layers: tuple[SwappedLayer, ...]
    parts: tuple[PrunedPart, ...] = ()

    def to_text(self) -> str:
        texts = [self._layers_text()] if self.layers else []
        if self.parts:
            texts.append(f"{self.action}: {_summary(self.parts)}\n{_parts_table(self.parts)}")
        return "\n".join(texts)

    def _layers_text(self) -> str:
        counts = [
            sum(getattr(entry, name) for entry in self.layers)
            for name in ("parameters_before", "parameters_after", "active_before", "active_after")
        ]
        by_component: dict[str, list[int]] = {}
        for entry in self.layers:
            by_component.setdefault(entry.component, []).append(entry.layer)
        where = "; ".join(f"{name} {format_layers(ls)}" for name, ls in by_component.items())
        cells = [entry.columns() for entry in self.layers]
        rows: list[list[object]] = [list(cells[0]), *(list(row.values()) for row in cells)]
        return (
            f"{self.action}: {len(self.layers)} FFNs changed ({where}); "
            f"parameters {_change(*counts[:2])}, used per token {_change(*counts[2:])}\n"
            + format_table(rows, header=True)
        )

    def __str__(self) -> str:
        return self.to_text()


def describe(
    target: Target, block: SparseMoE, *, before: str, after: str, restored: bool = False
) -> SwappedLayer:
    """Returns the entry of one FFN whose sparse form is `block`."""
    layout, hidden = block.layout, block.hidden_size
    dense = 3 * hidden * layout.intermediate_size
    sparse = sum(weight.numel() for weight in block.parameters())
    active = sparse - 3 * hidden * layout.expert_width * (block.num_experts - block.top_k)
    counts = ((sparse, dense), (active, dense)) if restored else ((dense, sparse), (dense, active))
    return SwappedLayer(
        layer=target.layer,
        component=target.component,
        path=target.path,
        before=before,
        after=after,
        num_experts=block.num_experts,
        top_k=block.top_k,
        num_shared_experts=block.num_shared_experts,
        expert_width=layout.expert_width,
        shared_width=layout.shared_width,
        parameters_before=counts[0][0],
        parameters_after=counts[0][1],
        active_before=counts[1][0],
        active_after=counts[1][1],
        backend="dense" if restored else block.active_backend,
    )


def part_entries(changes: Iterable[tuple[int, Change]]) -> list[PrunedPart]:
    """Returns the entries of exchanged modules, given as (layer, exchange), one for each part."""
    groups: dict[tuple[int, str, str], list[Change]] = {}
    for layer, change in changes:
        component = "gen" if change.name.endswith(SUFFIXES["gen"]) else "und"
        inner = {name.rpartition(".")[2] for name in attention_modules(component)}
        part = "attention" if change.name in inner else "ffn"
        groups.setdefault((layer, component, part), []).append(change)
    entries = []
    for (layer, component, part), own in sorted(groups.items()):
        describe_side = _attention_text if part == "attention" else _ffn_text
        old = {c.name.removesuffix(SUFFIXES[component]): (c.owner, c.old) for c in own}
        new = {c.name.removesuffix(SUFFIXES[component]): (c.owner, c.new) for c in own}
        entries.append(
            PrunedPart(
                layer=layer,
                component=component,
                part=part,
                before=describe_side(old),
                after=describe_side(new),
                parameters_before=_parameters(old),
                parameters_after=_parameters(new),
            )
        )
    return entries


_Side = Mapping[str, tuple[nn.Module, nn.Module | None]]


def _parameters(side: _Side) -> int:
    modules = [module for _, module in side.values() if module is not None]
    return sum(weight.numel() for module in modules for weight in module.parameters())


def _ffn_text(side: _Side) -> str:
    ffn = side["mlp"][1]
    if ffn is None or isinstance(ffn, SkippedFFN):
        return "skipped"
    if isinstance(ffn, SparseMoE):
        return f"{ffn.num_experts} experts of {ffn.layout.expert_width} neurons"
    down_proj = getattr(getattr(ffn, "down_proj", None), "weight", None)
    return f"{0 if down_proj is None else down_proj.shape[1]} neurons"


def _attention_text(side: _Side) -> str:
    owner, query = side["q_proj"]
    key = side["k_proj"][1]
    if query is None or key is None:
        return "skipped"
    counts = [like(part).shape[0] // owner.head_dim for part in (query, key)]  # type: ignore
    return f"{counts[0]} query heads, {counts[1]} key heads"


def _summary(parts: Sequence[PrunedPart]) -> str:
    layers: dict[str, list[int]] = {}
    for entry in parts:
        layers.setdefault(f"{entry.component} {entry.part}", []).append(entry.layer)
    where = "; ".join(f"{name} {format_layers(sorted(ls))}" for name, ls in layers.items())
    return f"{len(parts)} parts changed ({where})"


def _parts_table(parts: Sequence[PrunedPart]) -> str:
    rows: list[Sequence[object]] = [("layer", "component", "part", "before", "after", "parameters")]
    for entry in parts:
        change = _change(entry.parameters_before, entry.parameters_after)
        rows.append((entry.layer, entry.component, entry.part, entry.before, entry.after, change))
    return format_table(rows, header=True)


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
