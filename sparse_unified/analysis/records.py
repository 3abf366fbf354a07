# SPDX-License-Identifier: Apache-2.0
"""The folder of a sweep: what is run, and the points that are finished.

run.json        what was asked for; a run that is resumed in the folder must ask for the same
points.jsonl    one line per finished point, appended when it is finished
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_unified._common import list_some
from sparse_unified.checkpoint.files import loads_strict, lock_alone, read_json, replace_file

NUMBER = (int, float)
_METRICS = {str: NUMBER}
_COUNTS = ("parameters", "weight_bytes", "flops", "peak_bytes")
_COST = {**dict.fromkeys(_COUNTS, (int,)), "seconds": NUMBER}
_DENSE = {"name": (str,), "metrics": _METRICS, "cost": _COST}
_POINT = {
    **dict.fromkeys(("name", "task", "component", "axis", "change"), (str,)),
    "keep_ratio": NUMBER,
    "skipped_layers": [(int,)],
    "metrics": _METRICS,
    "before": _COST,
    "after": _COST,
}


class Store:
    """The open folder of one run, with the finished points in `records`, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._points = folder, folder / "points.jsonl"
        self.records = {record["name"]: record for record in read_records(self._points)}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a finished point, which has a `name`; it is on the disk when this returns."""
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with self._points.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self.records[record["name"]] = record


@contextmanager
def open_store(out: str | os.PathLike[str], description: Mapping[str, Any]) -> Iterator[Store]:
    """Opens the folder of a run, new or to be resumed, for this process alone.

    `description` are plain values that say what is run; ValueError if the folder is of something
    else, RuntimeError if another process has it open.
    """
    folder = Path(out)
    run = folder / "run.json"
    if folder.is_dir() and not run.exists() and {p.name for p in folder.iterdir()} - {".lock"}:
        raise ValueError(
            f"--out: {folder} must be new, empty, or of a run of analyze, got other files"
        )
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            lock_alone(lock.fileno())
        except BlockingIOError:
            raise RuntimeError(
                f"--out: {folder} must be used by one run at a time, got another"
            ) from None
        if not run.exists():
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            replace_file(run, text.encode())
        found, here = _flat(read_json(run)), _flat(description)
        differences = [
            f"{name} {found.get(name)!r:.80} there and {here.get(name)!r:.80} here"
            for name in found | here
            if found.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"--out: {folder} must be of the same run, or another folder, "
                f"got {list_some(differences)}"
            )
        yield Store(folder)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads finished points; a last line that an interruption tore is cut off."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = loads_strict(line.decode("utf-8"), finite=True)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} must be JSON, got {error}") from error
        if not has_form(record, _POINT) and not has_form(record, _DENSE):
            raise ValueError(
                f"{path}: line {number} must be a point as analyze writes it, got {record!r:.240}"
            )
        records.append(record)
    return records


def has_form(value: object, form: Any) -> bool:
    """Tells whether a JSON value has a form.

    That is a tuple of types; `[form]`, a list of such; `{str: form}`, an object of such; or `{key:
    form, ...}`, an object with these keys.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        form = dict.fromkeys(value, form[str]) if str in form else form
        return value.keys() == form.keys() and all(has_form(value[k], f) for k, f in form.items())
    return type(value) in form


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the values of nested objects by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{name}.{key}" if name else str(key))
    return flat
