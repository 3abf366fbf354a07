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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import Report, check_int
from sparse_unified.checkpoint.files import NUMBER, has_form, read_json
from sparse_unified.surgery.decoder import Block, find_adapter

PARTS = ("block", "attention", "ffn")
_ENTRY = {"component": (str,), "layer": (int,), "tokens": (int,), **dict.fromkeys(PARTS, NUMBER)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity(Report):
    """What `measure_similarity` has seen.

    Attributes:
        layers: component by component, each layer that has seen tokens: `component`, `layer`,
            number of `tokens`, and the mean cosines `block`, `attention` and `ffn`.
    """

    layers: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Similarity:
        """Reads a file that holds `to_json`; ValueError if it is missing or damaged."""
        found = read_json(path)
        if not has_form(found, {"layers": [_ENTRY]}):
            raise ValueError(f"{path}: layers must be cosines of each layer, got {found!r:.240}")
        return cls(layers=tuple(found["layers"]))

    def redundant(
        self,
        component: str,
        count: int,
        part: str = "block",
        layers: Sequence[int] | None = None,
    ) -> tuple[int, ...]:
        """Returns the `count` layers whose part changes the least, ascending.

        Args:
            component: whose layers.
            count: how many.
            part: "block", "attention" or "ffn".
            layers: to choose among; None is all.

        Raises:
            ValueError: not so many have seen tokens, or a cosine is not a number.
        """
        values = {
            own["layer"]: float(own[part])
            for own in self.layers
            if own["component"] == component and (layers is None or own["layer"] in layers)
        }
        check_int(f"similarity: count of layers of {component}", count, 0, len(values))
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"similarity: {part} of {component} must be finite, got {values}")
        ranked = sorted(values, key=lambda layer: (-values[layer], layer))
        return tuple(sorted(ranked[:count]))

    def headings(self) -> Sequence[str]:
        return ("component", "layer", *PARTS, "tokens")

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (e["component"], e["layer"], *(f"{e[part]:.4f}" for part in PARTS), e["tokens"])
            for e in self.layers
        ]


class Measurement:
    """What `measure_similarity` yields; `result()` is read after the runs."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], int] = {}  # of each component and layer
        self.sums: dict[tuple[str, int], Any] = {}  # [3] fp64, on the device of the model

    def result(self) -> Similarity:
        """Returns the similarities of all layers that have seen tokens; ValueError if none has."""
        layers = []
        for (component, layer), tokens in self.tokens.items():
            if tokens:
                means = (self.sums[component, layer] / tokens).tolist()
                own = {"component": component, "layer": layer, "tokens": tokens}
                layers.append(own | dict(zip(PARTS, means, strict=True)))
        if not layers:
            raise ValueError("measure_similarity: model must run on tokens meanwhile, got none")
        return Similarity(layers=tuple(layers))

    def watch(self, block: Block) -> Iterator[Any]:
        """Hooks one block; yields the handles."""
        stream: dict[str, Tensor] = {}
        key = (block.component, block.layer)
        self.tokens[key], self.sums[key] = 0, 0.0

        def leave(module: object, args: tuple[Any, ...], output: Any) -> None:
            branch = output[0] if isinstance(output, tuple) else output
            x, x1 = (stream.pop(name).detach().flatten(0, -2) for name in ("x", "x1"))
            y = x1 + branch.detach().reshape(x1.shape)
            cosines = [  # in the order of PARTS
                F.cosine_similarity(a.float(), b.float(), dim=-1).sum(dtype=torch.float64)
                for a, b in ((x, y), (x, x1), (x1, y))
            ]
            self.sums[key] += torch.stack(cosines)
            self.tokens[key] += len(x1)

        for name, norm in (("x", block.input_norm), ("x1", block.post_attention_norm)):
            keep = partial(lambda name, _, given: stream.update({name: given[0]}), name)
            yield norm.register_forward_pre_hook(keep)
        yield block.ffn.register_forward_hook(leave)


@contextmanager
def measure_similarity(
    model: object, components: Sequence[str] | None = None
) -> Iterator[Measurement]:
    """Inside, every forward of the model adds to the similarities of its blocks; it is unchanged.

        with measure_similarity(model) as measured:
            model(**batch)
        print(measured.result().to_text())

    Layers that skip a part are left out. Costs a few reads of the residual stream; sums stay on the
    device until `result()`.

    Args:
        model: a model, a pipeline, or an adapter.
        components: to measure; None is all.
    """
    adapter, measurement = find_adapter(model), Measurement()
    with ExitStack() as hooks:
        for component in adapter.components if components is None else components:
            for layer in range(adapter.num_layers()):
                if adapter.holds(layer, component):
                    for handle in measurement.watch(adapter.block(layer, component)):
                        hooks.callback(handle.remove)
        yield measurement
