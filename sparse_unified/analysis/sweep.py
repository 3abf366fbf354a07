# SPDX-License-Identifier: Apache-2.0
"""Makes a model smaller point by point, measures it, and puts it back.

A sweep writes every point down as soon as it is finished; one that was interrupted goes on in the
same folder. Nothing is random but by its seeds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparse_unified.analysis.points import Axis, SweepConfig
from sparse_unified.analysis.probe import Probe
from sparse_unified.analysis.results import SweepResult
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.store import open_store
from sparse_unified.analysis.task_run import TaskRun
from sparse_unified.analysis.transforms import legal_axes
from sparse_unified.experts import select_layers
from sparse_unified.surgery.decoder import Adapter, find_adapter
from sparse_unified.surgery.temporary import read_attention

Progress = Callable[[int, int, str], object]


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
            TaskRun(host, adapter, probe, config, store, given.get(probe.task)) for probe in probes
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


def _check(adapter: Adapter, config: SweepConfig, probes: Sequence[Probe]) -> None:
    for component in config.components:
        if component not in adapter.components:
            raise ValueError(
                f"analyze: component must be one of {', '.join(adapter.components)}, "
                f"got {component!r}"
            )
    legal = legal_axes(adapter, config.part)
    for axis in config.axes:
        if axis not in legal:
            shared = "; its components share the attentions, so that"
            why = {
                Axis.DEPTH: f"{shared} of a layer they can skip part 'ffn' alone",
                Axis.HEADS: f"{shared} none of them can lose heads",
                Axis.WIDTH: "",
            }[axis]
            raise ValueError(
                f"analyze: axis must be one of {_names(legal)} for this model, "
                f"got {axis.value!r}{why}"
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
    if Axis.HEADS in config.axes and len(adapter.components) == 1:
        for layer in layers:
            read_attention(adapter, config.components[0], layer)
    tasks = [probe.task for probe in probes]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(
            f"analyze: tasks must be given once each, got {', '.join(tasks) or 'none'}"
        )


def _names(axes: Iterable[Axis]) -> str:
    return ", ".join(axis.value for axis in axes)
