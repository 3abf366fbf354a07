# SPDX-License-Identifier: Apache-2.0
"""What quality is measured by.

An evaluator is called with the model, or with the pipeline that holds it, and returns numbers by
name; its attribute `better` says for each name whether lower or higher is better. A function of
one's own becomes one by the decorator `evaluator`. An evaluator that compares with the dense model
has a method `prepare`, which is called with it before anything is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar


class Better(str, Enum):
    """Which way a metric improves."""

    LOWER = "lower"
    HIGHER = "higher"


class Evaluator(Protocol):
    """Measures a model; see the module."""

    better: Mapping[str, Better]

    def __call__(self, model: Any, /) -> Mapping[str, float]:
        """Returns the value of every metric that `better` names."""


F = TypeVar("F", bound=Callable[..., Any])


def evaluator(**better: Better | str) -> Callable[[F], F]:
    """Declares a function as an evaluator: its metrics, each "lower" or "higher".

    Raises:
        ValueError: a direction is neither, or there is none.
    """

    def declare(function: F) -> F:
        function.better = better  # type: ignore[attr-defined]
        directions(function, where=getattr(function, "__name__", "evaluator"))
        return function

    return declare


def directions(function: object, *, where: str) -> dict[str, Better]:
    """Returns which way each metric of an evaluator improves.

    Raises:
        ValueError: it is no evaluator, or a direction is neither "lower" nor "higher".
    """
    declared = getattr(function, "better", None)
    if not callable(function) or not isinstance(declared, Mapping) or not declared:
        raise ValueError(
            f"{where}: evaluator must be callable and declare its metrics by "
            f'`better = {{"name": "lower" or "higher"}}`, got {function!r}'
        )
    found = {}
    for name, direction in declared.items():
        try:
            found[str(name)] = Better(direction)
        except ValueError:
            raise ValueError(
                f"{where}: metric {name} must be better 'lower' or 'higher', got {direction!r}"
            ) from None
    return found


def prepare(function: Evaluator, model: object) -> None:
    """Lets an evaluator see the dense model, if it wants to."""
    wanted = getattr(function, "prepare", None)
    if wanted is not None:
        wanted(model)


def measure(function: Evaluator, model: object, *, where: str) -> dict[str, float]:
    """Runs an evaluator.

    Raises:
        ValueError: what it returns is not what it declared, or not finite.
    """
    better = directions(function, where=where)
    result = function(model)
    if not isinstance(result, Mapping) or set(result) != set(better):
        got = sorted(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
        raise ValueError(
            f"{where}: evaluator must return the metrics {', '.join(better)}, got {got}"
        )
    values = {}
    for name in better:
        try:
            values[name] = float(result[name])
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: metric {name} must be a number, got {result[name]!r}"
            ) from None
        if not math.isfinite(values[name]):
            raise ValueError(f"{where}: metric {name} must be finite, got {values[name]}")
    return values


def load_evaluator(name: str) -> Evaluator:
    """Loads an evaluator, named `module:function` or `path/to/file.py:function`.

    Raises:
        ValueError: there is no such module or function, or it is no evaluator.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"--evaluator: name must be module:function, got {name!r}")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"--evaluator: {source} must define {attribute}, got a module without it")
    directions(found, where=f"--evaluator: {name}")
    return found


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--evaluator: module {name} must be importable, got {type(error).__name__}: {error}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--evaluator: {path} must be a file, got none there")
    spec = importlib.util.spec_from_file_location(f"evaluator_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--evaluator: {path} must be a Python file, got another one")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
