# SPDX-License-Identifier: Apache-2.0
"""What quality is measured by: functions from a model to numbers, and tasks that bring them.

An evaluator is called with the model, or with the pipeline that holds it, and returns the value of
each metric that its attribute `better` names. Two more methods are called if they are there:
`prepare(model)` with the dense model before anything is changed, and `begin(name)` with the name of
each point of a sweep.
"""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sparse_unified.analysis.cost import Workload

Evaluator = Callable[[Any], Mapping[str, float]]
F = TypeVar("F", bound=Callable[..., Any])


def evaluator(**better: str) -> Callable[[F], F]:
    """Declares a function as an evaluator.

        @evaluator(loss="lower")
        def loss(model):
            return {"loss": float(model(input_ids=ids, labels=ids).loss)}

    Args:
        better: its metrics, each "lower" or "higher".
    """

    def declare(function: F) -> F:
        function.better = better  # type: ignore[attr-defined]
        directions(function, where=getattr(function, "__name__", "evaluator"))
        return function

    return declare


def directions(function: object, *, where: str) -> dict[str, str]:
    """Returns which way each metric of an evaluator improves; ValueError if it is none."""
    declared: Any = getattr(function, "better", None)
    is_mapping = isinstance(declared, Mapping) and bool(declared)
    if not callable(function) or not is_mapping or set(declared.values()) - {"lower", "higher"}:
        raise ValueError(
            f"{where}: evaluator must be callable and declare its metrics by "
            f'`better = {{"name": "lower" or "higher"}}`, got {function!r} with {declared!r:.120}'
        )
    return dict(declared)


def measure(function: Evaluator, model: object, *, where: str) -> dict[str, float]:
    """Runs an evaluator; ValueError if a metric is not there, not declared or not finite."""
    result, wanted = function(model), directions(function, where=where)
    if not isinstance(result, Mapping) or set(result) != set(wanted):
        raise ValueError(
            f"{where}: evaluator must return the metrics {', '.join(wanted)}, got {result!r:.120}"
        )
    values = {}
    for name, value in result.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise ValueError(f"{where}: metric {name} must be a finite number, got {value!r:.120}")
    return values


def load_evaluator(name: str) -> Evaluator:
    """Loads an evaluator, named `module:function` or `path/to/file.py:function`."""
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"--evaluator: name must be module:function, got {name!r}")
    try:
        if source.endswith(".py"):
            found: Any = runpy.run_path(source).get(attribute)
        else:
            found = getattr(importlib.import_module(source), attribute, None)
    except Exception as error:  # whatever the code of others raises
        raise ValueError(
            f"--evaluator: module {source} must be importable, got {type(error).__name__}: {error}"
        ) from error
    directions(found, where=f"--evaluator: {name}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A task that a model is put to: what it runs, and what it is measured by.

    Attributes:
        task: its name.
        evaluators: by name; each is given the model or pipeline that is swept.
        run: runs the model once on the samples of the task, which is observed meanwhile; it is
            given a function to call before each sample, with a unique name of the sample.
        workload: sets up the forward whose cost is measured.
        description: plain values that identify samples and settings; a sweep that is resumed must
            have the same.
    """

    task: str
    evaluators: Mapping[str, Evaluator]
    run: Callable[[Callable[[str], object]], object]
    workload: Workload
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        listed = [metric for own in self._directions() for metric in own]
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(f"{self.task}: evaluators must have metrics, each once, got {listed}")

    @property
    def better(self) -> dict[str, str]:
        """Which way each metric improves: "lower" or "higher"."""
        return {name: way for own in self._directions() for name, way in own.items()}

    def _directions(self) -> list[dict[str, str]]:
        given = self.evaluators.items()
        return [directions(function, where=f"{self.task}: {name}") for name, function in given]
