# SPDX-License-Identifier: Apache-2.0
"""Ways to make a model smaller, as data, and the list of those that made a model: its recipe.

A config says what a transform of a model or of a checkpoint shall do; scoring, choosing and surgery
are elsewhere. `sparse_unified.json` says what was done to a checkpoint, an ordered list of steps:

    {"format": "sparse_unified.recipe", "format_version": 1, "steps": [
      {"mode": "width", "config": {...}, "scores": "weight magnitude", "tool": "...",
       "widths": {"0": 9472, ...}}, ...]}

A step is a config, with the layers as indices, and what came of it: `widths` in neurons of each
layer after "width"; `heads` of each layer after "heads". Layers and heads keep the numbers that
they have in the dense checkpoint, whatever went before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from sparse_unified._common import check_int, check_number, choice, context, format_layers, naming
from sparse_unified._version import __version__
from sparse_unified.checkpoint.files import json_text
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts.keep import Budget, select_layers
from sparse_unified.experts.layout import Partition
from sparse_unified.experts.router import RouterInit

# More layers than any model has; a selection is parsed against it before the model is known.
MAX_LAYERS = 1 << 16
BOTH = "both"

Layers = str | Sequence[int]


class Part(str, Enum):
    """What of a layer a component skips."""

    BLOCK = "block"  # attention and FFN
    ATTENTION = "attention"
    FFN = "ffn"


class _Mode:
    """What configs share: a component, layers, and checks when one is made."""

    __slots__ = ()
    mode: ClassVar[str]
    _legal: ClassVar[tuple[str, ...]] = tuple(FFN_NAMES)
    component: str
    layers: Layers

    @property
    def components(self) -> tuple[str, ...]:
        """The components it is about."""
        return tuple(FFN_NAMES) if self.component == BOTH else (self.component,)

    def __post_init__(self) -> None:
        with context(type(self).__name__):
            if self.component not in self._legal:
                raise ValueError(
                    f"component must be one of {', '.join(self._legal)}, "
                    f"got {self.component!r:.120}"
                )
            if not isinstance(self.layers, str):
                if not isinstance(self.layers, Iterable):
                    raise TypeError(
                        "layers must be a string or a sequence of integers, "
                        f"got {self.layers!r:.120}"
                    )
                self._set("layers", tuple(self.layers))
            if self.layers not in ("middle", "all"):
                select_layers(self.layers, MAX_LAYERS)
            self._check()

    def _check(self) -> None:
        """Checks what one mode has and others have not."""

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


class _Pruning(_Mode):
    """What configs that rank share."""

    __slots__ = ()
    keep_ratio: float
    budget: Budget

    def _check(self) -> None:
        check_number("keep_ratio", self.keep_ratio, 0, 1)
        if not self.keep_ratio:
            raise ValueError(f"keep_ratio must be above 0, got {self.keep_ratio!r}")
        self._set("budget", choice("budget", Budget, self.budget))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig(_Mode):
    """Sparse FFNs of one component; the defaults are those of the released 16to8 checkpoint.

    Args:
        num_experts: E, routed experts of a layer; must divide what the shared expert leaves.
        top_k: K, experts per token, from 1 to E.
        num_shared_experts: S; the shared expert is S * (I // (E + S)) neurons wide.
        component: "gen" (`mlp_moe_gen`) or "und" (`mlp`).
        layers: "middle" (all but the first and the last), "all", "a-b" (both ends included),
            comma-separated parts of these, or a sequence of indices; "all" and "middle" pass over
            layers whose FFN is skipped.
        partition: who goes where: "snake", the official way; "random"; or "coactivation", neurons
            that fire together on calibration inputs.
        router_init: what routers start from: "zero", the official way; "random", small; or
            "activation", fitted to calibration inputs.
        time_router: gen experts are chosen by the time of denoising too, by a bias that starts at
            zero, for models of `sparse_unified.bagel`.
        seed: of what partition and router_init draw.
    """

    mode: ClassVar[str] = "moe"

    num_experts: int = 16
    top_k: int = 8
    num_shared_experts: int = 0
    component: str = "gen"
    layers: Layers = "middle"
    partition: Partition = Partition.SNAKE
    router_init: RouterInit = RouterInit.ZERO
    time_router: bool = False
    seed: int = 0

    def _check(self) -> None:
        for name, least in (("num_experts", 1), ("top_k", 1), ("num_shared_experts", 0)):
            check_int(name, getattr(self, name), least)
        check_int("seed", self.seed, 0)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}"
            )
        self._set("partition", choice("partition", Partition, self.partition))
        self._set("router_init", choice("router_init", RouterInit, self.router_init))
        if type(self.time_router) is not bool:
            raise TypeError(f"time_router must be true or false, got {self.time_router!r:.120}")
        if self.time_router and self.component != "gen":
            raise ValueError(
                "component must be gen with time_router, as no other tokens have a time, got "
                f"{self.component}"
            )

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs must be given."""
        return self.partition is Partition.COACTIVATION or self.router_init is RouterInit.ACTIVATION


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidthConfig(_Pruning):
    """FFNs of one component made narrower: the neurons with the highest scores stay.

    Args:
        component: "gen" or "und".
        layers: as in `MoEConfig`; "all" and "middle" pass over layers whose FFN is skipped.
        keep_ratio: share of the neurons that stays, in (0, 1].
        budget: "uniform", each layer keeps that share; or "global", the layers together do.
        block_size: neurons go in blocks of this many consecutive ones: 1, or 16 to 128, a divisor
            of every width.
    """

    mode: ClassVar[str] = "width"

    component: str = "gen"
    layers: Layers = "all"
    keep_ratio: float = 0.5
    budget: Budget = Budget.UNIFORM
    block_size: int = 1

    def _check(self) -> None:
        _Pruning._check(self)
        check_int("block_size", self.block_size, 1, 128)
        if 1 < self.block_size < 16:
            raise ValueError(f"block_size must be 1 or 16 to 128, got {self.block_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeadsConfig(_Pruning):
    """Attention heads of one component dropped, in groups: a key head and the queries that read it.

    The queries of a group go, with their columns of the output projection. Its keys and values go
    too once no component reads them; until then the other component still sees them.

    Args:
        component: "gen", "und", or "both": the same groups of both, whose keys and values go.
        layers: as in `MoEConfig`; "all" and "middle" pass over layers whose attention is skipped.
        keep_ratio: share of the groups that stays, in (0, 1]; at least one does.
        budget: as in `PruneWidthConfig`.
    """

    mode: ClassVar[str] = "heads"
    _legal: ClassVar[tuple[str, ...]] = (*FFN_NAMES, BOTH)

    component: str = "gen"
    layers: Layers = "all"
    keep_ratio: float = 0.5
    budget: Budget = Budget.UNIFORM


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayersConfig(_Mode):
    """Decoder layers that the tokens of one component pass by, on the residual.

    The other component's tokens still run through them. Tokens that skip an attention neither ask
    in that layer nor are seen in it: they have no keys and values there.

    Args:
        component: "gen" or "und".
        layers: as in `MoEConfig`; "all" and "middle" pass over layers that skip the part already.
        part: "block", "attention" or "ffn".
    """

    mode: ClassVar[str] = "depth"

    component: str = "und"
    layers: Layers
    part: Part = Part.BLOCK

    def _check(self) -> None:
        self._set("part", choice("part", Part, self.part))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is skipped: attention, FFN, or both."""
        return (Part.ATTENTION, Part.FFN) if self.part is Part.BLOCK else (self.part,)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig(_Mode):
    """Weights trained; keys and shapes stay. Written by `adapt`, it says how a model came about.

    Args:
        stage: what was trained, as in `sparse_unified.adapt`.
        component: "gen", "und", or "both": whose weights.
        steps, seed: of the optimizer; steps None: not known, of adapters from elsewhere.
        layers: as in `MoEConfig`.
    """

    mode: ClassVar[str] = "adapt"
    _legal: ClassVar[tuple[str, ...]] = (*FFN_NAMES, BOTH)

    stage: str
    steps: int | None
    seed: int = 0
    component: str = BOTH
    layers: Layers = "all"

    def _check(self) -> None:
        if not isinstance(self.stage, str) or not self.stage:
            raise ValueError(f"stage must be a name, got {self.stage!r}")
        if self.steps is not None:
            check_int("steps", self.steps, 1)
        check_int("seed", self.seed, 0)


Mode = MoEConfig | PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig | AdaptConfig


RECIPE = "sparse_unified.json"
TOOL = f"sparse_unified {__version__}"  # what writes files, by name and version
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
    tool: str = TOOL
    widths: Mapping[int, int] = field(default_factory=dict)
    heads: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the step as plain values, ready for json.dump."""
        config = {
            name: value.value if hasattr(value, "value") else value
            for name, value in dataclasses.asdict(self.config).items()
            if name not in _LEFT_OUT or value
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


def recipe_text(steps: Iterable[Step]) -> str:
    """Returns the text of the file that lists steps."""
    own = [step.to_dict() for step in steps]
    return json_text({"format": FORMAT, "format_version": FORMAT_VERSION, "steps": own})


def parse_recipe(path: Path, content: Mapping[str, Any]) -> tuple[Step, ...]:
    """Checks the contents of a recipe file and returns its steps."""
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
    return tuple(parsed)


# Fields that recipes of earlier versions lack; their defaults are what was done then.
_ADDED = {MoEConfig.mode: {"partition", "router_init", "time_router", "seed"}}
_LEFT_OUT = {"time_router"}  # of recipes where they are not set
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
    read: dict[int, Any] = {}
    for layer, value in found.items():
        with naming(f"layer {layer}"):
            read[int(layer)] = _read_width(value) if result == "widths" else _read_heads(value)
    scores, tool = step.get("scores"), str(step.get("tool", "unknown"))
    results = {result: read} if result is not None else {}
    return Step(config=config, scores=None if scores is None else str(scores), tool=tool, **results)


def _read_width(value: Any) -> int:
    check_int("width", value, 1)
    return int(value)


def _read_heads(value: object) -> dict[str, tuple[int, ...]]:
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
    return {name: tuple(numbers) for name, numbers in value.items()}
