# SPDX-License-Identifier: Apache-2.0
"""Ways to make a model smaller, as data: what a transform of a model or of a checkpoint shall do.

Scoring, choosing and surgery are elsewhere; a list of these is a recipe (`recipe`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from sparse_unified._common import check_int, check_number, choice, context
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.experts import select_layers
from sparse_unified.experts.keep import Budget
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

    def _check_ratio(self, ratio: float) -> None:
        check_number("keep_ratio", ratio, 0, 1)
        if not ratio:
            raise ValueError(f"keep_ratio must be above 0, got {ratio!r}")


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

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs must be given."""
        return self.partition is Partition.COACTIVATION or self.router_init is RouterInit.ACTIVATION


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidthConfig(_Mode):
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
        self._check_ratio(self.keep_ratio)
        self._set("budget", choice("budget", Budget, self.budget))
        check_int("block_size", self.block_size, 1, 128)
        if 1 < self.block_size < 16:
            raise ValueError(f"block_size must be 1 or 16 to 128, got {self.block_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneHeadsConfig(_Mode):
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

    def _check(self) -> None:
        self._check_ratio(self.keep_ratio)
        self._set("budget", choice("budget", Budget, self.budget))


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
        steps, seed: of the optimizer.
        layers: as in `MoEConfig`.
    """

    mode: ClassVar[str] = "adapt"
    _legal: ClassVar[tuple[str, ...]] = (*FFN_NAMES, BOTH)

    stage: str
    steps: int
    seed: int = 0
    component: str = BOTH
    layers: Layers = "all"

    def _check(self) -> None:
        if not isinstance(self.stage, str) or not self.stage:
            raise ValueError(f"stage must be a name, got {self.stage!r}")
        check_int("steps", self.steps, 1)
        check_int("seed", self.seed, 0)


Mode = MoEConfig | PruneWidthConfig | PruneHeadsConfig | SkipLayersConfig | AdaptConfig
