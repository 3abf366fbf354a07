# SPDX-License-Identifier: Apache-2.0
"""Makes a model smaller point by point, measures it, and restores it.

Every point is written to disk as soon as it is finished; a sweep that was interrupted is resumed in
the same folder. Nothing is random but by its seeds. Results are the plain values of `results.json`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from sparse_unified._common import Report, context, format_bytes, format_table
from sparse_unified.analysis.calibration import collect
from sparse_unified.analysis.cost import measure_cost
from sparse_unified.analysis.criteria import NeuronScores, score
from sparse_unified.analysis.evaluators import Probe, measure
from sparse_unified.analysis.points import Axis, Point, SweepConfig, legal_axes, made_smaller
from sparse_unified.analysis.records import Store, open_store
from sparse_unified.analysis.similarity import Similarity, measure_similarity
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.checkpoint.files import replace_file
from sparse_unified.experts import select_layers
from sparse_unified.surgery.decoder import Adapter, find_adapter
from sparse_unified.surgery.temporary import as_module, read_attention

Progress = Callable[[int, int, str], object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult(Report):
    """A whole sweep, as `results.json` has it.

    Attributes:
        run: what was asked for.
        tasks: by name, what each has shown:

            better      metric -> "lower" or "higher"
            dense       metrics of the model as it came
            cost        of it, see `Cost`
            idle        components without tokens in this task, so that they were not swept
            similarity  of its layers, see `LayerSimilarity`
            activation  what its neurons did, see `FfnStatistics.activation_maps`
            points      one row per point: its name, task, component, axis and keep_ratio, the
                        change in words, skipped_layers, metrics, and the cost before and after
    """

    run: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]

    def to_text(self) -> str:
        parts = []
        for name, found in self.tasks.items():
            parts.append(f"{name}\n{format_table(_rows(found), header=True)}")
            parts += [f"{metric}: {way} is better" for metric, way in found["better"].items()]
            parts += [*_idle(name, found), ""]
        return "\n".join(parts).rstrip()

    def to_markdown(self) -> str:
        """Returns the tables, before and after side by side, and the similarities."""
        parts = ["# Analysis", ""]
        for name, found in self.tasks.items():
            ways = ", ".join(f"{m} ({way} is better)" for m, way in found["better"].items())
            parts += [f"## {name}", "", f"Metrics: {ways}.", ""]
            for line in _idle(name, found):
                parts += [line, ""]
            parts += [*_markdown(_rows(found)), ""]
            parts += [
                "Each row was measured right after the dense model, in the same process: before -> "
                "after. FLOPs and memory are those of one forward; memory is weights and the "
                "results of operations.",
                "",
                f"Similarity of the layers in {name} (cosine of what goes in and what comes "
                "out, after the residual add; near 1 changes little):",
                "",
            ]
            rows: list[list[object]] = [["component", "layer", "block", "attention", "ffn"]]
            for entry in found["similarity"]:
                cosines = [f"{entry[part]:.4f}" for part in ("block", "attention", "ffn")]
                rows.append([entry["component"], entry["layer"], *cosines])
            parts += [*_markdown(rows), ""]
        return "\n".join(parts)


@context("analyze")
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
        out: folder of the run, see `records`; a run of the same is resumed.
        statistics: of neurons, by task, gathered before; other tasks are calibrated on their
            samples.
        adapter: of the model; None finds one.
        description: more plain values that a run that is resumed must have in common, such as the
            name of the model.
        progress: called with points done, points in all, and the name of the next.

    Raises:
        ValueError: the model lacks a component, an axis or a layer, the folder is of another run,
            or an evaluator returns something else than finite numbers. Finished points are kept.
    """
    adapter = find_adapter(host) if adapter is None else adapter
    _check(adapter, config, probes)
    stated = {
        **(description or {}),
        "sweep": asdict(config),
        "tasks": {
            probe.task: {"metrics": list(probe.better), **probe.description} for probe in probes
        },
    }
    stated = json.loads(json.dumps(stated))  # as the folder will give it back
    with open_store(out, stated) as store:
        given = statistics or {}
        runs = [
            _TaskRun(host, adapter, probe, config, store, given.get(probe.task)) for probe in probes
        ]
        steps = [(run, point) for run in runs for point in (None, *run.points)]
        for done, (run, point) in enumerate(steps):
            if progress is not None:
                name = "dense" if point is None else point.name
                progress(done, len(steps), f"{run.probe.task}: {name}")
            run.finish(point)
        if progress is not None:
            progress(len(steps), len(steps), "done")
        result = SweepResult(run=stated, tasks={run.probe.task: run.result() for run in runs})
        for name, text in (
            ("results.json", result.to_json() + "\n"),
            ("report.md", result.to_markdown()),
        ):
            replace_file(store.folder / name, text.encode())
    return result


