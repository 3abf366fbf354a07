# SPDX-License-Identifier: Apache-2.0
"""`sparse_unified.json`: what was done to a checkpoint, an ordered list of steps.

    {"format": "sparse_unified.recipe", "format_version": 1, "steps": [
      {"mode": "width", "config": {...}, "scores": "weight magnitude", "tool": "...",
       "widths": {"0": 9472, ...}}, ...]}

A step is the config of a mode of `modes`, with the layers as indices, and what came of it: `widths`
in neurons of each layer after "width"; `heads` of each layer after "heads". Layers and heads keep
the numbers that they have in the dense checkpoint, whatever went before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_unified._common import format_layers
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import (
    AdaptConfig,
    Mode,
    MoEConfig,
    PruneHeadsConfig,
    PruneWidthConfig,
    SkipLayersConfig,
)

RECIPE = "sparse_unified.json"
FORMAT = "sparse_unified.recipe"
FORMAT_VERSION = 1

MODES: Mapping[str, type[Mode]] = {
    kind.mode: kind
    for kind in (MoEConfig, PruneWidthConfig, PruneHeadsConfig, SkipLayersConfig, AdaptConfig)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a recipe.

    Attributes:
        config: what was asked for; its layers are indices.
        scores: what neurons or heads were ranked by; None where nothing was ranked.
        tool: name and version of what did it.
        widths: neurons of each layer afterwards, of a "width" step.
        heads: heads of each layer afterwards, of a "heads" step, ascending, by their numbers in the
            dense checkpoint: "keys", the KV heads that are there, and of each component those that
            its query groups read; () where it skips the attention.
    """

    config: Mode
    scores: str | None
    tool: str
    widths: Mapping[int, int] = field(default_factory=dict)
    heads: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the step as plain values, ready for json.dump."""
        config = {
            name: value.value if hasattr(value, "value") else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        result: dict[str, Any] = {"mode": self.config.mode, "config": config}
        result |= {"scores": self.scores, "tool": self.tool}
        if self.widths:
            result["widths"] = {str(layer): width for layer, width in self.widths.items()}
        if self.heads:
            result["heads"] = {str(layer): dict(heads) for layer, heads in self.heads.items()}
        return result

    def to_text(self) -> str:
        """Returns one line for people."""
        fields = self.to_dict()["config"]
        fields["layers"] = format_layers(fields["layers"])
        parts = [f"{name} {value}" for name, value in fields.items()]
        if self.scores is not None:
            parts.append(f"ranked by {self.scores}")
        return f"{self.config.mode}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All steps, in the order they were taken."""

    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Recipe:
        """Returns a recipe with more steps at its end."""
        return Recipe(steps=(*self.steps, *steps))

    def narrowed_experts(self, component: str) -> set[int]:
        """Returns the layers that lost neurons of a component after they had become sparse."""
        sparse: set[int] = set()
        narrowed: set[int] = set()
        for step in self.steps:
            layers = {int(layer) for layer in step.config.layers}
            if step.config.component != component:
                continue
            if isinstance(step.config, MoEConfig):
                sparse |= layers
            elif isinstance(step.config, PruneWidthConfig):
                narrowed |= sparse & layers
        return narrowed

    def to_json(self) -> str:
        """Returns the text of the file."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "steps": [step.to_dict() for step in self.steps],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def parse_recipe(path: Path, content: Mapping[str, Any]) -> Recipe:
    """Checks and returns the contents of a recipe file.

    Raises:
        ValueError: it is no recipe, of a later format, or a step is not what its mode asks for.
    """
    form = content.get("format"), content.get("format_version")
    if form != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path}: format must be {FORMAT} {FORMAT_VERSION}, got {form!r:.120}")
    steps = content.get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"{path}: steps must be a list, got {type(steps).__name__}")
    return Recipe(
        steps=tuple(_parse_step(f"{path}: step {i}", step) for i, step in enumerate(steps))
    )


def _parse_step(where: str, step: object) -> Step:
    kind = MODES.get(str(step.get("mode"))) if isinstance(step, dict) else None
    if kind is None or not isinstance(step, dict):
        got = step.get("mode") if isinstance(step, dict) else step
        raise ValueError(f"{where}: mode must be one of {', '.join(MODES)}, got {got!r:.80}")
    extra = [name for name in step if name not in ("mode", "config", "scores", "tool", *_RESULTS)]
    fields = step.get("config")
    known = {known.name for known in dataclasses.fields(kind)}
    needed = known - _ADDED.get(kind.mode, set())
    if extra or not isinstance(fields, dict) or not needed <= set(fields) <= known:
        got = extra or (sorted(fields) if isinstance(fields, dict) else fields)
        raise ValueError(f"{where}: config must have {', '.join(sorted(known))}, got {got!r:.120}")
    if not isinstance(fields["layers"], list):
        raise ValueError(f"{where}: layers must be a list of indices, got {fields['layers']!r:.80}")
    try:
        config = kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    layers, result = config.layers, _RESULT_OF.get(config.mode)
    values = step.get(result, {}) if result is not None else {}
    stray = [name for name in _RESULTS if name in step and name != result]
    if (
        stray
        or not isinstance(values, dict)
        or sorted(values) != sorted(str(layer) for layer in (layers if result is not None else ()))
    ):
        raise ValueError(
            f"{where}: {result or stray[0]} must be given for the layers of a {config.mode} step, "
            f"{format_layers([int(layer) for layer in layers])}, and for no others, "
            f"got {values!r:.80}"
        )
    items = [(int(layer), value) for layer, value in values.items()]
    scores, tool = step.get("scores"), step.get("tool", "unknown")
    return Step(
        config=config,
        scores=None if scores is None else str(scores),
        tool=str(tool),
        widths={n: _width(where, n, v) for n, v in items if result == "widths"},
        heads={n: _heads(where, n, v) for n, v in items if result == "heads"},
    )


_RESULTS = ("widths", "heads")
# Fields that recipes of earlier versions lack; their defaults are what was done then.
_ADDED = {MoEConfig.mode: {"partition", "router_init", "seed"}}
_RESULT_OF = {PruneWidthConfig.mode: "widths", PruneHeadsConfig.mode: "heads"}


def _width(where: str, layer: int, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{where}: width of layer {layer} must be an integer of at least 1, got {value!r:.80}"
        )
    return value


def _heads(where: str, layer: int, value: object) -> dict[str, tuple[int, ...]]:
    names = ("keys", *FFN_NAMES)
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(
            f"{where}: heads of layer {layer} must have {', '.join(names)}, got {value!r:.80}"
        )
    lists = {name: value[name] for name in names}
    for name, numbers in lists.items():
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or sorted(set(numbers)) != numbers:
            raise ValueError(
                f"{where}: {name} of layer {layer} must be ascending head numbers, "
                f"got {numbers!r:.80}"
            )
    for name in FFN_NAMES:
        if not set(lists[name]) <= set(lists["keys"]):
            raise ValueError(
                f"{where}: {name} of layer {layer} must be among its keys {lists['keys']}, "
                f"got {lists[name]}"
            )
    return {name: tuple(numbers) for name, numbers in lists.items()}
