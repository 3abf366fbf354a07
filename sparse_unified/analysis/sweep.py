# SPDX-License-Identifier: Apache-2.0
"""Makes a model smaller point by point, measures it, and puts it back.

A sweep writes every point down as soon as it is finished; one that was interrupted goes on in the
same folder. Nothing is random but by its seeds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from sparse_unified.analysis import evaluate
from sparse_unified.analysis.activation import activation_maps
from sparse_unified.analysis.adapter import Adapter, find_adapter
from sparse_unified.analysis.collect import collect
from sparse_unified.analysis.cost import Cost, Workload, measure_cost
from sparse_unified.analysis.criteria import NeuronScores, score
from sparse_unified.analysis.evaluate import Better, Evaluator
from sparse_unified.analysis.points import Axis, Point, SweepConfig
from sparse_unified.analysis.results import PointResult, SweepResult, TaskResult
from sparse_unified.analysis.similarity import LayerSimilarity, Similarity, measure_similarity
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.store import Store, open_store
from sparse_unified.analysis.surgery import as_module
from sparse_unified.analysis.transforms import legal_axes, transformed
from sparse_unified.partition import select_layers

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A task that a model is put to.

    Attributes:
        task: its name.
        evaluators: by name; each is given the model or pipeline that is swept.
        run: lets the model go through the samples of the task once, for what is observed meanwhile;
            it is given a function to call before each sample, with a text that tells it apart.
        workload: sets up the forward whose cost is measured.
        description: plain values that tell the samples and settings; a sweep that goes on must
            have the same.
    """

    task: str
    evaluators: Mapping[str, Evaluator]
    run: Callable[[Callable[[str], object]], object]
    workload: Workload
    description: Mapping[str, Any] = field(default_factory=dict)

    def better(self) -> dict[str, Better]:
        """Returns which way each metric improves.

        Raises:
            ValueError: there are no evaluators, one is none, or two have a metric in common.
        """
        found: dict[str, Better] = {}
        for name, function in self.evaluators.items():
            for metric, way in evaluate.directions(function, where=name).items():
                if metric in found:
                    raise ValueError(
                        f"{self.task}: metric {metric} must come from one evaluator, "
                        f"got a second one, {name}"
                    )
                found[metric] = way
        if not found:
            raise ValueError(f"{self.task}: evaluators must be at least one, got none")
        return found


