# SPDX-License-Identifier: Apache-2.0
"""Dataclasses of plain fields, read back from the JSON they were written as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")

# Annotation of a field -> types of JSON; a bool is no number here.
_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def from_plain(kind: type[T], value: object, where: str) -> T:
    """Makes a `kind` whose fields are int, float or str.

    Args:
        where: file and place, for the message.

    Raises:
        ValueError: the value is no JSON object of those fields.
    """
    wanted = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or set(value) != set(wanted):
        raise ValueError(f"{where} must hold {', '.join(wanted)}, got {value!r:.120}")
    for name, annotation in wanted.items():
        if type(value[name]) not in _KINDS[annotation]:
            raise ValueError(f"{where}: {name} must be {annotation}, got {value[name]!r:.120}")
    return kind(**value)


def numbers(value: object, where: str) -> dict[str, float]:
    """Returns a JSON object of numbers.

    Raises:
        ValueError: it is none.
    """
    kinds = _KINDS["float"]
    if not isinstance(value, dict) or not all(type(number) in kinds for number in value.values()):
        raise ValueError(f"{where} must be an object of numbers, got {value!r:.120}")
    return value
