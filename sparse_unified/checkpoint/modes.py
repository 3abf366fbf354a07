# SPDX-License-Identifier: Apache-2.0
"""Ways to make a model smaller, as data: what a transform of a model or of a checkpoint shall do.

Scoring, choosing and surgery are elsewhere; a list of these is a recipe (`recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts import Budget, Partition, RouterInit, select_layers

# More layers than any model has; a selection is parsed against it before the model is known.
MAX_LAYERS = 1 << 16
BOTH = "both"

Layers = str | Sequence[int]


class Part(str, Enum):
    """What of a layer a component skips."""

    BLOCK = "block"  # attention and FFN
    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
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
        seed: of what partition and router_init draw.

    Raises:
        ValueError: a value is out of range or none of the above.
        TypeError: layers are neither a string nor a sequence.
    """

    mode: ClassVar[str] = "moe"

    num_experts: int = 16
    top_k: int = 8
    num_shared_experts: int = 0
    component: str = "gen"
    layers: Layers = "middle"
    partition: Partition = Partition.SNAKE
    router_init: RouterInit = RouterInit.ZERO
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_experts", 1),
            ("top_k", 1),
            ("num_shared_experts", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"MoEConfig: {name} must be an integer of at least {least}, got {value!r:.120}"
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"MoEConfig: top_k must be at most num_experts = {self.num_experts}, "
                f"got {self.top_k}"
            )
        _check_component(self, tuple(FFN_NAMES))
        _check_layers(self)
        _as_enum(self, "partition", Partition)
        _as_enum(self, "router_init", RouterInit)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs must be given."""
        return self.partition is Partition.COACTIVATION or self.router_init is RouterInit.ACTIVATION


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidthConfig:
    """FFNs of one component made narrower: the neurons with the highest scores stay.

    Args:
        component: "gen" or "und".
        layers: as in `MoEConfig`; "all" and "middle" pass over layers whose FFN is skipped.
        keep_ratio: share of the neurons that stays, in (0, 1].
        budget: "uniform", each layer keeps that share; or "global", the layers together do.
        block_size: neurons go in blocks of this many consecutive ones: 1, or 16 to 128, a divisor
            of every width.

    Raises:
        ValueError: a value is out of range. TypeError: layers are neither string nor sequence.
    """

    mode: ClassVar[str] = "width"

    component: str = "gen"
    layers: Layers = "all"
    keep_ratio: float = 0.5
    budget: Budget = Budget.UNIFORM
    block_size: int = 1

    def __post_init__(self) -> None:
        _check_component(self, tuple(FFN_NAMES))
        _check_layers(self)
        _check_ratio(self)
        _as_enum(self, "budget", Budget)
        size = self.block_size
        if type(size) is not int or not (size == 1 or 16 <= size <= 128):
            raise ValueError(
                f"PruneWidthConfig: block_size must be 1 or 16 to 128, got {size!r:.120}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeadsConfig:
    """Attention heads of one component dropped, in groups: a key head and the queries that read it.

    The queries of a group go, with their columns of the output projection. Its keys and values go
    too once no component reads them; until then the other component still sees them.

    Args:
        component: "gen", "und", or "both": the same groups of both, whose keys and values go.
        layers: as in `MoEConfig`; "all" and "middle" pass over layers whose attention is skipped.
        keep_ratio: share of the groups that stays, in (0, 1]; at least one does.
        budget: as in `PruneWidthConfig`.

    Raises:
        ValueError: a value is out of range. TypeError: layers are neither string nor sequence.
    """

    mode: ClassVar[str] = "heads"

    component: str = "gen"
    layers: Layers = "all"
    keep_ratio: float = 0.5
    budget: Budget = Budget.UNIFORM

    def __post_init__(self) -> None:
        _check_component(self, (*FFN_NAMES, BOTH))
        _check_layers(self)
        _check_ratio(self)
        _as_enum(self, "budget", Budget)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that lose heads."""
        return tuple(FFN_NAMES) if self.component == BOTH else (self.component,)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayersConfig:
    """Decoder layers that the tokens of one component pass by, on the residual.

    The other component's tokens still run through them. Tokens that skip an attention neither ask
    in that layer nor are seen in it: they have no keys and values there.

    Args:
        component: "gen" or "und".
        layers: as in `MoEConfig`; "all" and "middle" pass over layers that skip the part already.
        part: "block", "attention" or "ffn".

    Raises:
        ValueError: a value is none of the above. TypeError: layers are neither string nor sequence.
    """

    mode: ClassVar[str] = "depth"

    component: str = "und"
    layers: Layers
    part: Part = Part.BLOCK

    def __post_init__(self) -> None:
        _check_component(self, tuple(FFN_NAMES))
        _check_layers(self)
        _as_enum(self, "part", Part)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is skipped: attention, FFN, or both."""
        return (Part.ATTENTION, Part.FFN) if self.part is Part.BLOCK else (self.part,)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """Weights trained; keys and shapes stay. Written by `adapt`, it says how a model came about.

    Args:
        stage: what was trained, as in `sparse_unified.adapt`.
        component: "gen", "und", or "both": whose weights.
        steps, seed: of the optimizer.
        layers: as in `MoEConfig`.

    Raises:
        ValueError: a value is out of range. TypeError: layers are neither string nor sequence.
    """

    mode: ClassVar[str] = "adapt"

    stage: str
    steps: int
    seed: int = 0
    component: str = BOTH
    layers: Layers = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.stage, str) or not self.stage:
            raise ValueError(f"AdaptConfig: stage must be a name, got {self.stage!r}")
        for name, least in (("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"AdaptConfig: {name} must be an integer of at least {least}, got {value!r}"
                )
        _check_component(self, (*FFN_NAMES, BOTH))
        _check_layers(self)


Mode = MoEConfig | PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig | AdaptConfig


def _check_component(config: Any, legal: tuple[str, ...]) -> None:
    if config.component not in legal:
        raise ValueError(
            f"{type(config).__name__}: component must be one of {', '.join(legal)}, "
            f"got {config.component!r:.120}"
        )


def _check_layers(config: Any) -> None:
    if not isinstance(config.layers, str):
        try:
            object.__setattr__(config, "layers", tuple(config.layers))
        except TypeError as error:
            raise TypeError(
                f"{type(config).__name__}: layers must be a string or a sequence of integers, "
                f"got {config.layers!r:.120}"
            ) from error
    if config.layers not in ("middle", "all"):
        select_layers(config.layers, MAX_LAYERS)


def _check_ratio(config: Any) -> None:
    ratio = config.keep_ratio
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not is_number or not math.isfinite(ratio) or not 0 < ratio <= 1:
        raise ValueError(
            f"{type(config).__name__}: keep_ratio must be above 0 and at most 1, got {ratio!r:.120}"
        )


def _as_enum(config: Any, name: str, kind: type[Enum]) -> None:
    try:
        object.__setattr__(config, name, kind(getattr(config, name)))
    except ValueError:
        legal = ", ".join(f"'{choice.value}'" for choice in kind)
        raise ValueError(
            f"{type(config).__name__}: {name} must be one of {legal}, "
            f"got {getattr(config, name)!r:.120}"
        ) from None
