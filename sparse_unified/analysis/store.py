# SPDX-License-Identifier: Apache-2.0
"""The folder of a run of `analyze` or `evaluate`: what it is of, and what is finished.

run.json                      what is run
points.jsonl                  a line for each finished record, of a run in one process
shard-I-of-N/points.jsonl     the same of process I of N; folders of shards that ran elsewhere
                              are copied beside each other
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_unified._common import StrPath, list_some, naming
from sparse_unified.checkpoint import files

Shard = tuple[int, int]  # number of a process, counted from 0, and how many there are

METRICS = {str: files.NUMBER}
_COUNTS = ("parameters", "weight_bytes", "flops", "peak_bytes")
_SECONDS = {"seconds": files.NUMBER, "seconds_range": [files.NUMBER]}
_COST = {**dict.fromkeys(_COUNTS, (int,)), **_SECONDS}
_DENSE = {"name": (str,), "metrics": METRICS, "cost": _COST}
_POINT = {
    **dict.fromkeys(("name", "task", "component", "axis", "change"), (str,)),
    "keep_ratio": files.NUMBER,
    "skipped_layers": [(int,)],
    "metrics": METRICS,
    "before": _COST,
    "after": _COST,
}
# What `evaluate` finds of one sample: sums by metric, each with what it is divided by; of
# understanding the tokens and the text of the answer, too.
_ITEM = {
    **dict.fromkeys(("name", "model", "task"), (str,)),
    "index": (int,),
    "sums": {str: [files.NUMBER]},
    "answer": (str, type(None)),
    "ids": [(int,)],
    "seconds": files.NUMBER,
}
_SCORED = {"name": (str,), "metrics": METRICS, "better": {str: (str,)}}
_FORMS = (_POINT, _DENSE, _ITEM, _SCORED)


class Store:
    """The open folder of one run, with the finished records in `records`, by name.

    A process writes `points.jsonl`, one of several `shard-I-of-N/points.jsonl`; all read them all.
    """

    def __init__(self, folder: Path, own: Path) -> None:
        self.folder, self._points = folder, own / "points.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Takes up what other processes have finished."""
        for path in (*self.folder.glob("points.jsonl"), *self.folder.glob("shard-*/points.jsonl")):
            found = read_records(path, is_own=path == self._points)
            self.records |= {record["name"]: record for record in found}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a finished record, which has a `name`; it is on the disk when this returns."""
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with self._points.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self.records[record["name"]] = record

    def finish(self, results: str, report: str) -> None:
        """Writes results.json and report.md."""
        for name, text in (("results.json", f"{results}\n"), ("report.md", report)):
            files.replace_file(self.folder / name, text.encode())


@contextmanager
def open_store(
    out: StrPath, description: Mapping[str, Any], shard: Shard = (0, 1)
) -> Iterator[Store]:
    """Opens the folder of a run, new or to be resumed, for one process of each shard.

    `description` are plain values that say what is run; ValueError if the folder is of something
    else, RuntimeError if another process has this shard of it open.
    """
    folder = Path(out)
    run, own = folder / "run.json", folder
    if folder.is_dir() and not run.exists():
        own_names = (".lock", "shard-", ".run.json")
        if not all(path.name.startswith(own_names) for path in folder.iterdir()):
            raise ValueError(
                f"--out: {folder} must be new, empty, or of such a run, got other files"
            )
    folder.mkdir(exist_ok=True)
    if shard[1] > 1:
        own = folder / f"shard-{shard[0]}-of-{shard[1]}"
        own.mkdir(exist_ok=True)
    refusal = RuntimeError(f"--out: {own} must be used by one run at a time, got another")
    with files.locked(own, refusal):
        if not run.exists():  # processes of one run write the same
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            files.replace_file(run, text.encode())
        found, here = _flat(files.read_json(run)), _flat(description)
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
        yield Store(folder, own)


def read_records(path: Path, *, is_own: bool = True) -> list[dict[str, Any]]:
    """Reads finished records; a last line that an interruption tore is left out.

    It is cut off where the file `is_own`: another process may be about to finish its line.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if is_own and whole != len(data):
        os.truncate(path, whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        with naming(f"{path}: line {number}"):
            records.append(files.read_object(line, "record", finite=True))
            if not any(files.has_form(records[-1], form) for form in _FORMS):
                raise ValueError(
                    f"record must be one that this command writes, got {records[-1]!r:.240}"
                )
    return records


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the values of nested objects by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{name}.{key}" if name else str(key))
    return flat
