# SPDX-License-Identifier: Apache-2.0
"""What a sweep has found, as data, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_unified._common import Report, format_bytes, format_table
from sparse_unified.analysis.activation import ActivationMap
from sparse_unified.analysis.cost import Cost
from sparse_unified.analysis.evaluate import Better
from sparse_unified.analysis.plain import from_plain, numbers
from sparse_unified.analysis.points import Axis, Point
from sparse_unified.analysis.similarity import Similarity

_ARROWS = {Better.LOWER: "lower is better", Better.HIGHER: "higher is better"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """One smaller model, beside the dense one as it was measured right before it.

    Attributes:
        change: what was done to the model, in words.
        skipped_layers: along depth, those the component skips.
    """

    point: Point
    metrics: Mapping[str, float]
    before: Cost
    after: Cost
    change: str
    skipped_layers: tuple[int, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Returns plain values, with the name of the point."""
        return {
            "name": self.point.name,
            "task": self.point.task,
            "component": self.point.component,
            "axis": self.point.axis.value,
            "keep_ratio": self.point.keep_ratio,
            "change": self.change,
            "skipped_layers": list(self.skipped_layers),
            "metrics": dict(self.metrics),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "point") -> PointResult:
        """Reads what `to_record` wrote; `where` is its file, for the message.

        Raises:
            ValueError: it is damaged.
        """
        place = f"{where}: {record.get('name')!r:.120}"
        task, component = record.get("task"), record.get("component")
        ratio, change = record.get("keep_ratio"), record.get("change")
        skipped = record.get("skipped_layers")
        if not (
            all(isinstance(text, str) for text in (task, component, change))
            and record.get("axis") in [axis.value for axis in Axis]
            and type(ratio) in (int, float)
            and isinstance(skipped, list)
            and all(type(layer) is int for layer in skipped)
        ):
            raise ValueError(f"{place} must be a point as analyze writes it, got {record!r:.240}")
        return cls(
            point=Point(
                task=str(task),
                component=str(component),
                axis=Axis(record["axis"]),
                keep_ratio=record["keep_ratio"],
            ),
            metrics=numbers(record.get("metrics"), f"{place}: metrics"),
            before=from_plain(Cost, record.get("before"), f"{place}: before"),
            after=from_plain(Cost, record.get("after"), f"{place}: after"),
            change=str(change),
            skipped_layers=tuple(record["skipped_layers"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What one task has shown.

    Attributes:
        better: which way each metric improves.
        dense: metrics of the model as it came; cost: what it costs.
        similarity: of its layers.
        activation: what its neurons did, by component; none where the FFNs are not dense.
        points: finished ones, in the order of the sweep.
        idle: components that have no tokens in this task, so that nothing of them was swept.
    """

    task: str
    better: Mapping[str, Better]
    dense: Mapping[str, float]
    cost: Cost
    similarity: Similarity
    points: Sequence[PointResult]
    activation: Sequence[ActivationMap] = ()
    idle: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult(Report):
    """A whole sweep.

    Attributes:
        run: what was asked for.
        tasks: what each has shown.
    """

    run: Mapping[str, Any]
    tasks: Sequence[TaskResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": dict(self.run),
            "tasks": {
                result.task: {
                    "better": {name: way.value for name, way in result.better.items()},
                    "dense": dict(result.dense),
                    "cost": result.cost.to_dict(),
                    "idle": list(result.idle),
                    "similarity": list(result.similarity.to_dict()["layers"]),
                    "activation": [found.to_dict() for found in result.activation],
                    "points": [point.to_record() for point in result.points],
                }
                for result in self.tasks
            },
        }

    def to_text(self) -> str:
        parts = []
        for result in self.tasks:
            parts.append(f"{result.task}\n{format_table(task_rows(result), header=True)}")
            parts += [f"{name}: {_ARROWS[way]}" for name, way in result.better.items()]
            parts += [_idle(result)] if result.idle else []
            parts.append("")
        return "\n".join(parts).rstrip()

    def to_markdown(self) -> str:
        """Returns the tables, before and after side by side, and the similarities."""
        parts = ["# Analysis", ""]
        for result in self.tasks:
            ways = ", ".join(f"{name} ({_ARROWS[way]})" for name, way in result.better.items())
            parts += [f"## {result.task}", "", f"Metrics: {ways}.", ""]
            parts += [_idle(result), ""] if result.idle else []
            parts += [*_markdown(task_rows(result)), ""]
            parts += [
                "Each row was measured right after the dense model, in the same process: before -> "
                "after. FLOPs and memory are those of one forward; memory is weights and the "
                "results of operations.",
                "",
                f"Similarity of the layers in {result.task} (cosine of what goes in and what comes "
                "out, after the residual add; near 1 changes little):",
                "",
            ]
            rows: list[list[object]] = [["component", "layer", "block", "attention", "ffn"]]
            for entry in result.similarity.layers:
                cosines = [f"{v:.4f}" for v in (entry.block, entry.attention, entry.ffn)]
                rows.append([entry.component, entry.layer, *cosines])
            parts += [*_markdown(rows), ""]
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.to_text()


def task_rows(result: TaskResult) -> list[list[object]]:
    """Returns the table of a task, headings first and the dense model second."""
    names = list(result.better)
    cost = result.cost
    rows: list[list[object]] = [
        ["component", "axis", "kept", "change", *names, "parameters", "FLOPs", "ms", "memory"],
        [
            "dense",
            "",
            "1",
            "",
            *(_number(result.dense[name]) for name in names),
            f"{cost.parameters:,}",
            _flops(cost.flops),
            f"{1e3 * cost.seconds:.3g}",
            format_bytes(cost.peak_bytes),
        ],
    ]
    for entry in result.points:
        before, after = entry.before, entry.after
        rows.append(
            [
                entry.point.component,
                entry.point.axis.value,
                f"{entry.point.keep_ratio:g}",
                entry.change,
                *(_number(entry.metrics[name]) for name in names),
                _change(f"{before.parameters:,}", f"{after.parameters:,}"),
                _change(_flops(before.flops), _flops(after.flops)),
                _change(f"{1e3 * before.seconds:.3g}", f"{1e3 * after.seconds:.3g}")
                + f" ({before.seconds / after.seconds:.2f}x)",
                _change(format_bytes(before.peak_bytes), format_bytes(after.peak_bytes)),
            ]
        )
    return rows


def _idle(result: TaskResult) -> str:
    return (
        f"Not swept: {', '.join(result.idle)} has no tokens in {result.task}, "
        "so nothing of it would change the result."
    )


def _markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    head, *body = [[str(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _flops(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g}P"
