# SPDX-License-Identifier: Apache-2.0
"""What a transform changed, layer by layer, and what the decoder layers of a live model cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from sparse_unified._common import Report, context, format_layers, format_table
from sparse_unified.checkpoint.counts import Counts, count_weight, format_counts
from sparse_unified.checkpoint.keys import SUFFIXES, attention_modules, ffn_modules
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import is_packed
from sparse_unified.surgery.decoder import Decoder, find_decoder
from sparse_unified.surgery.exchange import Slot, like
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
        parameters_before, parameters_after: of the part and its norm.
    """

    layer: int
    component: str
    part: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int


# Heading -> field of an entry; one that ends in "_" stands for what was before and what is after.
_SWAPPED = {
    "layer": "layer",
    "module": "path",
    "before": "before",
    "after": "after",
    "experts": "num_experts",
    "active": "top_k",
    "width": "expert_width",
    "shared": "shared_width",
    "parameters": "parameters_",
    "used per token": "active_",
    "backend": "backend",
}
_PRUNED = {name: name for name in ("layer", "component", "part", "before", "after")}
_PRUNED["parameters"] = "parameters_"


def _cell(entries: Sequence[object], field: str) -> object:
    if not field.endswith("_"):
        return getattr(entries[0], field)
    sums = [sum(getattr(entry, field + end) for entry in entries) for end in ("before", "after")]
    return " -> ".join(f"{value:,}" for value in dict.fromkeys(sums))


def _rows(entries: Sequence[object], columns: Mapping[str, str]) -> list[Sequence[object]]:
    return [[_cell([entry], field) for field in columns.values()] for entry in entries]


def _where(entries: Iterable[tuple[str, int]]) -> str:
    layers: dict[str, list[int]] = {}
    for name, layer in entries:
        layers.setdefault(name, []).append(layer)
    return "; ".join(f"{name} {format_layers(sorted(own))}" for name, own in layers.items())


def _parts_title(action: str, parts: Sequence[PrunedPart]) -> str:
    where = _where((f"{entry.component} {entry.part}", entry.layer) for entry in parts)
    return f"{action}: {len(parts)} parts changed ({where})"


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
        return _parts_title(self.action, self.parts)

    def headings(self) -> Sequence[str]:
        return tuple(_PRUNED)

    def table(self) -> Sequence[Sequence[object]]:
        return _rows(self.parts, _PRUNED)

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
        where = _where((entry.component, entry.layer) for entry in self.layers)
        parameters, active = (_cell(self.layers, name) for name in ("parameters_", "active_"))
        return (
            f"{self.action}: {len(self.layers)} FFNs changed ({where}); "
            f"parameters {parameters}, used per token {active}"
        )

    def headings(self) -> Sequence[str]:
        return tuple(_SWAPPED)

    def table(self) -> Sequence[Sequence[object]]:
        return _rows(self.layers, _SWAPPED)

    def to_text(self) -> str:
        texts = [Report.to_text(self)] if self.layers else []
        if self.parts:
            rows = [tuple(_PRUNED), *_rows(self.parts, _PRUNED)]
            texts += [_parts_title(self.action, self.parts), format_table(rows, header=True)]
        return "\n".join(texts)


class Part(NamedTuple):
    """An attention or FFN of a decoder layer, with its norm, as it is now."""

    slot: Slot
    module: nn.Module | None
    text: str
    counts: Counts


Census = dict[tuple[int, str, str], Part]  # by layer, component, and "attention" or "ffn"


def take_census(decoder: Decoder) -> Census:
    """Returns what the layers of a decoder have; parts without a place in them are left out."""
    found: Census = {}
    for layer in range(len(decoder.layers)):
        for component in SUFFIXES:
            parts = {"attention": attention_modules(component), "ffn": ffn_modules(component)}
            for part, names in parts.items():
                slots = [slot for name in names if (slot := decoder.slot(layer, name)) is not None]
                if slots:
                    counts = sum((_count(slot) for slot in slots), Counts())
                    text = _attention_text(slots) if part == "attention" else _ffn_text(slots[-1])
                    found[layer, component, part] = Part(slots[-1], slots[-1].module, text, counts)
    return found


