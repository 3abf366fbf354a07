# SPDX-License-Identifier: Apache-2.0
"""What a model is measured by: quality, functions from it to numbers that tasks bring, and cost.

An evaluator is called with the model, or with the pipeline that holds it, and returns the value of
each metric that its attribute `better` names. Two more methods are called if they are there:
`prepare(model)` with the dense model before anything is changed, and `begin(name)` with the name of
each point of a sweep; one with `begin` may have no metrics, and write something for each point.
"""

from __future__ import annotations

import importlib
import math
import runpy
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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
    is_mapping = isinstance(declared, Mapping) and (declared or hasattr(function, "begin"))
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
    found: Evaluator = load_function(name, "--evaluator")
    directions(found, where=f"--evaluator: {name}")
    return found


def load_function(name: str, option: str) -> Any:
    """Loads what `module:function` or `path/to/file.py:function` names; None if it is not there."""
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"{option}: name must be module:function, got {name!r}")
    try:
        if source.endswith(".py"):
            return runpy.run_path(source).get(attribute)
        return getattr(importlib.import_module(source), attribute, None)
    except Exception as error:  # whatever the code of others raises
        raise ValueError(
            f"{option}: module {source} must be importable, got {type(error).__name__}: {error}"
        ) from error


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
        better: which way each metric improves, "lower" or "higher"; told by the evaluators.
    """

    task: str
    evaluators: Mapping[str, Evaluator]
    run: Callable[[Callable[[str], object]], object]
    workload: Workload
    description: Mapping[str, Any] = field(default_factory=dict)

    better: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        own = [directions(f, where=f"{self.task}: {name}") for name, f in self.evaluators.items()]
        listed = [metric for metrics in own for metric in metrics]
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(f"{self.task}: evaluators must have metrics, each once, got {listed}")
        object.__setattr__(self, "better", {m: way for found in own for m, way in found.items()})


# Cost. Parameters and bytes are those of the tensors the model holds. FLOPs and the memory of
# activations are counted over the operations of one real forward, so that what a transform claims
# to have removed and still runs is seen. Time is the median of several forwards, with its range.


# A forward, set up for the model as it is now: contexts of another model would not fit.
Workload = Callable[[], Callable[[], object]]
Shape = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one forward of a model takes.

    Attributes:
        parameters: of the model, in all.
        weight_bytes: of its parameters and buffers.
        flops: multiplications and additions of the forward's matrix products, attention included.
        seconds: median of the forwards. seconds_range: the least and the most of them.
        peak_bytes: weights, and the most that the results of operations held at one time; what a
            kernel allocates inside is not seen.
    """

    parameters: int
    weight_bytes: int
    flops: int
    seconds: float
    seconds_range: tuple[float, float]
    peak_bytes: int


def measure_cost(model: nn.Module, workload: Workload, *, repeats: int = 5) -> Cost:
    """Measures a model at work.

    Args:
        model: its weights count, every tensor once.
        workload: sets the forward up.
        repeats: timed forwards, after two that are not.
    """
    weights = [*model.parameters(), *model.buffers()]
    weight_bytes = sum(weight.nbytes for weight in weights)
    seconds, wait = [], lambda: None
    if any(weight.is_cuda for weight in weights):
        wait = partial(torch.cuda.synchronize, weights[0].device)
    with torch.no_grad():
        forward, memory = workload(), ActivationMemory()
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as flops, memory:
            forward()
        forward()
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            forward()
            wait()
            seconds.append(time.perf_counter() - start)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes,
        flops=flops.get_total_flops(),
        seconds=median(seconds),
        seconds_range=(min(seconds), max(seconds)),
        peak_bytes=weight_bytes + memory.peak,
    )


class ActivationMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> object:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(out).items():
            if key not in given and key not in self._live:
                self._live[key] = storage.nbytes()
                self.peak = max(self.peak, sum(self._live.values()))
                weakref.finalize(storage, self._live.pop, key)
        return out


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """Returns the storages of the tensors in nested containers, by what identifies them."""
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return {storage._cdata: storage for storage in storages}


def _formulas() -> dict[Any, Callable[..., int]]:
    """Returns the FLOPs, from shapes, of operations that torch's counter does not know."""

    def grouped(row_token: Shape, offsets: Shape, gate_proj: Shape) -> int:
        return 6 * row_token[0] * math.prod(gate_proj) // (offsets[0] - 1)

    ours = torch.ops.sparse_unified
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, *_, **__: 4 * math.prod(query) * key[-2]
        ),
        ours.route_topk: lambda x, gate, *_, **__: 2 * x[0] * math.prod(gate),
        ours.grouped_ffn: lambda *a, **_: grouped(*a[1:4]),
        # x, weights, row_token, token_rows, expert_offsets, gate_proj, ...
        ours.grouped_ffn_combine: lambda *a, **_: grouped(a[2], a[4], a[5]),
        ours.pruned_ffn: lambda x, kept, gate, up, down, block_size, *_, **__: (
            6 * math.prod(x) * kept[0] * block_size
        ),
    }
