# SPDX-License-Identifier: Apache-2.0
"""Makes a model smaller point by point, measures it, and restores it.

A point keeps a share of one component along one axis. Every point is written to disk as soon as it
is finished; a sweep that was interrupted is resumed in the same folder. Nothing is random but by
its seeds. Results are the plain values of `results.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch

from sparse_unified._common import (
    Report,
    StrPath,
    check_int,
    choice,
    context,
    format_bytes,
    format_table,
)
from sparse_unified.analysis.bagel_task import settings_in_words
from sparse_unified.analysis.calibration import collect
from sparse_unified.analysis.criteria import CRITERIA, Similarity, measure_similarity, score
from sparse_unified.analysis.evaluators import Probe, measure, measure_cost
from sparse_unified.analysis.statistics import FfnStatistics, StatisticsConfig
from sparse_unified.analysis.store import Shard, Store, open_store
from sparse_unified.checkpoint import files
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.modes import Part
from sparse_unified.experts.keep import Budget, select_layers
from sparse_unified.surgery import PruneHeadsConfig, PruneWidthConfig, SkipLayersConfig
from sparse_unified.surgery.cuts import PruneConfig
from sparse_unified.surgery.decoder import Decoder, as_module, find_adapter, takes_absent_parts
from sparse_unified.surgery.prune import changed, count_groups

Progress = Callable[[int, int, str], object]

logger = logging.getLogger(__name__)


class Axis(str, Enum):
    """Along what a model is made smaller."""

    DEPTH = "depth"  # layers that a component skips
    WIDTH = "width"  # neurons of its FFNs
    HEADS = "heads"  # groups of its attention heads


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """What to sweep, and how.

    Args:
        components: of the model, such as "und" and "gen".
        axes: `Axis` values or their names.
        ratios: shares that are kept, in (0, 1].
        criterion: what ranks the neurons along width, see `criteria`. Layers are ranked by
            similarity (drawn at random for `random`), heads by the magnitude of their weights.
        layers: which of them may lose something: "all", "middle", "a-b", or indices.
        part: what a skipped layer loses.
        budget: of width and heads: "uniform", every layer keeps the ratio, or "global".
        block_size: neurons go in blocks of so many.
        seed: of the criterion `random`.
        repeats: timed forwards per point.
        statistics: what is counted of the neurons while the dense model runs the samples.
    """

    components: tuple[str, ...]
    axes: tuple[Axis, ...] = (Axis.DEPTH, Axis.WIDTH)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    criterion: str = "activation"
    layers: str | tuple[int, ...] = "all"
    part: Part = Part.BLOCK
    budget: Budget = Budget.UNIFORM
    block_size: int = 1
    seed: int = 0
    repeats: int = 5
    statistics: StatisticsConfig = field(
        default_factory=lambda: StatisticsConfig(num_time_ranges=8)
    )

    def __post_init__(self) -> None:
        with context("analyze"):
            for name in ("components", "axes", "ratios"):
                given = getattr(self, name)
                if isinstance(given, str) or not given or len(set(given)) < len(given):
                    raise ValueError(f"{name} must be a list, each once, got {given!r}")
            if self.criterion not in CRITERIA:
                raise ValueError(
                    f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}"
                )
            check_int("repeats", self.repeats, 1)
            for axis in self.axes:
                choice("axes", Axis, axis)
            SkipLayersConfig(layers=(0,), part=self.part)
            for ratio in self.ratios:
                PruneWidthConfig(keep_ratio=ratio, budget=self.budget, block_size=self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult(Report):
    """A whole sweep, as `results.json` has it.

    Attributes:
        run: what was asked for.
        tasks: by name, what each has shown, once the dense model is measured on it:

            better      metric -> "lower" or "higher"
            dense       metrics of the model as it came
            cost        of it, see `Cost`
            idle        components without tokens in this task, so that they were not swept
            similarity  of its layers, see `Similarity`
            activation  what its neurons did, see `FfnStatistics.activation_maps`
            points      one row per point: its name, task, component, axis and keep_ratio (what is
                        kept in whole units, which may be more or less than asked for), the change
                        in words, skipped_layers, metrics, and the cost before and after
    """

    run: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]

    def to_text(self) -> str:
        parts = [
            "\n".join([name, _table(found), *_notes(name, found)])
            for name, found in self.tasks.items()
        ]
        if left := ", ".join(name for name in self.run["tasks"] if name not in self.tasks):
            parts.append(f"not finished: the dense model on {left} is left to another process")
        return "\n\n".join(parts)

    def to_markdown(self) -> str:
        """Returns the tables, before and after side by side, and the similarities."""
        parts = ["# Analysis", _settings(self.run)]
        for name, found in self.tasks.items():
            similarity = Similarity(layers=tuple(found["similarity"]))
            parts += [
                f"## {name}",
                "\n".join(_notes(name, found)),
                f"```\n{_table(found)}\n```",
                "Before -> after, in the same process. Times are medians and [least, most] of one "
                "forward, of the dense model right before and after each row; a ratio is given "
                "where these ranges stand apart. Memory is weights and results of operations. "
                "`kept` is what stayed in whole layers, neurons and groups of heads.",
                f"Similarity of the layers in {name} (cosine of what goes in and what comes "
                "out, after the residual add; near 1 changes little):",
                f"```\n{similarity.to_text()}\n```",
            ]
        return "\n\n".join(parts) + "\n"


@context("analyze")
def run_sweep(
    host: object,
    probes: Sequence[Probe],
    config: SweepConfig,
    out: StrPath,
    *,
    statistics: Mapping[str, FfnStatistics] | None = None,
    adapter: Decoder | None = None,
    description: Mapping[str, Any] | None = None,
    shard: Shard = (0, 1),
    progress: Progress | None = None,
) -> SweepResult:
    """Sweeps a live model and returns what was found; the model is left as it was.

    Args:
        host: a model, or a pipeline that holds it as `model`.
        probes: the tasks.
        config: what to go through.
        out: folder of the run; a run of the same is resumed.
        statistics: of neurons, by task, gathered before; other tasks are calibrated on their
            samples.
        adapter: of the model; None finds one.
        description: more plain values that a run that is resumed must have in common, such as the
            name of the model.
        shard: (i, n) measures every n-th point from the i-th on, the dense model being one; the
            last of n processes to finish writes the results of all.
        progress: called with points done, points in all, and the name of the next.

    Returns:
        what is finished so far, of all shards.

    Raises:
        ValueError: the model lacks a component, an axis or a layer, the folder is of another run,
            or an evaluator returns something else than finite numbers. Finished points are kept.
    """
    adapter = find_adapter(host) if adapter is None else adapter
    tasks = {probe.task: {"metrics": list(probe.better), **probe.description} for probe in probes}
    if not tasks or len(tasks) < len(probes):
        raise ValueError(f"tasks must be given once each, got {list(tasks)}")
    _check_model(adapter, config)
    stated = {**(description or {}), "sweep": asdict(config), "tasks": tasks}
    stated = json.loads(json.dumps(stated))  # as the folder will give it back
    given, show = statistics or {}, progress or (lambda *_: None)
    with open_store(out, stated, shard) as store:
        runs = [_TaskRun(host, adapter, p, config, store, given.get(p.task)) for p in probes]
        rows = [(run, row) for run in runs for row in run.rows]
        steps = rows[shard[0] :: shard[1]]
        for done, (run, row) in enumerate(steps):
            show(done, len(steps), f"{run.probe.task}: {row['name'] if 'axis' in row else 'dense'}")
            run.finish(row)
        show(len(steps), len(steps), "done")
        store.read()
        shown = [run for run in runs if run.rows[0]["name"] in store.records]
        result = SweepResult(run=stated, tasks={run.probe.task: run.result() for run in shown})
        if all(row["name"] in store.records for _, row in rows):
            store.finish(result.to_json(), result.to_markdown())
    return result


def _check_model(adapter: Decoder, config: SweepConfig) -> None:
    """Raises ValueError for a component, axis, layer or block size that a model does not allow."""
    for component in config.components:
        adapter.names(component)
    # An attention that components share would be lost to all of them at once.
    has_own_attentions = len(adapter.components) == 1 or all(
        takes_absent_parts(adapter.block(layer, component).layer_module)
        for component in adapter.components
        for layer in range(adapter.num_layers())
        if adapter.holds(layer, component)
    )
    for axis in config.axes:
        is_of_ffns = axis == Axis.WIDTH or (axis == Axis.DEPTH and config.part == Part.FFN)
        if not is_of_ffns and not has_own_attentions:
            raise ValueError(
                "axis must be width, or depth of the part ffn, for a model whose components share "
                f"the attentions, got {Axis(axis).value} and part {Part(config.part).value}"
            )
    layers = select_layers(config.layers, adapter.num_layers())
    for component in config.components if Axis.WIDTH in config.axes else ():
        for ffn in adapter.ffns(component):
            if ffn.layer in layers and ffn.intermediate_size % config.block_size:
                raise ValueError(
                    f"block_size must divide the {ffn.intermediate_size} neurons of {ffn.name}, "
                    f"got {config.block_size}"
                )


@dataclass
class _TaskRun:
    """One task of a sweep: observes the dense model once, then measures row after row.

    A row is what `points.jsonl` has of a point, first of all what it is; the first is of the model
    as it came.
    """

    host: object
    adapter: Decoder
    probe: Probe
    config: SweepConfig
    store: Store
    statistics: FfnStatistics | None

    def __post_init__(self) -> None:
        config, task = self.config, self.probe.task
        self.layers = select_layers(config.layers, self.adapter.num_layers())
        self.is_prepared = False
        self.similarity = self._observe()
        active = {entry["component"] for entry in self.similarity.layers}
        self.components = [name for name in config.components if name in active]
        self.rows: list[dict[str, Any]] = [{"name": f"{task}-dense"}]
        for component in self.components:
            for axis in map(Axis, config.axes):
                of = {"task": task, "component": component, "axis": axis.value}
                # Ratios between which no whole unit lies are one point.
                kept = {self._kept(component, axis, ratio) for ratio in config.ratios}
                for ratio in sorted(kept, reverse=True):
                    name = f"{task}-{component}-{axis.value}-{ratio:.3g}"
                    self.rows.append({**of, "keep_ratio": ratio, "name": name})

    def _kept(self, component: str, axis: Axis, ratio: float) -> float:
        """Returns the share of the layers, neurons or groups of heads that a ratio leaves whole."""
        if axis is Axis.DEPTH:
            counts = [len(self.similarity.cosines(component, layers=self.layers))]
        elif axis is Axis.WIDTH:
            ffns, size = self.adapter.ffns(component), self.config.block_size
            counts = [ffn.intermediate_size // size for ffn in ffns if ffn.layer in self.layers]
        else:
            held = [layer for layer in self.layers if self.adapter.holds(layer, component)]
            counts = [count_groups(self.adapter, component, layer) for layer in held]
        if not sum(counts):
            raise ValueError(
                f"layers must have a {axis.value} of {component} to prune, got {self.config.layers}"
            )
        if axis is not Axis.DEPTH and self.config.budget is Budget.GLOBAL:
            return max(len(counts), round(ratio * sum(counts))) / sum(counts)
        return sum(max(1, round(ratio * count)) for count in counts) / sum(counts)

    def _observe(self) -> Similarity:
        """Runs the dense model on the samples once, and observes layers and neurons meanwhile."""
        task, folder = self.probe.task, self.store.folder
        path = folder / f"similarity-{task}.json"
        counts = folder / f"statistics-{task}.safetensors"
        if self.statistics is not None:
            self.statistics.check(self.adapter)
        if path.exists():
            if self.statistics is None and counts.exists():
                self.statistics = FfnStatistics.load(counts)
            return Similarity.load(path)
        with ExitStack() as hooks:
            collector = None
            if self.statistics is None:
                counted = self.config.statistics
                try:
                    collector = hooks.enter_context(
                        collect(self.host, task, config=counted, adapter=self.adapter)
                    )
                except ValueError as error:
                    logger.warning("no statistics of neurons: %s", error)
            measured = hooks.enter_context(measure_similarity(self.adapter))
            self.probe.run(collector.begin if collector else lambda sample: None)
        if collector:
            self.statistics = collector.statistics()
            self.statistics.save(counts)
        found = measured.result()
        files.replace_file(path, (found.to_json() + "\n").encode())
        return found

    def finish(self, row: dict[str, Any]) -> None:
        """Measures what a row names, unless that was done before."""
        if row["name"] in self.store.records:
            return
        if not self.is_prepared:
            for function in self.probe.evaluators.values():
                getattr(function, "prepare", lambda host: None)(self.host)
            self.is_prepared = True
        if "axis" not in row:
            self.store.append({**row, "metrics": self._metrics(row["name"]), "cost": self._cost()})
            return
        mode, scores = self._mode(row) if row["keep_ratio"] < 1 else (None, None)
        before = self._cost()
        smaller: Any = nullcontext("nothing")
        if mode is not None:
            smaller = changed(
                self.host,
                mode,
                scores,
                adapter=self.adapter,
                component=row["component"],
                forward=lambda: self.probe.workload()(),
            )
        with smaller as change:
            after, metrics = self._cost(), self._metrics(row["name"])
        # Once more, so that what else the machine did meanwhile shows in the range of the times.
        again = self._cost()
        both = [*before["seconds_range"], *again["seconds_range"]]
        before["seconds"] = (before["seconds"] + again["seconds"]) / 2
        before["seconds_range"] = (min(both), max(both))
        skipped = list(mode.layers) if isinstance(mode, SkipLayersConfig) else []
        measured = {"metrics": metrics, "before": before, "after": after}
        self.store.append({**row, "change": change, "skipped_layers": skipped, **measured})

    def _mode(self, row: Mapping[str, Any]) -> tuple[PruneConfig, Any]:
        """Returns how the model becomes that of a row, and the scores."""
        config, component = self.config, row["component"]
        # The only component of a decoder that is not BAGEL's is its und.
        own: dict[str, Any] = {"component": component if component in FFN_NAMES else "und"}
        if row["axis"] == Axis.DEPTH:
            layers = self._skipped(component, row["keep_ratio"])
            return SkipLayersConfig(**own, layers=layers, part=config.part), None
        own |= {"layers": config.layers, "budget": config.budget, "keep_ratio": row["keep_ratio"]}
        if row["axis"] == Axis.HEADS:
            return PruneHeadsConfig(**own), None
        return PruneWidthConfig(**own, block_size=config.block_size), self.scores[component]

    @cached_property
    def scores(self) -> Mapping[str, Any]:
        """Of the dense model: asked for before the first point along width."""
        task, statistics = self.probe.task, self.statistics
        tasks = [task] if statistics is not None and task in statistics.tasks else None
        return score(
            self.config.criterion,
            self.adapter,
            statistics,
            tasks=tasks,
            components=self.components,
            seed=self.config.seed,
        )

    def _skipped(self, component: str, keep_ratio: float) -> tuple[int, ...]:
        """Returns the layers that go: the most redundant ones, or as many random ones."""
        found = self.similarity.left_out(component, keep_ratio, self.config.part, self.layers)
        if self.config.criterion == "random":
            legal = list(self.similarity.cosines(component, layers=self.layers))
            generator = torch.Generator().manual_seed(self.config.seed)
            order = torch.randperm(len(legal), generator=generator).tolist()
            found = tuple(sorted(legal[i] for i in order[: len(found)]))
        return found

    def _cost(self) -> dict[str, Any]:
        repeats = self.config.repeats
        return asdict(measure_cost(as_module(self.host), self.probe.workload, repeats=repeats))

    def _metrics(self, name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, function in self.probe.evaluators.items():
            getattr(function, "begin", lambda name: None)(name)
            found |= measure(function, self.host, where=f"{name}: {label}")
        return found

    def result(self) -> dict[str, Any]:
        """Returns what the task has shown, the dense model and some of its points, as recorded."""
        records = self.store.records
        dense, *points = (records[row["name"]] for row in self.rows if row["name"] in records)
        task, statistics = self.probe.task, self.statistics
        return {
            "better": self.probe.better,
            "dense": dense["metrics"],
            "cost": dense["cost"],
            "idle": [name for name in self.config.components if name not in self.components],
            "similarity": list(self.similarity.layers),
            "activation": statistics.activation_maps(task) if statistics else [],
            "points": points,
        }


# Tables


def _settings(run: Mapping[str, Any]) -> str:
    """Returns what was swept, on what samples and how they were sampled, in words."""
    swept = run["sweep"]
    lines = [f"Width by {swept['criterion']}, layers {swept['layers']}, seed {swept['seed']}."]
    for task, own in run["tasks"].items():
        if given := own.get("settings"):
            source = "from a file" if task in run.get("statistics", {}) else "of these samples"
            samples = f"{len(own['samples'])} samples ({settings_in_words(given)})"
            lines.append(f"{task}: {samples}; statistics {source}.")
    return "\n".join(lines)


def _table(found: Mapping[str, Any]) -> str:
    """Returns the table of a task, the dense model first."""
    names, dense = list(found["better"]), found["cost"]
    rows: list[list[object]] = [
        ["component", "axis", "kept", "change", *names, "parameters", "GFLOPs", "ms", "memory"],
        ["dense", "", "1", "", *(f"{found['dense'][n]:.4g}" for n in names), *_costs(dense)],
    ]
    for row in found["points"]:
        pairs = zip(_costs(row["before"]), _costs(row["after"]), strict=True)
        costs = [old if old == new else f"{old} -> {new}" for old, new in pairs]
        costs[2] += _speedup(row)
        kept, metrics = f"{row['keep_ratio']:g}", [f"{row['metrics'][n]:.4g}" for n in names]
        rows.append([row["component"], row["axis"], kept, row["change"], *metrics, *costs])
    return format_table(rows, header=True)


def _speedup(row: Mapping[str, Any]) -> str:
    """Returns " (2x)" of a point that changed something, if its times stand apart from those of
    the dense model; "" otherwise."""
    before, after = row["before"], row["after"]
    (low, high), (least, most) = before["seconds_range"], after["seconds_range"]
    if row["change"] == "nothing" or (least <= high and low <= most):
        return ""
    return f" ({before['seconds'] / after['seconds']:.2f}x)"


def _costs(cost: Mapping[str, Any]) -> list[str]:
    """Returns parameters, GFLOPs, milliseconds and bytes for people."""
    low, high = (f"{1e3 * seconds:.3g}" for seconds in cost["seconds_range"])
    flops, ms = f"{cost['flops'] / 1e9:.4g}", f"{1e3 * cost['seconds']:.3g} [{low}, {high}]"
    return [f"{cost['parameters']:,}", flops, ms, format_bytes(cost["peak_bytes"])]


def _notes(task: str, found: Mapping[str, Any]) -> list[str]:
    lines = [f"{metric}: {way} is better" for metric, way in found["better"].items()]
    if found["idle"]:
        idle = ", ".join(found["idle"])
        lines.append(f"Not swept: {idle} has no tokens in {task}, so it would change nothing.")
    return lines
