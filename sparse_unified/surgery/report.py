# SPDX-License-Identifier: Apache-2.0
"""What a transform changed, layer by layer, and what the decoder layers of a live model cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_unified._common import Report, context, format_layers, format_table
from sparse_unified.checkpoint.counts import Counts, count_weight, format_counts
from sparse_unified.checkpoint.keys import (
    COMPONENT_OF_FFN,
    SUFFIXES,
    attention_modules,
    ffn_modules,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import is_packed
from sparse_unified.surgery.decoder import Decoder, find_decoder
from sparse_unified.surgery.exchange import Change, like
from sparse_unified.surgery.ffn import Skipped


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

    def title(self) -> str:
        return f"{self.action}: {_summary(self.parts)}"

    def headings(self) -> Sequence[str]:
        return _PART_HEADINGS

    def table(self) -> Sequence[Sequence[object]]:
        return _part_rows(self.parts)

    def notes(self) -> Sequence[str]:
        return format_counts(self.before, self.after).splitlines()


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

    def title(self) -> str:
        counts = [sum(getattr(entry, name) for entry in self.layers) for name in _COUNTS]
        by_component: dict[str, list[int]] = {}
        for entry in self.layers:
            by_component.setdefault(entry.component, []).append(entry.layer)
        where = "; ".join(f"{name} {format_layers(ls)}" for name, ls in by_component.items())
        return (
            f"{self.action}: {len(self.layers)} FFNs changed ({where}); "
            f"parameters {_change(*counts[:2])}, used per token {_change(*counts[2:])}"
        )

    def headings(self) -> Sequence[str]:
        return (*_SWAPPED.values(), "parameters", "used per token", "backend")

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (
                *(getattr(entry, name) for name in _SWAPPED),
                _change(entry.parameters_before, entry.parameters_after),
                _change(entry.active_before, entry.active_after),
                entry.backend,
            )
            for entry in self.layers
        ]

    def to_text(self) -> str:
        texts = [Report.to_text(self)] if self.layers else []
        if self.parts:
            rows = [_PART_HEADINGS, *_part_rows(self.parts)]
            texts += [f"{self.action}: {_summary(self.parts)}", format_table(rows, header=True)]
        return "\n".join(texts)


_COUNTS = ("parameters_before", "parameters_after", "active_before", "active_after")
# Field of a `SwappedLayer` -> its heading.
_SWAPPED = {
    "layer": "layer",
    "path": "module",
    "before": "before",
    "after": "after",
    "num_experts": "experts",
    "top_k": "active",
    "expert_width": "width",
    "shared_width": "shared",
}


def describe_swap(change: Change) -> SwappedLayer:
    """Returns the entry of a dense FFN that became sparse, or the other way round."""
    restored = not isinstance(change.new, SparseMoE)
    block = change.old if restored else change.new
    assert isinstance(block, SparseMoE)
    layout, hidden = block.layout, block.hidden_size
    dense = 3 * hidden * layout.intermediate_size
    sparse = sum(weight.numel() for weight in block.parameters())
    active = sparse - 3 * hidden * layout.expert_width * (block.num_experts - block.top_k)
    counts = ((sparse, dense), (active, dense)) if restored else ((dense, sparse), (dense, active))
    return SwappedLayer(
        layer=change.slot.layer,
        component=COMPONENT_OF_FFN[change.slot.name],
        path=change.slot.path,
        before=type(change.old).__name__,
        after=type(change.new).__name__,
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


def part_entries(changes: Iterable[Change]) -> tuple[PrunedPart, ...]:
    """Returns the entries of exchanged modules, one for each part of a layer."""
    groups: dict[tuple[int, str, str], list[Change]] = {}
    for change in changes:
        name, layer = change.slot.name, change.slot.layer
        component = "gen" if name.endswith(SUFFIXES["gen"]) else "und"
        inner = {module.rpartition(".")[2] for module in attention_modules(component)}
        part = "attention" if name in inner else "ffn"
        groups.setdefault((layer, component, part), []).append(change)
    entries = []
    for (layer, component, part), own in sorted(groups.items(), key=lambda item: item[0]):
        names = [change.slot.name.removesuffix(SUFFIXES[component]) for change in own]
        old = dict(zip(names, (change.old for change in own), strict=True))
        new = dict(zip(names, (change.new for change in own), strict=True))
        owners = dict(zip(names, (change.slot.owner for change in own), strict=True))
        entries.append(
            PrunedPart(
                layer=layer,
                component=component,
                part=part,
                before=_text(part, old, owners),
                after=_text(part, new, owners),
                parameters_before=_parameters(old),
                parameters_after=_parameters(new),
            )
        )
    return tuple(entries)


_Side = Mapping[str, nn.Module | None]


def _parameters(side: _Side) -> int:
    modules = [module for module in side.values() if module is not None]
    return sum(weight.numel() for module in modules for weight in module.parameters())


def _text(part: str, side: _Side, owners: Mapping[str, nn.Module]) -> str:
    if part == "ffn":
        return _ffn_text(side["mlp"])
    query, key = side["q_proj"], side["k_proj"]
    if query is None or key is None:
        return "skipped"
    head_dim = owners["q_proj"].head_dim
    counts = [like(module).shape[0] // head_dim for module in (query, key)]  # type: ignore
    return f"{counts[0]} query heads, {counts[1]} key heads"


def _ffn_text(ffn: nn.Module | None) -> str:
    if ffn is None or isinstance(ffn, Skipped):
        return "skipped"
    if isinstance(ffn, SparseMoE):
        return f"{ffn.num_experts} experts of {ffn.layout.expert_width} neurons"
    down_proj = getattr(getattr(ffn, "down_proj", None), "weight", None)
    return f"{0 if down_proj is None else down_proj.shape[1]} neurons"


def _summary(parts: Sequence[PrunedPart]) -> str:
    layers: dict[str, list[int]] = {}
    for entry in parts:
        layers.setdefault(f"{entry.component} {entry.part}", []).append(entry.layer)
    where = "; ".join(f"{name} {format_layers(sorted(ls))}" for name, ls in layers.items())
    return f"{len(parts)} parts changed ({where})"


_PART_HEADINGS = ("layer", "component", "part", "before", "after", "parameters")


def _part_rows(parts: Sequence[PrunedPart]) -> list[Sequence[object]]:
    return [
        (
            entry.layer,
            entry.component,
            entry.part,
            entry.before,
            entry.after,
            _change(entry.parameters_before, entry.parameters_after),
        )
        for entry in parts
    ]


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def count_parameters(model: object) -> dict[str, Counts]:
    """Returns what the decoder layers of each component of a live model cost.

    Args:
        model: a module or pipeline, as `apply_moe_` takes it, swapped or not.

    Raises:
        ValueError: it has no decoder layers of a known structure.
    """
    with context("count_parameters"):
        decoder = find_decoder(model)
    return {component: count_component(decoder, component) for component in SUFFIXES}


def count_component(decoder: Decoder, component: str) -> Counts:
    """Returns what the decoder layers of one component cost."""
    counts = Counts()
    for layer in range(len(decoder.layers)):
        for name in (*attention_modules(component), *ffn_modules(component)):
            slot = decoder.slot(layer, name)
            if slot is not None and slot.module is not None:
                role = name.rpartition(".")[2].removesuffix(SUFFIXES["gen"])
                counts += _count_module(slot.module, role)
    return counts


def _count_module(module: nn.Module, role: str) -> Counts:
    """Returns what one module of a decoder layer costs; `role` says what it is, as in `q_proj`."""
    counts = Counts()
    for path, weight in module.named_parameters():
        inner = path.rpartition(".")[0] or role
        counts += count_weight(inner.rpartition(".")[2], weight.dtype, weight.shape)
        if is_packed(weight):
            unpacked_bytes = weight.numel() * weight.dtype.itemsize
            counts += Counts(bytes=stored_bytes(weight) - unpacked_bytes)
    if isinstance(module, SparseMoE):
        idle = module.num_experts - module.top_k
        flops = 2 * 3 * module.hidden_size * module.layout.expert_width * idle
        counts += Counts(flops_per_token=-flops)
    return counts


def stored_bytes(weight: Tensor) -> int:
    """Returns the bytes that a plain or packed weight takes."""
    if not is_packed(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(getattr(weight, name).nbytes for name in names)
