# SPDX-License-Identifier: Apache-2.0
"""Flags from config dataclasses, functions and tables: name, type, choices, default and help.

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
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from sparse_unified._common import optional
from sparse_unified.checkpoint.files import read_text
from sparse_unified.surgery.quantize import STORAGES

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DTYPES = ("float32", "bfloat16", "float16")

# What a flag may be told beside its source: other help, or other arguments of add_argument.
Changes = str | Mapping[str, Any]


class Flags:
    """Adds the flags of a command to its parser, or to a group of them."""

    def __init__(self, parser: Any, group: Any = None) -> None:
        self.parser, self._group = parser, parser if group is None else group

    def group(self, title: str, description: str | None = None) -> Flags:
        """Returns what adds flags below a title."""
        return Flags(self.parser, self.parser.add_argument_group(title, description))

    def exclusive(self) -> Flags:
        """Returns what adds flags of which one may be given."""
        return Flags(self.parser, self.parser.add_mutually_exclusive_group())

    def of(
        self, source: Callable[..., Any], flags: str, *, unset: bool = False, **changes: Changes
    ) -> None:
        """Adds flags for parameters of a config dataclass or a function.

        Args:
            source: whose parameters they are.
            flags: with blanks between: "seed" for --seed, "lr=learning_rate" for one that is named
                otherwise.
            unset: flags that are not given are None, whatever their default.
            changes: by parameter.
        """
        parameters, said = inspect.signature(source).parameters, described(source)
        for flag in flags.split():
            short, _, name = flag.partition("=")
            name = name or short
            parameter = parameters[name]
            annotation = parameter.annotation
            if isinstance(annotation, str):
                # Of this parameter alone: others may name what only a type checker imports.
                alone = types.SimpleNamespace(__annotations__={name: annotation})
                module = sys.modules[source.__module__]
                annotation = typing.get_type_hints(alone, vars(module))[name]
            made = {"dest": name, **_type_of(name, annotation, parameter.default)}
            if not unset and parameter.default is inspect.Parameter.empty:
                made["required"] = True
            elif not unset and made.get("action") != "store_true":
                made["default"] = plain(parameter.default)
            if short != name and not {"metavar", "choices", "action"} & made.keys():
                made["metavar"] = short.upper()
            change = changes.get(name, {})
            made |= {"help": change} if isinstance(change, str) else change
            text, default = made.get("help") or said.get(name, ""), made.get("default")
            if default is not None and default is not False and "default" not in text:
                values = default if isinstance(default, tuple) else (default,)
                shown = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
                text = f"{text} (default {shown})"
            made["help"] = re.sub('[`"]', "", text).replace("%", "%%").strip()
            self._group.add_argument("--" + short.replace("_", "-"), **made)

    def table(self, text: str, **changes: Changes) -> None:
        """Adds flags given as a table: usage, two blanks or more, and help.

        MODEL is an argument, `MODEL...` one or more and `[MODEL]` one or none, `--image FILE` an
        option, `--image FILE...` one that may be repeated, `--out FILE!` one that must be given,
        and `--edit` a switch. What stands for the value says its type: `a|b` are choices, `a,b`
        names of which some are given, others are in `_TYPES`. Help that has "(default 4)" says the
        default. A line without usage goes on with the help above it.

        Args:
            text: the table.
            changes: by name.
        """
        for row in re.split(r"\n(?=\S)", inspect.cleandoc(text)):
            usage, words = re.split(r" {2,}", row, maxsplit=1)
            flag, _, metavar = usage.partition(" ")
            words = " ".join(words.split())
            made: dict[str, Any] = {"help": words.replace("%", "%%")}
            repeats = re.search(r"[^,]\.\.\.$", metavar)  # `A=B,...` is one value
            shown = (metavar[:-3] if repeats else metavar).rstrip("!") or None
            if not flag.startswith("--"):
                shown = flag.strip("[].")
                nargs = "?" if "[" in flag else "+" if "..." in flag else None
                made |= {"metavar": shown, **({"nargs": nargs} if nargs else {})}
                flag = shown.lower()
            elif shown is None:
                made["action"] = "store_true"
            else:
                made |= {"metavar": shown, "type": _TYPES.get(shown, str)}
                if re.fullmatch("[a-z]+(,[a-z]+)+", shown):
                    made["type"] = names(*shown.split(","))
                default = re.search(r"\(default ([^):]+)", words)
                if "|" in shown:
                    made |= {"choices": tuple(shown.split("|")), "metavar": None}
                elif repeats:
                    made |= {"action": "append", "default": []}
                elif default is not None:
                    made["default"] = made["type"](default[1])
                made["required"] = metavar.endswith("!")
            change = changes.get(flag.lstrip("-").replace("-", "_"), {})
            made |= {"help": change} if isinstance(change, str) else change
            self._group.add_argument(flag, **made)


def arguments(
    source: Callable[..., Any], options: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """Returns the parsed values of the parameters of a config or function, and `more`."""
    names = inspect.signature(source).parameters
    return {name: value for name, value in vars(options).items() if name in names} | more


def from_file(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """Puts flags that the YAML file of --config holds before the given arguments.

    The file maps names of flags or parameters to values; a mapping under `config` is taken alone,
    so that `adaptation.json` can be given. Later flags override earlier ones.

    Raises:
        ValueError: the file cannot be read, is no such mapping, or has a key that is no flag.
        ImportError: PyYAML is not installed.
    """
    finder = type(parser)(prog=parser.prog, add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(given)[0].config
    if path is None:
        return list(given)
    yaml = optional("yaml", "train", purpose="--config")
    try:
        content = yaml.safe_load(read_text(Path(path)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: file must be YAML, got {error}") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: file must map flags to values, got {content!r:.80}")
    actions = {}
    for action in parser._actions:
        for name in (*action.option_strings, *([action.dest] if action.option_strings else [])):
            actions[name.lstrip("-").replace("-", "_")] = action
    flags = []
    for key, own in content.items():
        known = actions.get(str(key).replace("-", "_"))
        if known is None or known.dest in ("help", "config"):
            raise ValueError(f"{path}: keys must be flags of {parser.prog}, got {key!r:.80}")
        flag = known.option_strings[0]
        if own is None or own is False or own == []:
            continue
        if known.nargs != 0:
            flags.append(f"{flag}={','.join(map(str, own)) if isinstance(own, list) else own}")
        elif own is True:
            flags.append(flag)
        else:
            raise ValueError(f"{path}: {key} must be true or false, got {own!r:.80}")
    return [*flags, *given]


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
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    inner = typing.get_args(annotation)
    if annotation is bool:
        return {"action": "store_true"}
    if annotation is torch.dtype:
        return {"choices": DTYPES}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"choices": tuple(choice.value for choice in annotation)}
    if annotation is float:
        return {"type": float}
    if annotation is int:
        return {"type": seed if name.endswith("seed") else natural if default == 0 else positive}
    if typing.get_origin(annotation) is not tuple:
        return {}
    if issubclass(inner[0], Enum):
        return {"type": names(*(choice.value for choice in inner[0]))}
    shown = {(float, float): "LO,HI", (int, int): "HxW"}.get(inner)
    of = {(float, ...): ratios, (float, float): interval, (int, int): size}
    return {"type": of.get(inner, listed), **({"metavar": shown} if shown else {})}


def plain(value: Any) -> Any:
    """Turns enum members, alone or in a tuple, into their values."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.value if isinstance(value, Enum) else value


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns the dtype of a name in `DTYPES`."""
    return None if name is None else getattr(torch, name)


# Types of values


def value(rule: str, read: Callable[[str], Any], holds: Callable[[Any], object]) -> Any:
    """Returns the type of a value that is read from text and must then hold a rule."""

    def parse(text: str) -> Any:
        try:
            found = read(text)
            is_legal = bool(holds(found))
        except (ValueError, KeyError):
            is_legal = False
        if not is_legal:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r:.200}")
        return found

    return parse


def _each_once(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found) or len(set(found)) < len(found):
        raise ValueError
    return found


def _pairs(text: str) -> dict[Any, Any]:
    """Reads `KEY=VALUE,...`, each key once, as texts."""
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    found = {key.strip(): own.strip() for key, own in pairs}
    if len(found) < len(pairs) or not all(found) or not all(found.values()):
        raise ValueError
    return found


def _number(text: str) -> int:
    # Digits alone, and no more than a seed has: int() of thousands is an error of its own.
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else -1


def _number_or_text(text: str) -> int | str:
    return text if _number(text) < 0 else int(text)


def names(*legal: str) -> Any:
    """Returns the type of a comma-separated list of different names, each of them legal."""
    rule = f"different ones of {', '.join(legal)}, comma-separated"
    return value(rule, _each_once, lambda found: set(found) <= set(legal))


def _is_share(share: float) -> bool:
    return 0 < share <= 1


prompt = value("a prompt that is not empty", str, str.strip)
positive = value("a positive integer", _number, lambda n: n > 0)
natural = value("an integer of at least 0", _number, lambda n: n >= 0)
seed = value(f"an integer from 0 to {2**63 - 1}", _number, lambda n: 0 <= n < 2**63)
size = value(
    "HEIGHTxWIDTH such as 1024x768, each a positive multiple of 16 pixels",
    lambda text: tuple(map(_number, text.lower().split("x"))),
    lambda found: len(found) == 2 and all(n > 0 and n % 16 == 0 for n in found),
)
ratio = value("above 0 and at most 1", float, _is_share)
ratios = value(
    "numbers above 0 and at most 1, each once",
    lambda text: tuple(map(float, _each_once(text))),
    lambda found: all(map(_is_share, found)),
)
interval = value(
    "two numbers LO,HI with LO at most HI",
    lambda text: tuple(map(float, text.split(","))),
    lambda found: len(found) == 2 and found[0] <= found[1],
)
listed = value("names with commas between, each once", _each_once, bool)
image_path = value(
    f"a path that ends in {', '.join(IMAGE_FORMATS)}",
    Path,
    lambda path: path.suffix.lower() in IMAGE_FORMATS,
)
storage = value(
    f"{', '.join(STORAGES)}, or und=KIND,gen=KIND with one of them",
    lambda text: _pairs(text) if "=" in text else text,
    lambda found: (
        set(found.values()) <= set(STORAGES) and set(found) <= {"und", "gen"}
        if isinstance(found, dict)
        else found in STORAGES
    ),
)
device_map = value(
    "auto or MODULE=DEVICE,...",
    lambda text: (
        text if text == "auto" else {key: _number_or_text(own) for key, own in _pairs(text).items()}
    ),
    bool,
)
max_memory = value(
    "DEVICE=SIZE,... with sizes such as 20GiB",
    lambda text: {_number_or_text(key): own for key, own in _pairs(text).items()},
    lambda found: all(re.fullmatch(r"[0-9.]+[KMGT]i?B", own) for own in found.values()),
)
shard = value(
    "I/N with I from 0 to N - 1",
    lambda text: tuple(map(int, text.split("/"))),
    lambda found: len(found) == 2 and 0 <= found[0] < found[1],
)
counts = value(
    "positive integers, each once",
    lambda text: tuple(map(int, text.split(","))),
    lambda found: min(found) > 0 and len(set(found)) == len(found),
)
# By what stands for the value in a table.
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("N", "PORT", "SECONDS"), positive),
    **{"N,N": counts, "I/N": shard, "HxW": size, "PROMPT": prompt, "KIND": storage},
    **{"MAP": device_map, "DEVICE=SIZE,...": max_memory},
}
