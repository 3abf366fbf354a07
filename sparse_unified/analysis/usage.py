# SPDX-License-Identifier: Apache-2.0
"""How evenly the experts of sparse blocks are used, and how that changes over denoising."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import format_table
from sparse_unified.analysis.activation import NO_TIME


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUsage:
    """Which experts the tokens of one block chose, range of time by range of time.

    Range 0 holds the tokens that have no time: text, ViT tokens, and finished images (t = 0). Range
    r of R holds the times ((r - 1) / R, r / R], 1 being noise.

    Attributes:
        component, layer: the block.
        top_k: K, experts a token uses.
        tokens: [R + 1] int64, tokens that ran through it.
        load: [R + 1, E] int64, tokens that chose each expert; a row sums to K times its tokens.
    """

    component: str
    layer: int
    top_k: int
    tokens: Tensor
    load: Tensor

    @property
    def num_experts(self) -> int:
        return self.load.shape[1]

    def share(self) -> Tensor:
        """Returns the share of all tokens that chose each expert, [E] fp64; even is K / E."""
        return self.load.sum(0).double() / self.tokens.sum()

    def range_share(self) -> Tensor:
        """Returns the same in each range, [R + 1, E] fp64; NaN without tokens."""
        return self.load.double() / self.tokens[:, None]

    def entropy(self) -> float:
        """Returns the entropy of the load over log E: 1 is even; NaN without tokens."""
        return float(_entropy(self.load.sum(0)[None])[0])

    def range_entropy(self) -> Tensor:
        """Returns the same in each range, [R + 1] fp64."""
        return _entropy(self.load)

    def dead_experts(self) -> list[int]:
        """Returns the experts that no token chose; none where there were no tokens."""
        unused = (self.load.sum(0) == 0) & bool(self.tokens.sum() > 0)
        return [int(expert) for expert in unused.nonzero()[:, 0]]

    def change(self) -> Tensor:
        """Returns how far the load moves between successive ranges of time, [R - 1] fp64.

        Entry r - 1 is the total variation distance of the loads in ranges r and r + 1: the share of
        the choices that go to other experts, 0 to 1; NaN where a range has no tokens.
        """
        shares = self.load[1:].double() / self.load[1:].sum(1, keepdim=True)
        return (shares.diff(dim=0).abs().sum(1)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, None for NaN."""
        return {
            "component": self.component,
            "layer": self.layer,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.tokens.tolist(),
            "load": self.load.tolist(),
            "share": _plain(self.share()),
            "entropy": _plain(torch.tensor([self.entropy()]))[0],
            "range_entropy": _plain(self.range_entropy()),
            "dead_experts": self.dead_experts(),
            "change": _plain(self.change()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUsage:
    """The blocks of a model on one task.

    Attributes:
        task: what the model did.
        samples: how many samples ran.
        num_time_ranges: R.
        layers: one entry per block, component by component.
    """

    task: str
    samples: int
    num_time_ranges: int
    layers: tuple[LayerUsage, ...]

    def of(self, component: str) -> list[LayerUsage]:
        """Returns the blocks of a component."""
        return [entry for entry in self.layers if entry.component == component]

    def range_names(self) -> list[str]:
        """Names the ranges in the order of rows: without time, then from image to noise."""
        count = self.num_time_ranges
        return [NO_TIME, *(f"{r / count:.3g}-{(r - 1) / count:.3g}" for r in range(1, count + 1))]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {
            "task": self.task,
            "samples": self.samples,
            "ranges": self.range_names(),
            "layers": [entry.to_dict() for entry in self.layers],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self) -> str:
        """Returns a table with a row per block."""
        rows: list[tuple[object, ...]] = [
            ("layer", "tokens", "experts", "entropy", "least", "most", "dead", "change over time")
        ]
        for entry in self.layers:
            share, change = entry.share(), entry.change()
            change = change[~change.isnan()]
            rows.append(
                (
                    f"{entry.component} {entry.layer}",
                    int(entry.tokens.sum()),
                    f"{entry.top_k} of {entry.num_experts}",
                    _number(entry.entropy()),
                    _percent(float(share.min())),
                    _percent(float(share.max())),
                    len(entry.dead_experts()),
                    _number(float(change.mean()) if len(change) else math.nan),
                )
            )
        notes = [
            "entropy: of the load, 1 is even; least, most: tokens that use an expert;",
            "dead: experts that no token uses; change: choices that move between times",
        ]
        head = f"{self.task}, {self.samples} samples"
        return "\n".join([head, "", format_table(rows, header=True), "", *notes])


def _entropy(load: Tensor) -> Tensor:
    """[n, E] -> [n] fp64, over log E; NaN of an empty load, 1 of a single expert."""
    shares = load.double() / load.sum(1, keepdim=True)
    if load.shape[1] == 1:
        return shares[:, 0]
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(load.shape[1])


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
