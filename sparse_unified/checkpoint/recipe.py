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

from sparse_unified._common import check_int, context, format_layers, naming
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

    def to_json(self) -> str:
        """Returns the text of the file."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "steps": [step.to_dict() for step in self.steps],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def parse_recipe(path: Path, content: Mapping[str, Any]) -> Recipe:
    """Checks and returns the contents of a recipe file."""
    with context(path):
        form = content.get("format"), content.get("format_version")
        if form != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format must be {FORMAT} {FORMAT_VERSION}, got {form!r:.120}")
        steps = content.get("steps")
        if not isinstance(steps, list):
            raise ValueError(f"steps must be a list, got {type(steps).__name__}")
        parsed = []
        for number, step in enumerate(steps):
            try:
                parsed.append(_parse_step(step))
            except (TypeError, ValueError) as error:
                raise ValueError(f"step {number}: {error}") from error
    return Recipe(steps=tuple(parsed))


# Fields that recipes of earlier versions lack; their defaults are what was done then.
_ADDED = {MoEConfig.mode: {"partition", "router_init", "seed"}}
_RESULT_OF = {PruneWidthConfig.mode: "widths", PruneHeadsConfig.mode: "heads"}


def _parse_step(step: Any) -> Step:
    if not isinstance(step, dict) or str(step.get("mode")) not in MODES:
        got = step.get("mode") if isinstance(step, dict) else step
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {got!r:.80}")
    kind, fields = MODES[str(step["mode"])], step.get("config")
    known = {field.name for field in dataclasses.fields(kind)}
    needed = known - _ADDED.get(kind.mode, set())
    if not isinstance(fields, dict) or not needed <= set(fields) <= known:
        got = sorted(fields) if isinstance(fields, dict) else fields
        raise ValueError(f"config must have {', '.join(sorted(known))}, got {got!r:.120}")
    if not isinstance(fields["layers"], list):
        raise ValueError(f"layers must be a list of indices, got {fields['layers']!r:.80}")
    config = kind(**fields)
    result = _RESULT_OF.get(kind.mode)
    others = step.keys() - {"mode", "config", "scores", "tool", result}
    found = step.get(result, {}) if result is not None else {}
    layers = sorted(str(layer) for layer in config.layers) if result is not None else []
    if others or not isinstance(found, dict) or sorted(found) != layers:
        raise ValueError(
            f"{kind.mode} step must have {result or 'no results'} for its layers "
            f"{format_layers([int(layer) for layer in config.layers])} and nothing else, "
            f"got {sorted(others) or found!r:.80}"
        )
    for layer, value in found.items():
        with naming(f"layer {layer}"):
            if result == "widths":
                check_int("width", value, 1)
            else:
                _check_heads(value)
    scores = step.get("scores")
    return Step(
        config=config,
        scores=None if scores is None else str(scores),
        tool=str(step.get("tool", "unknown")),
        widths={int(n): width for n, width in found.items()} if result == "widths" else {},
        heads={
            int(n): {name: tuple(numbers) for name, numbers in heads.items()}
            for n, heads in (found if result == "heads" else {}).items()
        },
    )


def _check_heads(value: object) -> None:
    names = ("keys", *FFN_NAMES)
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"heads must have {', '.join(names)}, got {value!r:.80}")
    for name in names:
        numbers = value[name]
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or sorted(set(numbers)) != numbers:
            raise ValueError(f"{name} must be ascending head numbers, got {numbers!r:.80}")
        if name != "keys" and not set(numbers) <= set(value["keys"]):
            raise ValueError(
                f"{name} must be among its keys {value['keys']!r:.80}, got {numbers!r:.80}"
            )
