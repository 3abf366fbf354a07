# SPDX-License-Identifier: Apache-2.0
"""One task of a sweep: watch the dense model once, then measure point after point."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from sparse_unified.analysis import evaluate
from sparse_unified.analysis.activation import activation_maps
from sparse_unified.analysis.collect import collect
from sparse_unified.analysis.cost import Cost, measure_cost
from sparse_unified.analysis.criteria import NeuronScores, score
from sparse_unified.analysis.plain import from_plain, numbers
from sparse_unified.analysis.points import Axis, Point, SweepConfig
from sparse_unified.analysis.probe import Probe
from sparse_unified.analysis.results import PointResult, TaskResult
from sparse_unified.analysis.similarity import Similarity, measure_similarity
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.store import Store
from sparse_unified.analysis.transforms import transformed
from sparse_unified.surgery.decoder import Adapter
from sparse_unified.surgery.temporary import as_module

logger = logging.getLogger(__name__)


class TaskRun:
    """One task of a sweep; see `run_sweep`."""

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
        where = str(self.store.folder)
        dense = self.store.records[f"{self.probe.task}-dense"]
        points = self.points()
        active = {entry.component for entry in self.similarity.layers}
        return TaskResult(
            task=self.probe.task,
            better=self.probe.better(),
            dense=numbers(dense.get("metrics"), f"{where}: metrics of {dense['name']}"),
            cost=from_plain(Cost, dense.get("cost"), f"{where}: cost of {dense['name']}"),
            similarity=self.similarity,
            activation=(
                [] if self.statistics is None else activation_maps(self.statistics, self.probe.task)
            ),
            points=[PointResult.from_record(self.store.records[p.name], where) for p in points],
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
            return Similarity.load(path)
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
            workload=self.probe.workload,
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
