# SPDX-License-Identifier: Apache-2.0
"""A file of records that grows line by line and survives an interruption at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one line of JSON in one write and syncs it."""
    line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{path}: disk must have room for {len(line)} bytes, got {written}")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads what `append_record` has written; a last line that an interruption tore is cut off.

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
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} must be JSON, got {error}") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: line {number} must be a JSON object, got a {type(record).__name__}"
            )
        records.append(record)
    return records
