# SPDX-License-Identifier: Apache-2.0
"""What a swap changed, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_unified.checkpoint.report import Report, format_layers, format_table
from sparse_unified.nn import SparseMoE
from sparse_unified.swap.find import Target


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
class SwapReport(Report):
    """What `apply_moe_`, `load_moe_` or `restore_` changed; `str()` gives a table."""

    action: str
    layers: tuple[SwappedLayer, ...]

    def to_text(self) -> str:
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


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
