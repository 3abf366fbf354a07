# SPDX-License-Identifier: Apache-2.0
"""Transforms as a whole: what they changed, part by part, what layers cost, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import Report, context, format_layers
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.keys import SUFFIXES, Counts, format_counts
from sparse_unified.nn import SparseMoE
from sparse_unified.nn.expert_state import is_packed
from sparse_unified.surgery.decoder import Decoder, find_decoder
from sparse_unified.surgery.exchange import Slot, like, transformed, undo
from sparse_unified.surgery.ffn import Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedPart:
    """An attention or FFN of a decoder layer that became another one.

    Attributes:
        part: "ffn" or "attention".
        path: of the module, from the object given.
        before, after: what it is, as in "96 neurons", "2 of 4 experts of 24 neurons" with what runs
            them (see `SparseMoE.active_backend`), "4 query heads, 2 key heads" or "skipped".
        counts_before, counts_after: what it costs, with its norm.
    """

    layer: int
    component: str
    part: str
    path: str
    before: str
    after: str
    counts_before: Counts
    counts_after: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class SurgeryReport(Report):
    """What a transform or `restore_` changed in a live model; `str()` gives a table.

    Attributes:
        action: the function.
        parts: what changed, by layer.
        before, after: `{component: Counts}` of all decoder layers, see `count_parameters`.
    """

    action: str
    parts: tuple[ChangedPart, ...]
    before: dict[str, Counts]
    after: dict[str, Counts]

    def title(self) -> str:
        where: dict[str, list[int]] = {}
        for entry in self.parts:
            where.setdefault(f"{entry.component} {entry.part}", []).append(entry.layer)
        listed = "; ".join(f"{name} {format_layers(layers)}" for name, layers in where.items())
        return f"{self.action}: {len(self.parts)} parts changed ({listed or 'none'})"

    def headings(self) -> Sequence[str]:
        return "layer", "component", "part", "before", "after", "parameters"

    def table(self) -> Sequence[Sequence[object]]:
        rows = []
        for e in self.parts:
            sizes = dict.fromkeys(f"{c.parameters:,}" for c in (e.counts_before, e.counts_after))
            rows.append((e.layer, e.component, e.part, e.before, e.after, " -> ".join(sizes)))
        return rows

    def notes(self) -> Sequence[str]:
        tables = [
            f"{component}\n{format_counts(before, self.after[component])}"
            for component, before in self.before.items()
            if before != self.after[component]
        ]
        return "\n".join(tables).splitlines()


# What an attention or FFN with its norm is, in words, and costs: by layer, component, and which.
Census = dict[tuple[int, str, str], tuple[str, Counts]]


def take_census(decoder: Decoder) -> Census:
    """Returns what the layers of a decoder have; parts without a place in them are left out."""
    found: Census = {}
    for layer in range(len(decoder.layers)):
        for component in SUFFIXES:
            for part, names in (
                ("attention", keys.attention_modules(component)),
                ("ffn", keys.ffn_modules(component)),
            ):
                slots = [slot for name in names if (slot := decoder.slot(layer, name)) is not None]
                if slots:
                    text = _attention_text(slots) if part == "attention" else _ffn_text(slots[-1])
                    found[layer, component, part] = text, sum(map(_count, slots), Counts())
    return found


def _count(slot: Slot) -> Counts:
    counts = Counts()
    if slot.module is None:
        return counts
    for path, weight in slot.module.named_parameters():
        inner = path.rpartition(".")[0] or slot.name.removesuffix(SUFFIXES["gen"])
        counts += keys.count_weight(inner.rpartition(".")[2], weight.dtype, weight.shape)
        counts += Counts(bytes=stored_bytes(weight) - weight.numel() * weight.dtype.itemsize)
    if isinstance(slot.module, SparseMoE):
        counts += Counts(flops_per_token=-2 * slot.module.idle_parameters)
    return counts


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
    weight: Any = getattr(ffn, "down_proj", None)
    if isinstance(ffn, SparseMoE):
        width, shared = ffn.layout.expert_width, ffn.layout.shared_width
        text = f"{ffn.top_k} of {ffn.num_experts} experts of {width} neurons"
        text += (f" and {shared} shared" if shared else "") + f", {ffn.active_backend}"
    else:
        weight = getattr(weight, "weight", None)
        text = f"{0 if weight is None else weight.shape[1]} neurons"
    return text if weight is None or not is_packed(weight) else f"{text}, {type(weight).__name__}"


def report(action: str, before: Census, decoder: Decoder) -> SurgeryReport:
    """Compares the layers of a decoder with what they were."""
    after = take_census(decoder)
    parts = []
    for (layer, component, part), (text, counts) in before.items():
        new_text, new_counts = after[layer, component, part]
        if new_text != text:
            name = keys.FFN_NAMES[component] if part == "ffn" else "self_attn"
            path = f"{decoder.path}.{layer}.{name}"
            own = ChangedPart(
                layer=layer,
                component=component,
                part=part,
                path=path,
                before=text,
                after=new_text,
                counts_before=counts,
                counts_after=new_counts,
            )
            parts.append(own)
    totals = _totals(before), _totals(after)
    return SurgeryReport(action=action, parts=tuple(parts), before=totals[0], after=totals[1])


def transform(
    action: str, decoder: Decoder, change: Callable[[], object], *, keep: bool
) -> SurgeryReport:
    """Changes decoder layers as one transform, see `transformed`, and tells what became of them."""
    before = take_census(decoder)
    with transformed(decoder.layers, keep=keep):
        change()
        return report(action, before, decoder)


@torch.no_grad()
def restore_(model: object) -> SurgeryReport:
    """Puts back everything that swaps and prunings of a live model replaced or took out.

    The modules are the very same objects, their weights bit for bit those of the moment they were
    replaced, whatever the blocks have learned since. Hooks go back, those added since included. If
    the model has changed mode, device or dtype in the meantime, they follow.

    Raises:
        ValueError: nothing of the model was replaced.
        RuntimeError: something was replaced with keep_dense=False, or kept on the meta device
            while the model got its weights; the model is as before.
    """
    with context("restore_"):
        decoder = find_decoder(model)
        before = take_census(decoder)
        undo(decoder.layers)
    return report("restore_", before, decoder)


def _totals(census: Census) -> dict[str, Counts]:
    return {
        component: sum(
            (counts for at, (_, counts) in census.items() if at[1] == component), Counts()
        )
        for component in SUFFIXES
    }


def count_parameters(model: object) -> dict[str, Counts]:
    """Returns what the decoder layers of each component of a live model cost.

    Args:
        model: a module or pipeline, as `apply_moe_` takes it, swapped or not.

    Raises:
        ValueError: it has no decoder layers of a known structure.
    """
    with context("count_parameters"):
        return _totals(take_census(find_decoder(model)))