def _count(slot: Slot) -> Counts:
    """Returns what one module of a decoder layer costs."""
    counts = Counts()
    if slot.module is None:
        return counts
    for path, weight in slot.module.named_parameters():
        inner = path.rpartition(".")[0] or slot.name.removesuffix(SUFFIXES["gen"])
        counts += count_weight(inner.rpartition(".")[2], weight.dtype, weight.shape)
        counts += Counts(bytes=stored_bytes(weight) - weight.numel() * weight.dtype.itemsize)
    if isinstance(slot.module, SparseMoE):
        counts += Counts(flops_per_token=-2 * _idle(slot.module))
    return counts


def _idle(block: SparseMoE) -> int:
    """Returns how many weights of a block a token does not use."""
    return 3 * block.hidden_size * block.layout.expert_width * (block.num_experts - block.top_k)


def stored_bytes(weight: Tensor) -> int:
    """Returns the bytes that a plain or packed weight takes."""
    if not is_packed(weight):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(getattr(weight, name).nbytes for name in names)


def _attention_text(slots: Sequence[Slot]) -> str:
    projections = [slot for slot in slots if slot.name.startswith(("q_proj", "k_proj"))]
    rows = [like(slot.module).shape[0] for slot in projections if slot.module is not None]  # type: ignore
    if len(rows) < 2:
        return "skipped"
    head_dim = getattr(projections[0].owner, "head_dim", 1)
    return f"{rows[0] // head_dim} query heads, {rows[1] // head_dim} key heads"


def _ffn_text(slot: Slot) -> str:
    ffn = slot.module
    if ffn is None or isinstance(ffn, Skipped):
        return "skipped"
    if isinstance(ffn, SparseMoE):
        return f"{ffn.num_experts} experts of {ffn.layout.expert_width} neurons"
    down_proj = getattr(getattr(ffn, "down_proj", None), "weight", None)
    return f"{0 if down_proj is None else down_proj.shape[1]} neurons"


def swaps(before: Census, after: Census) -> tuple[SwappedLayer, ...]:
    """Returns the FFNs that became sparse, or dense again."""
    return tuple(
        _swapped(*at[:2], old, after[at])
        for at, old in before.items()
        if isinstance(old.module, SparseMoE) != isinstance(after[at].module, SparseMoE)
    )


def _swapped(layer: int, component: str, old: Part, new: Part) -> SwappedLayer:
    restored = isinstance(old.module, SparseMoE)
    block = old.module if restored else new.module
    assert isinstance(block, SparseMoE)
    ffns = [part.module for part in (old, new)]
    sizes = [sum(w.numel() for w in ffn.parameters()) if ffn else 0 for ffn in ffns]
    active = [n - (_idle(block) if ffn is block else 0) for n, ffn in zip(sizes, ffns, strict=True)]
    return SwappedLayer(
        layer=layer,
        component=component,
        path=new.slot.path,
        before=type(old.module).__name__,
        after=type(new.module).__name__,
        num_experts=block.num_experts,
        top_k=block.top_k,
        num_shared_experts=block.num_shared_experts,
        expert_width=block.layout.expert_width,
        shared_width=block.layout.shared_width,
        backend="dense" if restored else block.active_backend,
        parameters_before=sizes[0],
        parameters_after=sizes[1],
        active_before=active[0],
        active_after=active[1],
    )


def pruned(before: Census, after: Census) -> tuple[PrunedPart, ...]:
    """Returns the parts that became smaller, went or came back; swaps are not among them."""
    return tuple(
        PrunedPart(
            layer=layer,
            component=component,
            part=part,
            before=old.text,
            after=new.text,
            parameters_before=old.counts.parameters,
            parameters_after=new.counts.parameters,
        )
        for (layer, component, part), old in before.items()
        if (new := after[layer, component, part]).text != old.text
        and isinstance(old.module, SparseMoE) == isinstance(new.module, SparseMoE)
    )


def total(census: Census, components: Sequence[str]) -> Counts:
    """Returns what the decoder layers of components cost together."""
    own = (part.counts for (_, component, _), part in census.items() if component in components)
    return sum(own, Counts())


def count_parameters(model: object) -> dict[str, Counts]:
    """Returns what the decoder layers of each component of a live model cost.

    Args:
        model: a module or pipeline, as `apply_moe_` takes it, swapped or not.

    Raises:
        ValueError: it has no decoder layers of a known structure.
    """
    with context("count_parameters"):
        census = take_census(find_decoder(model))
    return {component: total(census, [component]) for component in SUFFIXES}