class _TaskRun:
    """One task of a sweep: observes the dense model once, then measures point after point."""

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
        active = {entry.component for entry in self.similarity.layers}
        self.components = [name for name in config.components if name in active]
        self.points = config.points(probe.task, self.components)
        self._scores: NeuronScores | None = None
        self._is_prepared = False

    def finish(self, point: Point | None) -> None:
        """Measures a point, or the dense model, unless that was done before."""
        name = f"{self.probe.task}-dense" if point is None else point.name
        if name in self.store.records:
            return
        if not self._is_prepared:
            for function in self.probe.evaluators.values():
                getattr(function, "prepare", lambda host: None)(self.host)
            self._is_prepared = True
        if point is None:
            record = {"name": name, "metrics": self._metrics(name), "cost": self._cost()}
        else:
            record = self._measure(point)
        self.store.append(record)

    def result(self) -> dict[str, Any]:
        """Returns what the task has shown, from the records of the folder."""
        task = self.probe.task
        dense = self.store.records[f"{task}-dense"]
        return {
            "better": self.probe.better,
            "dense": dense["metrics"],
            "cost": dense["cost"],
            "idle": [name for name in self.config.components if name not in self.components],
            "similarity": [asdict(entry) for entry in self.similarity.layers],
            "activation": self.statistics.activation_maps(task) if self.statistics else [],
            "points": [self.store.records[point.name] for point in self.points],
        }

    def _observe(self) -> Similarity:
        """Runs the dense model on the samples once, and observes layers and neurons meanwhile."""
        task, folder = self.probe.task, self.store.folder
        path = folder / f"similarity-{task}.json"
        counts = folder / f"statistics-{task}.safetensors"
        if self.statistics is not None:
            self.statistics.check(self.adapter)
        is_watched = self.statistics is None and _has_plain_ffns(self.adapter)
        if path.exists() and (counts.exists() or not is_watched):
            if is_watched:
                self.statistics = FfnStatistics.load(counts)
            return Similarity.load(path)
        with ExitStack() as hooks:
            if is_watched:
                collector = hooks.enter_context(
                    collect(self.host, task, config=self.config.statistics, adapter=self.adapter)
                )
            measured = hooks.enter_context(measure_similarity(self.adapter))
            self.probe.run(collector.begin if is_watched else lambda sample: None)
        if is_watched:
            self.statistics = collector.statistics()
            self.statistics.save(counts)
        found = measured.result()
        replace_file(path, (found.to_json() + "\n").encode())
        return found

    def _rank(self) -> NeuronScores:
        """Returns the scores of the neurons of the components that take part."""
        task = self.probe.task
        has_task = self.statistics is not None and task in self.statistics.tasks
        return score(
            self.config.criterion,
            self.adapter,
            self.statistics,
            tasks=[task] if has_task else None,
            components=self.components,
            seed=self.config.seed,
        )

    def _measure(self, point: Point) -> dict[str, Any]:
        if point.axis is Axis.WIDTH and self._scores is None:
            self._scores = self._rank()
        before = self._cost()
        with made_smaller(
            self.host,
            self.adapter,
            point,
            self.config,
            similarity=self.similarity,
            forward=lambda: self.probe.workload()(),
            scores=self._scores,
        ) as (change, skipped_layers):
            after = self._cost()
            metrics = self._metrics(point.name)
        return {
            "name": point.name,
            "task": point.task,
            "component": point.component,
            "axis": point.axis.value,
            "keep_ratio": point.keep_ratio,
            "change": change,
            "skipped_layers": list(skipped_layers),
            "metrics": metrics,
            "before": before,
            "after": after,
        }

    def _cost(self) -> dict[str, Any]:
        model, repeats = as_module(self.host), self.config.repeats
        return measure_cost(model, self.probe.workload, repeats=repeats).to_dict()

    def _metrics(self, name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, function in self.probe.evaluators.items():
            getattr(function, "begin", lambda name: None)(name)
            try:
                found |= measure(function, self.host, where=f"{name}: {label}")
            except ValueError as error:
                raise ValueError(
                    f"{error}; the {len(self.store.records)} points finished before are kept in "
                    f"{self.store.folder}"
                ) from error
        return found


def _has_plain_ffns(adapter: Adapter) -> bool:
    """Tells whether neurons can be observed; where not, a warning names the FFN in the way."""
    try:
        for component in adapter.components:
            adapter.ffns(component)
    except ValueError as error:
        logger.warning("no statistics of neurons: %s", error)
        return False
    return True


def _check(adapter: Adapter, config: SweepConfig, probes: Sequence[Probe]) -> None:
    """Raises ValueError for what the model lacks, before anything is run."""
    for component in config.components:
        if component not in adapter.components:
            raise ValueError(
                f"component must be one of {', '.join(adapter.components)}, got {component!r}"
            )
    legal = legal_axes(adapter, config.part)
    for axis in config.axes:
        if axis not in legal:
            raise ValueError(
                f"axis must be one of {', '.join(a.value for a in legal)} for this model, "
                f"got {axis.value!r}; its components share the attentions, so that they can skip "
                "part 'ffn' of a layer alone, and lose no heads"
            )
    layers = select_layers(config.layers, adapter.num_layers())
    if Axis.WIDTH in config.axes:
        for component in config.components:
            for ffn in adapter.ffns(component):
                if ffn.layer in layers and ffn.intermediate_size % config.block_size:
                    raise ValueError(
                        f"block_size must divide the {ffn.intermediate_size} neurons of "
                        f"{ffn.name}, got {config.block_size}"
                    )
    if Axis.HEADS in config.axes and len(adapter.components) == 1:
        for layer in layers:
            read_attention(adapter, config.components[0], layer)
    tasks = [probe.task for probe in probes]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must be given once each, got {', '.join(tasks) or 'none'}")


# Tables


def _rows(found: Mapping[str, Any]) -> list[list[object]]:
    """Returns the table of a task, headings first and the dense model second."""
    names, dense = list(found["better"]), found["cost"]
    rows: list[list[object]] = [
        ["component", "axis", "kept", "change", *names, "parameters", "FLOPs", "ms", "memory"],
        ["dense", "", "1", "", *(f"{found['dense'][n]:.4g}" for n in names), *_texts(dense)],
    ]
    for row in found["points"]:
        costs = [
            before if before == after else f"{before} -> {after}"
            for before, after in zip(_texts(row["before"]), _texts(row["after"]), strict=True)
        ]
        costs[2] += f" ({row['before']['seconds'] / row['after']['seconds']:.2f}x)"
        kept, metrics = f"{row['keep_ratio']:g}", [f"{row['metrics'][n]:.4g}" for n in names]
        rows.append([row["component"], row["axis"], kept, row["change"], *metrics, *costs])
    return rows


def _texts(cost: Mapping[str, Any]) -> list[str]:
    """Returns parameters, FLOPs, milliseconds and bytes for people."""
    flops, unit = float(cost["flops"]), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if flops < 1000 or unit == "P":
            break
        flops /= 1000
    return [
        f"{cost['parameters']:,}",
        f"{flops:.3g}{unit}" if unit != "P" else f"{flops:.4g}P",
        f"{1e3 * cost['seconds']:.3g}",
        format_bytes(cost["peak_bytes"]),
    ]


def _idle(task: str, found: Mapping[str, Any]) -> list[str]:
    if not found["idle"]:
        return []
    return [
        f"Not swept: {', '.join(found['idle'])} has no tokens in {task}, "
        "so nothing of it would change the result."
    ]


def _markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    head, *body = [[str(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]
