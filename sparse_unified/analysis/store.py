# SPDX-License-Identifier: Apache-2.0
"""The folder of a sweep: what it is a run of, and the points that are finished.

run.json        what was asked for; a run that goes on in the folder must ask for the same
points.jsonl    one line per finished point, appended when it is finished
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_unified._common import list_some
from sparse_unified.checkpoint import strict_json
from sparse_unified.checkpoint.atomic import replace_file
from sparse_unified.checkpoint.reader import read_json

_RUN, _POINTS, _LOCK = "run.json", "points.jsonl", ".lock"


class Store:
    """The open folder of one run; see `open_store`."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.records = {record["name"]: record for record in records}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a finished point, which has a `name`; it is on the disk when this returns."""
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        path = self.folder / _POINTS
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(handle, line)
            if written != len(line):
                raise OSError(f"{path}: disk must have room for {len(line)} bytes, got {written}")
            os.fsync(handle)
        finally:
            os.close(handle)
        self.records[record["name"]] = record

    def write(self, name: str, text: str) -> Path:
        """Writes or replaces a file of the folder at once."""
        path = self.folder / name
        replace_file(path, text.encode())
        return path


@contextmanager
def open_store(out: str | os.PathLike[str], description: Mapping[str, Any]) -> Iterator[Store]:
    """Opens the folder of a run, new or to be gone on with, for this process alone.

    Args:
        out: made if it is not there; its parent must be.
        description: plain values that say what is run.

    Raises:
        ValueError: the folder holds other files, or a run of something else, or is damaged.
        RuntimeError: another process has it open.
    """
    folder = Path(out)
    if not folder.parent.is_dir():
        raise ValueError(f"--out: parent of {folder} must be a folder, got none there")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {folder} must be a folder, got a file")
    wanted = json.loads(json.dumps(description))
    run = folder / _RUN
    if folder.exists() and not run.exists() and {p.name for p in folder.iterdir()} - {_LOCK}:
        raise ValueError(
            f"--out: {folder} must be new, empty, or of a run of analyze, got other files"
        )
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"--out: {folder} must be used by one run at a time, got another"
            ) from None
        if run.exists():
            _require_same(run, wanted)
        else:
            replace_file(run, (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode())
        yield Store(folder, read_records(folder / _POINTS))
    finally:
        os.close(lock)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads finished points; a last line that an interruption tore is cut off.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = strict_json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} must be JSON, got {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            raise ValueError(
                f"{path}: line {number} must be a point with a name, got {record!r:.120}"
            )
        records.append(record)
    return records


def _require_same(run: Path, wanted: dict[str, Any]) -> None:
    found = read_json(run)
    differences = _differences(found, wanted)
    if differences:
        listed = list_some(
            f"{name} {there} there and {here} here" for name, there, here in differences
        )
        raise ValueError(
            f"--out: {run.parent} must be of the same run, or another folder, got {listed}"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> list[tuple[str, str, str]]:
    """Returns (name, value in the file, value wanted) of everything that differs."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            difference
            for key in dict.fromkeys([*found, *wanted])
            for difference in _differences(
                found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if found == wanted else [(name or "run", _short(found), _short(wanted))]


def _short(value: Any, limit: int = 80) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
