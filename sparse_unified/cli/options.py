# SPDX-License-Identifier: Apache-2.0
"""Options made from config dataclasses and functions: flag, type, choices, default and help.

A parameter gives its name to the flag, its annotation the type, and the Args of the docstring the
help, so that none of them is written twice. What remains here are the types of values.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DTYPES = ("float32", "bfloat16", "float16")
_MULTIPLE = 16
# No more digits than a seed has; int() of thousands of them is an error of its own.
_NUMBER = re.compile(r"[0-9]{1,19}")

# What `add_options` may be told of a flag: other help, or other arguments of add_argument.
Changes = str | Mapping[str, Any]


def add_options(
    group: Any, source: Callable[..., Any], *flags: str, unset: bool = False, **changes: Changes
) -> None:
    """Adds flags for parameters of a config dataclass or a function.

    Args:
        group: of a parser.
        source: whose parameters they are.
        flags: "seed" for --seed, or "lr=learning_rate" where the flag is named otherwise.
        unset: flags that are not given are None, whatever their default.
        changes: by parameter: its help, or what else `add_argument` is to be given.
    """
    parameters, said = inspect.signature(source).parameters, described(source)
    for flag in flags:
        short, _, name = flag.partition("=")
        name = name or short.replace("-", "_")
        parameter = parameters[name]
        annotation = parameter.annotation
        if isinstance(annotation, str):
            # Of this parameter alone: others may name what only a type checker imports.
            alone = types.SimpleNamespace(__annotations__={name: annotation})
            module = sys.modules[source.__module__]
            annotation = typing.get_type_hints(alone, vars(module))[name]
        required = parameter.default is inspect.Parameter.empty
        default = None if required or unset else plain(parameter.default)
        made = {"dest": name, **_type_of(name, annotation, parameter.default)}
        made |= {"required": True} if required and not unset else {}
        made |= {"default": default} if default is not None else {}
        if short != name and not {"metavar", "choices", "action"} & made.keys():
            made["metavar"] = short.replace("-", "_").upper()
        change = changes.pop(name, {})
        made |= {"help": change} if isinstance(change, str) else change
        made["help"] = _help(made.get("help") or said.get(name, ""), made)
        if made.get("action") == "store_true":
            made.pop("default", None)
        group.add_argument("--" + short.replace("_", "-"), **made)
    if changes:
        raise TypeError(f"add_options: changes must be of the flags, got {', '.join(changes)}")


def add_flags(group: Any, table: str) -> None:
    """Adds what takes text as it is, given as a table: usage, two blanks or more, and help.

    MODEL is an argument, `--image FILE` an option, `--image FILE...` one that may be repeated, and
    `--edit` a switch. A line without usage goes on with the help above it.
    """
    for row in re.split(r"\n(?=\S)", inspect.cleandoc(table)):
        usage, text = re.split(r" {2,}", row, maxsplit=1)
        flag, _, metavar = usage.partition(" ")
        options: dict[str, Any] = {"help": " ".join(text.split()).replace("%", "%%")}
        if metavar.endswith("..."):
            options |= {"action": "append", "default": [], "metavar": metavar[:-3]}
        elif metavar:
            options |= {"metavar": metavar}
        elif flag.startswith("--"):
            options |= {"action": "store_true"}
        else:
            flag, options["metavar"] = flag.lower(), flag
        group.add_argument(flag, **options)


def arguments(
    source: Callable[..., Any], options: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """Returns the parsed values of the parameters of a config or function, and `more`."""
    names = inspect.signature(source).parameters
    return {name: value for name, value in vars(options).items() if name in names} | more


def described(source: Callable[..., Any]) -> dict[str, str]:
    """Returns what the Args of a docstring say of each parameter.

    `a, b:` is said of both; what None does is left out, since a flag that is not given does it.
    """
    text = inspect.getdoc(source) or ""
    body = re.split(r"\n\s*(?:Raises|Returns|Yields):", text.partition("Args:")[2])[0]
    found: dict[str, str] = {}
    for block in re.split(r"\n {4}(?! )", body):
        for part in re.split(r"[;.] (?=[a-z_]+: )", " ".join(block.split())):
            names, colon, words = part.partition(": ")
            clauses = [c for c in re.split(r"(?<=[;.]) ", words) if not c.startswith("None ")]
            if colon:
                found |= dict.fromkeys(names.split(", "), " ".join(clauses).rstrip(";."))
    return found


def _type_of(name: str, annotation: Any, default: Any) -> dict[str, Any]:
    """Returns the type, choices or action of a flag, for `add_argument`."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
        origin = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if annotation is bool:
        return {"action": "store_true"}
    if annotation is torch.dtype:
        return {"choices": DTYPES}
    if origin is tuple and inner[0] is float:
        return {"type": ratios if inner[1] is ... else interval}
    if origin is tuple and inner[0] is int:
        return {"type": size, "metavar": "HxW"}
    if origin is tuple and issubclass(inner[0], Enum):
        return {"type": names(*(choice.value for choice in inner[0]))}
    if origin is tuple:
        return {"type": listed}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"choices": tuple(choice.value for choice in annotation)}
    if annotation is int:
        return {"type": seed if name.endswith("seed") else natural if default == 0 else positive}
    return {"type": float} if annotation is float else {}


