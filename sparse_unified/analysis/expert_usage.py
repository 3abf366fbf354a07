# SPDX-License-Identifier: Apache-2.0
"""How evenly the experts of sparse blocks are used, and how that changes over denoising.

`watch_experts` counts the choices of any block of code by hooks that change nothing, `expert_usage`
runs a model on samples and counts those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import Progress, Report, context
from sparse_unified.analysis.bagel_task import Settings, run_task
from sparse_unified.analysis.calibration import Observer
from sparse_unified.analysis.samples import Task
from sparse_unified.analysis.statistics import StatisticsConfig, plain
from sparse_unified.surgery.decoder import SparseBlock, find_sparse_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUsage(Report):
    """The blocks of a model on one task.

    Attributes:
        task: what the model did.
        samples: how many samples ran.
        ranges: names of the R + 1 ranges of time, in the order of rows; the first holds tokens
            without a time.
        layers: one entry per block, component by component, see `layer_usage`.
    """

    task: str
    samples: int
    ranges: tuple[str, ...]
    layers: tuple[dict[str, Any], ...]

    def title(self) -> str:
        return f"{self.task}, {self.samples} samples\n"

    def headings(self) -> Sequence[str]:
        counts = ("layer", "tokens", "experts", "entropy", "least", "most", "dead")
        return (*counts, "change over time")

    def table(self) -> Sequence[Sequence[object]]:
        rows = []
        for own in self.layers:
            shares = [share for share in own["share"] if share is not None]
            moves = [move for move in own["change"] if move is not None]
            load = ["-"] * 3
            if shares:
                load = [f"{own['entropy']:.3f}", f"{min(shares):.1%}", f"{max(shares):.1%}"]
            move = f"{sum(moves) / len(moves):.3f}" if moves else "-"
            experts = f"{own['top_k']} of {own['num_experts']}"
            where = (f"{own['component']} {own['layer']}", sum(own["tokens"]), experts)
            rows.append((*where, *load, len(own["dead_experts"]), move))
        return rows

    def notes(self) -> Sequence[str]:
        return (
            "entropy: of the load, 1 is even; least, most: tokens that use an expert;",
            "dead: experts that no token uses; change: choices that move between times",
        )


def layer_usage(component: str, layer: int, top_k: int, load: Tensor) -> dict[str, Any]:
    """Returns what the tokens of one block chose, as plain values, None for NaN.

        tokens         [R + 1] that ran through it, range of time by range of time
        load           [R + 1][E] tokens that chose each expert; a row sums to top_k times tokens
        share          [E] share of all tokens that chose each expert; even is top_k / E
        entropy        of the load over log E: 1 is even
        range_entropy  [R + 1] the same in each range
        dead_experts   that no token chose; none where there were no tokens
        change         [R - 1] share of the choices that go to other experts in the next range of
                       time (total variation distance)

    Args:
        component, layer, top_k: of the block.
        load: [R + 1, E] int64.
    """
    tokens, total = load.sum(1) // top_k, load.sum(0)
    times = load[1:].double() / load[1:].sum(1, keepdim=True)
    return {
        "component": component,
        "layer": layer,
        "num_experts": load.shape[1],
        "top_k": top_k,
        "tokens": tokens.tolist(),
        "load": load.tolist(),
        "share": plain(total.double() / tokens.sum()),
        "entropy": plain(_entropy(total)),
        "range_entropy": plain(_entropy(load)),
        "dead_experts": (total == 0).nonzero()[:, 0].tolist() if total.any() else [],
        "change": plain(times.diff(dim=0).abs().sum(1) / 2),
    }


def _entropy(load: Tensor) -> Tensor:
    """[..., E] -> [...] fp64, over log E; NaN of an empty load, 1 of a single expert."""
    shares = load.double() / load.sum(-1, keepdim=True)
    if load.shape[-1] == 1:
        return shares[..., 0]
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(load.shape[-1])


class ExpertWatch(Observer):
    """What `watch_experts` yields: `usage` gives the counts so far."""

    def __init__(self, config: StatisticsConfig, blocks: Sequence[SparseBlock]) -> None:
        super().__init__(config)
        self.blocks, self.loads = blocks, dict[Any, Tensor]()
        for module in [block.module for block in blocks]:
            load = torch.zeros(config.num_time_ranges + 1, module.num_experts, dtype=torch.int64)
            self.loads[module] = load.to(module.gate.weight.device)

    @torch.no_grad()
    def before(self, block: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Counts the experts that the tokens of a block are about to use."""
        chosen = block.route(*arguments, **named)[2].flatten().long()  # [T * K]
        counts = torch.bincount(chosen, minlength=block.num_experts)
        self.loads[block][self.time_range] += counts

    def usage(self, task: str = "run", samples: int = 1) -> ExpertUsage:
        """Returns what was counted, under a name; ValueError if no token ran through a block."""
        layers = tuple(
            layer_usage(own.component, own.layer, own.module.top_k, self.loads[own.module].cpu())
            for own in self.blocks
        )
        if not any(sum(own["tokens"]) for own in layers):
            where = ", ".join(dict.fromkeys(own["component"] for own in layers))
            raise ValueError(f"{task} must send tokens through a sparse FFN of {where}, got none")
        ranges = tuple(self.config.range_names())
        return ExpertUsage(task=task, samples=samples, ranges=ranges, layers=layers)


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
    """
    blocks = find_sparse_blocks(model, components)
    watch = ExpertWatch(StatisticsConfig(num_time_ranges=num_time_ranges), blocks)
    with watch.observing(model, [(module, watch.before) for module in watch.loads]):
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
        task, samples, run, settings, progress: as in `calibrate`.
        num_time_ranges, components: as in `watch_experts`.

    Raises:
        ValueError: there are no samples, no sparse blocks, or none that sees a token; the task or
            model is none that can be run.
    """
    name = task.value if isinstance(task, Task) else task
    with watch_experts(model, num_time_ranges=num_time_ranges, components=components) as watch:
        run_task(model, name, samples, run=run, settings=settings, progress=progress)
    return watch.usage(name, len(samples))
