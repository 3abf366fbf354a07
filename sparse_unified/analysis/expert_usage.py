# SPDX-License-Identifier: Apache-2.0
"""How evenly the experts of sparse blocks are used, and how that changes over denoising.

`watch_experts` counts the choices of any block of code by hooks that change nothing, `expert_usage`
runs a model on samples and counts those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified._common import Progress, Report, context
from sparse_unified.analysis.bagel_task import Settings, run_task
from sparse_unified.analysis.calibration import Observer
from sparse_unified.analysis.samples import Task
from sparse_unified.analysis.statistics import StatisticsConfig, plain
from sparse_unified.surgery.decoder import SparseBlock, find_sparse_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUsage:
    """Which experts the tokens of one block chose, range of time by range of time.

    Ranges are those of `analysis.statistics`: the first holds tokens without a time.

    Attributes:
        component: of the block.
        layer: of the block.
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
            "share": plain(self.share()),
            "entropy": plain(torch.tensor(self.entropy())),
            "range_entropy": plain(self.range_entropy()),
            "dead_experts": self.dead_experts(),
            "change": plain(self.change()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUsage(Report):
    """The blocks of a model on one task.

    Attributes:
        task: what the model did.
        samples: how many samples ran.
        ranges: names of the R + 1 ranges of time, in the order of rows.
        layers: one entry per block, component by component.
    """

    task: str
    samples: int
    ranges: tuple[str, ...]
    layers: tuple[LayerUsage, ...]

    def of(self, component: str) -> list[LayerUsage]:
        """Returns the blocks of a component."""
        return [entry for entry in self.layers if entry.component == component]

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("task", "samples", "ranges")}
        return {**values, "layers": [entry.to_dict() for entry in self.layers]}

    def title(self) -> str:
        return f"{self.task}, {self.samples} samples\n"

    def headings(self) -> Sequence[str]:
        counts = ("layer", "tokens", "experts", "entropy", "least", "most", "dead")
        return (*counts, "change over time")

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (
                f"{entry.component} {entry.layer}",
                int(entry.tokens.sum()),
                f"{entry.top_k} of {entry.num_experts}",
                _text(entry.entropy(), ".3f"),
                *(_text(value, ".1%") for value in entry.share().aminmax()),
                len(entry.dead_experts()),
                _text(entry.change().nanmean(), ".3f"),
            )
            for entry in self.layers
        ]

    def notes(self) -> Sequence[str]:
        return (
            "entropy: of the load, 1 is even; least, most: tokens that use an expert;",
            "dead: experts that no token uses; change: choices that move between times",
        )


class ExpertWatch(Observer):
    """What `watch_experts` yields: `usage` gives the counts so far."""

    def __init__(self, config: StatisticsConfig, blocks: Sequence[SparseBlock]) -> None:
        super().__init__(config)
        ranges = config.num_time_ranges + 1
        self.layers = [
            LayerUsage(
                component=block.component,
                layer=block.layer,
                top_k=block.module.top_k,
                tokens=torch.zeros(ranges, dtype=torch.int64),
                load=torch.zeros(
                    (ranges, block.module.num_experts),
                    dtype=torch.int64,
                    device=block.module.gate.weight.device,
                ),
            )
            for block in blocks
        ]

    def count(self, own: LayerUsage) -> Callable[..., None]:
        """Returns the hook of a block."""

        @torch.no_grad()
        def before(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            topk_idx = block.route(*arguments, **named)[2]  # type: ignore[operator]  # [T, K]
            counts = torch.bincount(topk_idx.flatten().long(), minlength=own.num_experts)
            own.load[self.time_range] += counts
            own.tokens[self.time_range] += len(topk_idx)

        return before

    def usage(self, task: str = "run", samples: int = 1) -> ExpertUsage:
        """Returns what was counted, under a name; ValueError if no token ran through a block."""
        if not any(int(entry.tokens.sum()) for entry in self.layers):
            where = ", ".join(dict.fromkeys(entry.component for entry in self.layers))
            raise ValueError(f"{task} must send tokens through a sparse FFN of {where}, got none")
        return ExpertUsage(
            task=task,
            samples=samples,
            ranges=tuple(self.config.range_names()),
            layers=tuple(
                replace(own, tokens=own.tokens.clone(), load=own.load.to("cpu", copy=True))
                for own in self.layers
            ),
        )


@contextmanager
def watch_experts(
    model: object, *, num_time_ranges: int = 4, components: Sequence[str] | None = None
) -> Iterator[ExpertWatch]:
    """Counts the choices of all sparse blocks while the block of code runs.

        with watch_experts(pipeline) as watch:
            pipeline.generate("a red bench", seed=0)
        print(watch.usage().to_text())

    Args:
        model: a model or pipeline with `SparseMoE` blocks, whose routers are in memory.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        components: of which components; None is all.
    """
    blocks = find_sparse_blocks(model, components)
    watch = ExpertWatch(StatisticsConfig(num_time_ranges=num_time_ranges), blocks)
    hooks = [
        (block.module, watch.count(own)) for block, own in zip(blocks, watch.layers, strict=True)
    ]
    with watch.observing(model, hooks):
        yield watch


@context("expert_usage")
def expert_usage(
    model: Any,
    task: Task | str,
    samples: Sequence[Any],
    *,
    run: Callable[[Any], object] | None = None,
    settings: Settings | None = None,
    num_time_ranges: int = 4,
    components: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ExpertUsage:
    """Runs a model on samples and returns which experts its tokens chose.

    Args:
        model: a BAGEL pipeline with sparse blocks; with `run`, any model that has some.
        task: generation, understanding or editing; with `run`, any name.
        samples: `Sample`s; with `run`, whatever it takes, one after the other.
        run: what to do with a sample, for models that are no BAGEL pipeline.
        settings: of the built-in runs: size, steps, length of answers.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        components: of which components; None is all.
        progress: called with the number of finished samples and of all.

    Raises:
        ValueError: there are no samples, no sparse blocks, or none that sees a token; the task or
            model is none that can be run.
    """
    name = task.value if isinstance(task, Task) else task
    with watch_experts(model, num_time_ranges=num_time_ranges, components=components) as watch:
        run_task(model, name, samples, run=run, settings=settings, progress=progress)
    return watch.usage(name, len(samples))


def _entropy(load: Tensor) -> Tensor:
    """[n, E] -> [n] fp64, over log E; NaN of an empty load, 1 of a single expert."""
    shares = load.double() / load.sum(1, keepdim=True)
    if load.shape[1] == 1:
        return shares[:, 0]
    return -torch.special.xlogy(shares, shares).sum(1) / math.log(load.shape[1])


def _text(value: float | Tensor, form: str) -> str:
    return "-" if math.isnan(value) else format(float(value), form)
