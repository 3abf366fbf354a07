# SPDX-License-Identifier: Apache-2.0
"""How little a layer changes what passes through it: the ranking of depth pruning.

With x1 = x + attention(norm(x)) and y = x1 + ffn(norm(x1)), for every token,

    attention = cos(x, x1)      ffn = cos(x1, y)      block = cos(x, y)

averaged over the tokens of a component: after the residual add, so that 1 is a part that changes no
direction and is the first to go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import Report, format_table
from sparse_unified.analysis.plain import from_plain
from sparse_unified.checkpoint.reader import read_json
from sparse_unified.surgery.decoder import Adapter, Block, find_adapter

PARTS = ("block", "attention", "ffn")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """Mean cosines of one layer and component over `tokens` tokens."""

    component: str
    layer: int
    tokens: int
    block: float
    attention: float
    ffn: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity(Report):
    """What `measure_similarity` has seen, component by component, layer by layer."""

    layers: tuple[LayerSimilarity, ...]

    @classmethod
    def load(cls, path: Path) -> Similarity:
        """Reads a file that holds `to_json`.

        Raises:
            ValueError: it is missing or damaged.
        """
        listed = read_json(path).get("layers")
        if not isinstance(listed, list):
            raise ValueError(f"{path}: layers must be a list, got {listed!r:.120}")
        where = f"{path}: an entry of layers"
        return cls(layers=tuple(from_plain(LayerSimilarity, entry, where) for entry in listed))

    def of(self, component: str) -> list[LayerSimilarity]:
        """Returns the layers of a component in order.

        Raises:
            ValueError: none of its layers has seen a token.
        """
        found = [entry for entry in self.layers if entry.component == component]
        if not found:
            raise ValueError(
                f"similarity: component must have seen tokens, got none for {component!r}"
            )
        return found

    def redundant(
        self,
        component: str,
        count: int,
        part: str = "block",
        layers: Sequence[int] | None = None,
    ) -> tuple[int, ...]:
        """Returns the `count` layers whose part changes the least, ascending.

        Args:
            layers: to choose among; None is all.

        Raises:
            ValueError: there are not so many, or a cosine is not a number.
        """
        entries = [e for e in self.of(component) if layers is None or e.layer in layers]
        if part not in PARTS:
            raise ValueError(f"similarity: part must be one of {', '.join(PARTS)}, got {part!r}")
        if not 0 <= count <= len(entries):
            raise ValueError(
                f"similarity: count must be from 0 to {len(entries)} layers, got {count}"
            )
        values = {entry.layer: float(getattr(entry, part)) for entry in entries}
        for layer, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"similarity: {part} of layer {layer} ({component}) must be finite, got {value}"
                )
        ranked = sorted(values, key=lambda layer: (-values[layer], layer))
        return tuple(sorted(ranked[:count]))

    def to_text(self) -> str:
        rows: list[list[object]] = [["component", "layer", *PARTS, "tokens"]]
        for entry in self.layers:
            cosines = [f"{getattr(entry, part):.4f}" for part in PARTS]
            rows.append([entry.component, entry.layer, *cosines, entry.tokens])
        return format_table(rows, header=True)


class SimilarityMeter:
    """Sums the cosines of one block while the model runs."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.tokens = 0
        self._sums: Tensor | None = None  # [3] fp64, on the device of the model
        self._stream: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every pass through the block is counted."""
        handles = [
            self.block.input_norm.register_forward_pre_hook(self._enter),
            self.block.post_attention_norm.register_forward_pre_hook(self._between),
            self.block.ffn.register_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stream.clear()

    def result(self) -> LayerSimilarity:
        """Returns the means so far."""
        assert self._sums is not None
        block, attention, ffn = (self._sums / self.tokens).tolist()
        return LayerSimilarity(
            component=self.block.component,
            layer=self.block.layer,
            tokens=self.tokens,
            block=block,
            attention=attention,
            ffn=ffn,
        )

    def _enter(self, module: object, args: tuple[Any, ...]) -> None:
        self._stream["x"] = args[0]

    def _between(self, module: object, args: tuple[Any, ...]) -> None:
        self._stream["x1"] = args[0]

    def _leave(self, module: object, args: tuple[Any, ...], output: Any) -> None:
        branch = output[0] if isinstance(output, tuple) else output
        x, x1 = (self._stream.pop(name).detach().flatten(0, -2) for name in ("x", "x1"))
        if not len(x1):
            return
        y = x1 + branch.detach().reshape(x1.shape)
        cosines = torch.stack([_cosine_sum(*pair) for pair in ((x, y), (x, x1), (x1, y))])
        self._sums = cosines if self._sums is None else self._sums + cosines
        self.tokens += len(x1)


def _cosine_sum(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1).sum(dtype=torch.float64)


class Measurement:
    """What `measure_similarity` yields; `result()` is read after the runs."""

    def __init__(self, meters: Sequence[SimilarityMeter]) -> None:
        self._meters = meters

    def result(self) -> Similarity:
        """Returns the similarities of all layers that have seen tokens.

        Raises:
            ValueError: none has.
        """
        seen = tuple(meter.result() for meter in self._meters if meter.tokens)
        if not seen:
            raise ValueError("measure_similarity: model must run on tokens meanwhile, got none")
        return Similarity(layers=seen)


@contextmanager
def measure_similarity(
    model: object, components: Sequence[str] | None = None
) -> Iterator[Measurement]:
    """Inside, every forward of the model adds to the similarities of its blocks; it is unchanged.

    Layers that skip a part are left out. Costs a few reads of the residual stream; sums stay on the
    device until `result()`.

    Args:
        model: a model, a pipeline, or an adapter.
        components: to measure; None is all.

    Raises:
        ValueError: no adapter fits, or the model lacks a component.
    """
    adapter: Adapter = find_adapter(model)
    meters = [
        SimilarityMeter(adapter.block(layer, component))
        for component in (adapter.components if components is None else components)
        for layer in range(adapter.num_layers())
        if adapter.holds(layer, component)
    ]
    with ExitStack() as stack:
        for meter in meters:
            stack.enter_context(meter.attached())
        yield Measurement(meters)