def run_sweep(
    host: object,
    probes: Sequence[Probe],
    config: SweepConfig,
    out: str | os.PathLike[str],
    *,
    statistics: Mapping[str, FfnStatistics] | None = None,
    adapter: Adapter | None = None,
    description: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Sweeps a live model and returns what was found; the model is left as it was.

    Args:
        host: a model, or a pipeline that holds it as `model`.
        probes: the tasks.
        config: what to go through.
        out: folder of the run, see `store`; a run of the same is gone on with.
        statistics: of neurons, by task, gathered before; other tasks are calibrated on their
            samples.
        adapter: of the model; None finds one.
        description: more plain values that a run that goes on must have in common, such as the
            name of the model.
        progress: called with points done, points in all, and the name of the next.

    Raises:
        ValueError: the model lacks a component, an axis or a layer, the folder is of another run,
            or an evaluator returns something else than finite numbers. Finished points are kept.
    """
    adapter = find_adapter(host) if adapter is None else adapter
    _check(adapter, config, probes)
    better = {probe.task: probe.better() for probe in probes}
    stated = {
        **(description or {}),
        "sweep": config.to_dict(),
        "tasks": {
            probe.task: {"metrics": list(better[probe.task]), **probe.description}
            for probe in probes
        },
    }
    stated = json.loads(json.dumps(stated))  # as the folder will give it back
    with open_store(out, stated) as store:
        given = statistics or {}
        runs = [
            _Run(host, adapter, probe, config, store, given.get(probe.task)) for probe in probes
        ]
        total = sum(1 + len(run.points()) for run in runs)
        done = 0
        for run in runs:
            for name in ["dense", *(point.name for point in run.points())]:
                if progress is not None:
                    progress(done, total, f"{run.probe.task}: {name}")
                run.finish(name)
                done += 1
        if progress is not None:
            progress(done, total, "done")
        result = SweepResult(run=stated, tasks=[run.result() for run in runs])
        store.write("results.json", result.to_json() + "\n")
        store.write("report.md", result.to_markdown())
    return result


class _Run:
    """One task of a sweep."""

    def __init__(
        self,
        host: object,
        adapter: Adapter,
        probe: Probe,
        config: SweepConfig,
        store: Store,
        statistics: FfnStatistics | None,
    ) -> None:
        self.host, self.adapter, self.probe = host, adapter, probe
        self.config, self.store, self.statistics = config, store, statistics
        self.similarity = self._observe()
        self._scores: NeuronScores | None = None
        self._prepared = False

    def points(self) -> list[Point]:
        """Returns the points of the components that have tokens in this task."""
        active = {entry.component for entry in self.similarity.layers}
        return self.config.points(self.probe.task, active)

    def finish(self, name: str) -> None:
        """Measures the point of a name, or the dense model, unless that was done before."""
        recorded = f"{self.probe.task}-dense" if name == "dense" else name
        if recorded in self.store.records:
            return
        if not self._prepared:
            for function in self.probe.evaluators.values():
                evaluate.prepare(function, self.host)
            self._prepared = True
        if name == "dense":
            record = {
                "name": recorded,
                "metrics": self._metrics(recorded),
                "cost": self._cost().to_dict(),
            }
        else:
            point = next(point for point in self.points() if point.name == name)
            record = self._measure(point).to_record()
        self.store.append(record)

    def result(self) -> TaskResult:
        """Returns what the task has shown, from what is written down."""
        dense = self.store.records[f"{self.probe.task}-dense"]
        points = self.points()
        active = {entry.component for entry in self.similarity.layers}
        return TaskResult(
            task=self.probe.task,
            better=self.probe.better(),
            dense=dense["metrics"],
            cost=Cost(**dense["cost"]),
            similarity=self.similarity,
            activation=(
                [] if self.statistics is None else activation_maps(self.statistics, self.probe.task)
            ),
            points=[PointResult.from_record(self.store.records[p.name]) for p in points],
            idle=[name for name in self.config.components if name not in active],
        )

    def _observe(self) -> Similarity:
        """Lets the dense model run the samples once, and watches layers and neurons meanwhile."""
        task = self.probe.task
        path = self.store.folder / f"similarity-{task}.json"
        counts = self.store.folder / f"statistics-{task}.safetensors"
        if self.statistics is not None:
            self.statistics.check(self.adapter)
        watch = self.statistics is None and has_dense_ffns(self.adapter)
        if path.exists() and (counts.exists() or not watch):
            if watch:
                self.statistics = FfnStatistics.load(counts)
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
            return Similarity(layers=tuple(LayerSimilarity(**entry) for entry in layers))
        with ExitStack() as watched:
            begin: Callable[[str], object] = _ignore
            if watch:
                collector = watched.enter_context(
                    collect(
                        self.host,
                        task,
                        config=self.config.statistics,
                        adapter=self.adapter,
                    )
                )
                begin = collector.begin
            measured = watched.enter_context(measure_similarity(self.adapter))
            self.probe.run(begin)
        if watch:
            self.statistics = collector.statistics()
            self.statistics.save(counts)
        found = measured.result()
        self.store.write(path.name, found.to_json() + "\n")
        return found

    def _rank(self) -> NeuronScores:
        """Returns the scores of the neurons of the components that take part."""
        active = {entry.component for entry in self.similarity.layers}
        components = [name for name in self.config.components if name in active]
        tasks = None
        if self.statistics is not None and self.probe.task in self.statistics.tasks:
            tasks = [self.probe.task]
        return score(
            self.config.criterion,
            self.adapter,
            self.statistics,
            tasks=tasks,
            components=components,
            seed=self.config.seed,
        )

    def _measure(self, point: Point) -> PointResult:
        if point.axis is Axis.WIDTH and self._scores is None:
            self._scores = self._rank()
        before = self._cost()
        with transformed(
            self.host,
            self.adapter,
            point,
            self.config,
            similarity=self.similarity,
            scores=self._scores,
        ) as change:
            after = self._cost()
            metrics = self._metrics(point.name)
        return PointResult(
            point=point,
            metrics=metrics,
            before=before,
            after=after,
            change=change.text,
            skipped_layers=change.skipped_layers,
        )

    def _cost(self) -> Cost:
        return measure_cost(as_module(self.host), self.probe.workload, repeats=self.config.repeats)

    def _metrics(self, name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, function in self.probe.evaluators.items():
            begin = getattr(function, "begin", None)
            if begin is not None:
                begin(name)
            try:
                found |= evaluate.measure(function, self.host, where=f"analyze: {name}: {label}")
            except ValueError as error:
                raise ValueError(
                    f"{error}; the {len(self.store.records)} points finished before are kept in "
                    f"{self.store.folder}"
                ) from error
        return found


def _check(adapter: Adapter, config: SweepConfig, probes: Sequence[Probe]) -> None:
    for component in config.components:
        if component not in adapter.components:
            raise ValueError(
                f"analyze: component must be one of {', '.join(adapter.components)}, "
                f"got {component!r}"
            )
    legal = legal_axes(adapter)
    for axis in config.axes:
        if axis not in legal:
            raise ValueError(
                f"analyze: axis must be one of {_names(legal)} for this model, got {axis.value!r}"
            )
    layers = select_layers(config.layers, adapter.num_layers())
    if Axis.WIDTH in config.axes:
        for component in config.components:
            for ffn in adapter.ffns(component):
                if ffn.layer in layers and ffn.intermediate_size % config.block_size:
                    raise ValueError(
                        f"analyze: block_size must divide the {ffn.intermediate_size} neurons of "
                        f"{ffn.name}, got {config.block_size}"
                    )
    tasks = [probe.task for probe in probes]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(
            f"analyze: tasks must be given once each, got {', '.join(tasks) or 'none'}"
        )


def has_dense_ffns(adapter: Adapter) -> bool:
    """Tells whether neurons can be watched; where not, a warning says which FFN is in the way."""
    try:
        for component in adapter.components:
            adapter.ffns(component)
    except ValueError as error:
        logger.warning("no statistics of neurons: %s", error)
        return False
    return True


def _ignore(sample: str) -> None:
    """Stands for a collector where there is nothing to collect."""


def _names(axes: Iterable[Axis]) -> str:
    return ", ".join(axis.value for axis in axes)
