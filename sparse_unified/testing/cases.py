# SPDX-License-Identifier: Apache-2.0
"""A recorded case, whose fields and tensors are checked as they are taken out of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_unified.checkpoint.files import read_json
from sparse_unified.checkpoint.safetensors_io import read_header, read_tensor

_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recorded case: its name, the fields of its JSON file, and its tensors."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the recorded module, under official keys."""
        prefix = "model."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    @property
    def json_file(self) -> str:
        """Name of the file of the fields, for messages."""
        return f"{self.name}.json"

    @property
    def tensor_file(self) -> str:
        """Name of the file of the tensors, for messages."""
        return f"{self.name}.safetensors"

    def field(self, path: str, rule: str, fits: Callable[[Any], bool]) -> Any:
        """Returns a field; `vae_config.z_channels` is one inside another, None one that is absent.

        Raises:
            ValueError: its value does not fit; the message names file, field, rule and value.
        """
        value: Any = self.fields
        for name in path.split("."):
            if value is None:
                break
            if not isinstance(value, dict):
                raise ValueError(
                    f"{self.json_file}: {path} must lie in JSON objects, got {value!r:.{_SHOWN}}"
                )
            value = value.get(name)
        if not fits(value):
            got = "nothing" if value is None else f"{value!r:.{_SHOWN}}"
            raise ValueError(f"{self.json_file}: {path} must {rule}, got {got}")
        return value

    def integer(self, path: str, *, least: int) -> int:
        """Returns a field that must be an integer of at least `least`."""
        found: int = self.field(
            path,
            f"be an integer of at least {least}",
            lambda value: type(value) is int and value >= least,
        )
        return found

    def number(self, path: str) -> float:
        """Returns a field that must be a finite number."""
        found: float = self.field(path, "be a finite number", is_number)
        return found

    def mapping(self, path: str) -> dict[str, Any]:
        """Returns a field that must be a JSON object."""
        found: dict[str, Any] = self.field(path, "be an object", lambda v: isinstance(v, dict))
        return found

    def tensor(self, key: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """Returns an input, which must be floating point; None in `shape` stands for any size.

        Raises:
            ValueError: the case lacks it, or it has another shape or type.
        """
        if key not in self.tensors:
            inputs = sorted(key for key in self.tensors if not key.startswith("model."))
            raise ValueError(
                f"{self.tensor_file}: tensors must hold {key}, got {', '.join(inputs) or 'none'}"
            )
        tensor = self.tensors[key]
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{self.tensor_file}: {key} must be floating point, got {tensor.dtype}"
            )
        if shape is not None and (
            len(shape) != tensor.ndim
            or any(want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{self.tensor_file}: {key} must have shape [{wanted}], got {list(tensor.shape)}"
            )
        return tensor


def read_case(case_path: str | os.PathLike[str]) -> Case:
    """Reads a case, named by either of its files or by what their names have in common.

    Raises:
        ValueError: one of the two files is missing or damaged.
    """
    path = Path(case_path)
    if path.suffix in (".json", ".safetensors"):
        path = path.with_suffix("")
    files = [path.parent / f"{path.name}{suffix}" for suffix in (".json", ".safetensors")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"replay: case must consist of two files, got no {file}")
    specs = read_header(files[1]).tensors
    return Case(
        name=path.name,
        fields=read_json(files[0]),
        tensors={key: read_tensor(spec, what=f"{files[1]}: {key}") for key, spec in specs.items()},
    )


def is_number(value: object) -> bool:
    """Tells whether a JSON value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def is_pair(value: object) -> bool:
    """Tells whether a JSON value is the height and width of an image in pixels."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and side > 0 for side in value)
    )