def _help(text: str, made: Mapping[str, Any]) -> str:
    default = made.get("default")
    if default is not None and default is not False and "default" not in text:
        values = default if isinstance(default, tuple) else (default,)
        shown = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        text = f"{text} (default {shown})"
    return re.sub('[`"]', "", text).replace("%", "%%").strip()


def plain(value: Any) -> Any:
    """Turns enum members, alone or in a tuple, into their values."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.value if isinstance(value, Enum) else value


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns the dtype of a name in `DTYPES`."""
    return None if name is None else getattr(torch, name)


def prompt(text: str) -> str:
    """A prompt that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"prompt must not be empty, got {text!r}")
    return text


def side(text: str) -> int:
    """A side of an image: a positive multiple of 16 pixels."""
    if not _NUMBER.fullmatch(text) or int(text) < _MULTIPLE or int(text) % _MULTIPLE:
        raise argparse.ArgumentTypeError(
            f"must be a positive multiple of {_MULTIPLE} pixels, got {text!r}"
        )
    return int(text)


def size(text: str) -> tuple[int, int]:
    """`HxW` -> (height, width)."""
    match = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 1024x768, got {text!r}")
    return side(match[1]), side(match[2])


def positive(text: str) -> int:
    """A positive integer."""
    if not _NUMBER.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """An integer of at least 0."""
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed: an integer from 0 to 2^63 - 1."""
    if not _NUMBER.fullmatch(text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {2**63 - 1}, got {text!r}")
    return int(text)


def ratio(text: str) -> float:
    """A share: above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def interval(text: str) -> tuple[float, float]:
    """`LO,HI` -> two floats."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers LO,HI, got {text!r}") from None
    if not low <= high:
        raise argparse.ArgumentTypeError(f"must be LO,HI with LO at most HI, got {text!r}")
    return low, high


def listed(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found) or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(
            f"must be names with commas between, each once, got {text!r}"
        )
    return found


def names(*legal: str) -> Callable[[str], tuple[str, ...]]:
    """Returns the type of a comma-separated list of different names, each of them legal."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        if len(set(found)) < len(found) or not set(found) <= set(legal):
            raise argparse.ArgumentTypeError(
                f"must be different ones of {', '.join(legal)}, comma-separated, got {text!r}"
            )
        return found

    return parse


def ratios(text: str) -> tuple[float, ...]:
    """Comma-separated shares above 0 and at most 1, each once."""
    return tuple(ratio(part) for part in listed(text))


def image_path(text: str) -> Path:
    """A path whose ending names an image format that can be written."""
    path = Path(text)
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(IMAGE_FORMATS)}, got {text!r}")
    return path


def storage(text: str) -> str | dict[str, str]:
    """`KIND`, or `und=KIND,gen=KIND` -> {component: kind}; KIND is int8 or fp8."""
    kinds = {"int8", "fp8"}
    if text in kinds:
        return text
    found = _pairs(text, "int8, fp8 or und=KIND,gen=KIND") if "=" in text else {}
    if not found or not set(found) <= {"und", "gen"} or not set(found.values()) <= kinds:
        raise argparse.ArgumentTypeError(
            f"must be int8, fp8, or und= and gen= with one of them, got {text!r}"
        )
    return found


def device_map(text: str) -> str | dict[str, str | int]:
    """`auto`, or `MODULE=DEVICE,...` -> {module path: device}, numbers as integers."""
    if text == "auto":
        return text
    found = _pairs(text, "auto or MODULE=DEVICE,...")
    return {key: int(value) if _NUMBER.fullmatch(value) else value for key, value in found.items()}


def max_memory(text: str) -> dict[str | int, str]:
    """`DEVICE=SIZE,...` -> {device: size}, numbers as integers."""
    found = _pairs(text, "DEVICE=SIZE,...")
    return {int(key) if _NUMBER.fullmatch(key) else key: value for key, value in found.items()}


def _pairs(text: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value or key in found:
            raise argparse.ArgumentTypeError(f"must be {form}, each once, got {text!r}")
        found[key] = value
    return found
