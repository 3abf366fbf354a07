# SPDX-License-Identifier: Apache-2.0
"""What every part of the package shares: optional imports, error messages, progress, reports.

A function checks its arguments with "<argument> must <rule>, got <value>"; the public function it
serves, or the reader of a file, puts its name in front with `context`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar, TypeVar

# Called with (done, total) while something long runs.
Progress = Callable[[int, int], object]
StrPath = str | os.PathLike[str]
_Choice = TypeVar("_Choice", bound=Enum)


def optional(module: str, extra: str = "bagel", *, purpose: str = "") -> Any:
    """Imports a package that only some functions need; an ImportError names the extra of it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f" for {purpose}" if purpose else ""
        raise ImportError(
            f"sparse_unified: {module.partition('.')[0]} must be installed{wanted} "
            f"(pip install 'sparse_unified[{extra}]'), got {error}"
        ) from error


def list_some(values: Iterable[object], limit: int = 6) -> str:
    """Writes a list for a message: the first few, shortened, and how many more."""
    texts = [text if len(text) <= 160 else text[:157] + "..." for text in map(str, values)]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more


def require(holds: object, rule: str, got: object) -> None:
    """Raises ValueError "<rule>, got <got>" unless something holds."""
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises TypeError unless a value is an integer, ValueError unless it is in range."""
    if type(value) is int and least <= value and (most is None or value <= most):
        return
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    kind = ValueError if type(value) is int else TypeError
    raise kind(f"{name} must be an integer {limits}, got {value!r:.120}")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises TypeError unless a value is a number, ValueError unless it is finite and in range."""
    is_number = type(value) in (int, float)
    if is_number and math.isfinite(value) and least <= value <= most:
        return
    limits = "" if math.isinf(least) else f" from {least:g} to {most:g}"
    kind = ValueError if is_number else TypeError
    raise kind(f"{name} must be a finite number{limits}, got {value!r:.120}")


def choice(name: str, kind: type[_Choice], value: object) -> _Choice:
    """Returns the member of an enum that a value names; ValueError lists them all."""
    try:
        return kind(value)
    except ValueError:
        legal = ", ".join(member.value for member in kind)
        raise ValueError(f"{name} must be one of {legal}, got {value!r:.120}") from None


@contextmanager
def context(where: object) -> Iterator[None]:
    """Puts "<where>: ", a public function or file, in front of errors raised inside.

    The innermost context names the error: a file that is read inside an operation stays the one
    that is named. Type, traceback and cause stay as they are.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        fault: Any = error
        is_named = getattr(fault, "named", False) or str(fault).startswith(f"{where}: ")
        fault.named = True
        if is_named:
            raise
        text = f"{where}: {fault}"
        if type(error).__str__ is BaseException.__str__:
            fault.args = (text, *error.args[1:])
            raise
        kinds = (ValueError, TypeError, RuntimeError)  # its text is made of something else
        fault = next(kind for kind in kinds if isinstance(error, kind))(text)
        fault.named = True
        raise fault from error


@contextmanager
def naming(part: object) -> Iterator[None]:
    """Puts "<part>: " in front of errors raised inside, such as the layer that is looked at.

    Unlike `context`, it leaves the name of the public function to be put in front of that.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{part}: {error}") from error


@contextmanager
def progress_bar(
    name: str, unit: str, *, show: bool | None = None
) -> Iterator[Callable[..., object]]:
    """Yields what moves a bar on stderr, a `Progress` that takes a note too; or nothing does.

    Args:
        name: in front of the bar. unit: of what is counted; "B" is shown in kB, MB, GB.
        show: None shows a bar on a terminal, where tqdm is installed.

    Raises:
        ImportError: `show` is true and tqdm is not installed.
    """
    if show is None:
        show = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    if not show:
        yield lambda *_: None
        return
    tqdm = optional("tqdm.auto").tqdm
    with tqdm(desc=name, unit=unit, unit_scale=unit == "B", file=sys.stderr) as bar:

        def advance(done: int, total: int, note: str = "") -> None:
            bar.total = total
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
            if done == total or note:
                bar.refresh()

        yield advance


class Report:
    """Base of the dataclasses that operations return: their fields as dict, JSON and text."""

    __slots__ = ()
    # Properties that `to_dict` gives after the fields.
    derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts and lists."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        for name in values:
            if isinstance(part := getattr(self, name), Report):
                values[name] = part.to_dict()
        return values | {name: getattr(self, name) for name in self.derived}

    def to_json(self) -> str:
        """Returns the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def title(self) -> str:
        """Returns the line above the table; "" is none."""
        return ""

    def headings(self) -> Sequence[str]:
        """Returns the names of the columns; none leaves them out."""
        return ()

    def table(self) -> Sequence[Sequence[object]]:
        """Returns the rows of the table below the headings; by default a field a row."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [(name.replace("_", " "), _readable(name, getattr(self, name))) for name in names]

    def notes(self) -> Sequence[str]:
        """Returns the lines below the table."""
        return ()

    def to_text(self) -> str:
        """Returns the report as a table for people."""
        rows, headings = self.table(), self.headings()
        table = [format_table([headings, *rows] if headings else rows, header=bool(headings))]
        notes = "\n".join(self.notes())
        parts = [self.title(), *(table if rows else []), *(["", notes] if notes else [])]
        return "\n".join(parts[not parts[0] :])

    def __str__(self) -> str:
        return self.to_text()


def _readable(name: str, value: Any) -> str:
    """Writes a field of a report by what its name says it is."""
    if name.startswith("bytes"):
        return format_bytes(value)
    if name == "layers":
        return format_layers(value)
    return f"{value:.1f}" if name == "seconds" else str(value)


def format_table(rows: Sequence[Sequence[object]], *, header: bool = False) -> str:
    """Lays out rows in columns, numbers to the right; `header` underlines the first row."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        padded = [
            f"{cell!s:>{width}}" if isinstance(cell, (int, float)) else f"{cell!s:<{width}}"
            for cell, width in zip(cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_layers(layers: Sequence[int]) -> str:
    """Writes ascending layer indices with ranges: `1-26` or `0, 2-5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts) or "none"


def format_bytes(count: int) -> str:
    """Writes a size in decimal units, as disks are sold: `29.2 GB`."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
