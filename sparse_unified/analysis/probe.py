# SPDX-License-Identifier: Apache-2.0
"""A task that a model is put to: what it runs, and what it is measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_unified.analysis import evaluate
from sparse_unified.analysis.cost import Workload
from sparse_unified.analysis.evaluate import Better, Evaluator


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
